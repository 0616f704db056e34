"""Calls of several steps, in all argument styles; a call that cannot be written out stays as it is."""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusepass.dialects.torch import composites
from fusepass.reports.collector import Collector, collect
from tests.capture import agrees, close, compiled, dynamo_graph

E, H, B, Q, K = 16, 2, 3, 5, 7
INF = float("inf")
#: The parameters of the function, in order.
NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


class AttentionPool(nn.Module):
    """The pooling of CLIP's ResNet: one query, the mean; separate projections; all arguments by keyword."""

    def __init__(self, spacial: int = 2, width: int = E, heads: int = H, out: int = 10) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, out)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(start_dim=2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight, in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]), bias_k=None,
            bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training,
            need_weights=False,
        )  # fmt: skip
        return x.squeeze(0)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_pooling_of_clip(train: bool, batch: int, dynamic: bool) -> None:
    model = AttentionPool().train(train)
    x = torch.randn(batch, E, 2, 2, requires_grad=True)
    want = model(x)
    got, seen = compiled(lambda x: model(x), x, dynamic=dynamic)
    close(got, want)
    assert [s.fused for s in seen.sites] == [True], seen.sites
    leaves = [x, *model.parameters()]
    close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


# ------------------------------------------------------------------------------- forms of a call


def call_arguments(**more: Any) -> dict[str, Any]:
    """The arguments of a call by name; queries and keys have different lengths."""
    arguments = {
        "query": torch.randn(Q, B, E), "key": torch.randn(K, B, E), "value": torch.randn(K, B, E),
        "embed_dim_to_check": E, "num_heads": H, "in_proj_weight": torch.randn(3 * E, E) / 4,
        "in_proj_bias": torch.randn(3 * E), "bias_k": None, "bias_v": None, "add_zero_attn": False,
        "dropout_p": 0.0, "out_proj_weight": torch.randn(9, E), "out_proj_bias": torch.randn(9),
    }  # fmt: skip
    return arguments | more


def alone(**more: Any) -> dict[str, Any]:
    """Without a batch."""
    return call_arguments(query=torch.randn(Q, E), key=torch.randn(K, E), value=torch.randn(K, E), **more)


def same(**more: Any) -> dict[str, Any]:
    """Queries, keys and values are one tensor."""
    x = torch.randn(Q, B, E)
    return call_arguments(query=x, key=x, value=x, **more)


PAD = torch.arange(K) >= torch.tensor([[K], [4], [2]])
SEPARATE: dict[str, Any] = {
    "use_separate_proj_weight": True, "in_proj_weight": None, "q_proj_weight": torch.randn(E, E) / 4,
    "k_proj_weight": torch.randn(E, 6) / 4, "v_proj_weight": torch.randn(E, 4) / 4,
    "key": torch.randn(K, B, 6), "value": torch.randn(K, B, 4),
}  # fmt: skip
CALLS: dict[str, dict[str, Any]] = {
    "plain": call_arguments(),
    "self-attention": same(),
    "without biases": call_arguments(in_proj_bias=None, out_proj_bias=None),
    "weights unread": call_arguments(need_weights=True),
    "weights unread, for every head": call_arguments(need_weights=True, average_attn_weights=False),
    "no weights": call_arguments(need_weights=False),
    "evaluation": call_arguments(training=False, dropout_p=0.5),
    "one sequence": call_arguments(
        query=torch.randn(Q, 1, E), key=torch.randn(K, 1, E), value=torch.randn(K, 1, E)
    ),
    "separate projections": call_arguments(**SEPARATE),
    "separate projections, no weights": call_arguments(**SEPARATE, need_weights=False),
    "a mask of truth values": call_arguments(attn_mask=torch.ones(Q, K, dtype=torch.bool).triu(3)),
    "a mask of numbers": call_arguments(attn_mask=torch.randn(Q, K), need_weights=False),
    "a mask a head": call_arguments(attn_mask=torch.randn(B * H, Q, K)),
    "a mask a head, no weights": call_arguments(attn_mask=torch.rand(B * H, Q, K) < 0.3, need_weights=False),
    "padding": call_arguments(key_padding_mask=PAD),
    "padding, no weights": call_arguments(key_padding_mask=PAD, need_weights=False),
    "padding in numbers": call_arguments(key_padding_mask=torch.zeros(B, K).masked_fill(PAD, -INF)),
    "mask and padding": call_arguments(
        key_padding_mask=PAD, attn_mask=torch.rand(Q, K) < 0.3, need_weights=False
    ),
    "causal": same(attn_mask=torch.ones(Q, Q).triu(1) * -1e9, is_causal=True, need_weights=False),
    "causal, weights unread": same(attn_mask=torch.ones(Q, Q, dtype=torch.bool).triu(1), is_causal=True),
    "keys of its own": call_arguments(
        bias_k=torch.randn(1, 1, E), bias_v=torch.randn(1, 1, E), add_zero_attn=True, key_padding_mask=PAD
    ),
    "unbatched": alone(),
    "unbatched, no weights": alone(need_weights=False),
    "unbatched, masked": alone(attn_mask=torch.rand(Q, K) < 0.3, key_padding_mask=PAD[1]),
    "unbatched, a mask a head": alone(attn_mask=torch.randn(H, Q, K), need_weights=False),
}
STYLES = ("by keyword", "by position", "mixed")


def styled(style: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """A function of the tensors among the arguments that passes them in a given style."""
    defaults = {n: p.default for n, p in inspect.signature(F.multi_head_attention_forward).parameters.items()}

    def program(tensors: dict[str, Tensor]) -> Tensor:
        known = arguments | tensors
        if style == "by keyword":
            return F.multi_head_attention_forward(**known)[0]
        if style == "by position":
            return F.multi_head_attention_forward(*(known.get(n, defaults[n]) for n in NAMES))[0]
        first = [known[n] for n in NAMES[:4]]
        return F.multi_head_attention_forward(*first, **{n: known[n] for n in known if n not in NAMES[:4]})[0]

    return program


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("style", STYLES)
def test_arguments_are_those_of_the_function(name: str, style: str) -> None:
    tensors = {n: v for n, v in CALLS[name].items() if isinstance(v, Tensor)}
    seen = agrees(styled(style, CALLS[name]), tensors)
    assert [s.fused for s in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("name", ["plain", "separate projections, no weights", "padding", "unbatched"])
def test_gradients_of_a_call_by_keyword(name: str) -> None:
    tensors = {n: v for n, v in CALLS[name].items() if isinstance(v, Tensor)}
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    program = styled("by keyword", CALLS[name])
    got, seen = compiled(program, tensors)
    assert [s.fused for s in seen.sites] == [True], seen.sites
    want = program(tensors)
    close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), 1e-4)


@pytest.mark.parametrize("index", [1, -1])
def test_weights_that_are_read(index: int) -> None:
    """By any index: Dynamo writes 1, other tracers write what the program has."""
    arguments = call_arguments()

    def program(tensors: dict[str, Tensor]) -> Tensor:
        out, weights = F.multi_head_attention_forward(**(arguments | tensors))
        assert weights is not None
        return out.sum() + weights.sum()

    gm = dynamo_graph(program, {n: v for n, v in arguments.items() if isinstance(v, Tensor)})
    (read,) = (n for n in gm.graph.nodes if n.target is operator.getitem and n.args[1] == 1)
    read.args = (read.args[0], index)
    before = list(gm.graph.nodes)
    expanded, stay = composites.expand_all(gm.graph)
    assert not expanded and [reason for _, reason in stay] == ["its attention weights are read"]
    assert list(gm.graph.nodes) == before


# ------------------------------------------------------------------------------- faults


def two_sites(tensors: dict[str, Tensor]) -> Tensor:
    """A call, and attention next to it."""
    called = F.multi_head_attention_forward(**(call_arguments() | tensors))[0]
    q, k, v = (tensors[n].transpose(0, 1) for n in ("query", "key", "value"))
    return called.sum() + ((q @ k.mT * 0.25).softmax(-1) @ v).sum()


def broken(others_read: bool, query: Any, **more: Any) -> Any:
    """Writes one step, then fails."""
    query.transpose(0, 1)
    raise ZeroDivisionError("a fault\nin two lines")


def wrong(others_read: bool, query: Any, key: Any, **more: Any) -> Any:
    """Writes a step that fails on these tensors."""
    return torch.matmul(query, key), None


def ran(monkeypatch: pytest.MonkeyPatch, strict: bool) -> tuple[Any, Collector, dict[str, Tensor]]:
    monkeypatch.setenv("FUSEPASS_STRICT", "1" if strict else "0")
    tensors = {n: v for n, v in call_arguments().items() if isinstance(v, Tensor)}
    options: dict[str, Any] = {"inner": "eager", "kernel": "reference"}
    with collect() as seen:
        out = torch.compile(two_sites, backend="fusepass", fullgraph=True, options=options)(tensors)
    return out, seen, tensors


@pytest.mark.parametrize("steps", [broken, wrong, lambda others_read, query: None])
def test_a_call_that_cannot_be_written_out_stays_alone(
    steps: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(composites.COMPOSITES, F.multi_head_attention_forward, steps)
    with caplog.at_level(logging.WARNING, logger="fusepass"):
        out, seen, tensors = ran(monkeypatch, strict=False)
    close(out, two_sites(tensors))
    assert [s.fused for s in seen.sites] == [False, True], seen.sites
    assert "writing it out failed: " in str(seen.sites[0].reason) and "\n" not in str(seen.sites[0].reason)
    assert any("multi_head_attention" in r.getMessage() and r.exc_info for r in caplog.records)
    assert not seen.notes


def test_its_fault_is_raised_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composites.COMPOSITES, F.multi_head_attention_forward, broken)
    with pytest.raises(Exception, match="a fault"):
        ran(monkeypatch, strict=True)
