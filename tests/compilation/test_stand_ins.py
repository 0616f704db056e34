"""Libraries replace PyTorch's functions by their own: only programs that call these get the library's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusepass
from fusepass.dialects.torch.nodes import is_pytorchs, replaced_function
from fusepass.reports.collector import Collector
from tests.capture import close, compiled, dynamo_graph, qkv

REAL = F.scaled_dot_product_attention


def quantised(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A function that differs from attention enough to be noticed."""
    out = REAL(q.bfloat16(), k.bfloat16(), v.bfloat16(), *args, **kwargs)
    return out.to(q.dtype) + 1


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of different sizes, which are padded for SDPA, and rows that see no key."""
    hidden = (q.sum(-1, True) > 0).expand(-1, -1, -1, k.shape[-2])
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0) @ v[..., :5]


def with_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale and biases that are tensors (one is constant in each row, and cancels), and grouped heads."""
    k, v = (t[:, :1].repeat_interleave(2, 1) for t in (k, v))
    s = q @ k.mT * q.mean((0, 2, 3))[None, :, None, None].exp() + k.sum(-1)[:, :, None] + q.sum(-1, True)
    return s.softmax(-1) @ v


def raises(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a function of somebody else runs")


#: Functions that kernels could be written with, and that the programs do not call.
PLACES = [
    *((F, name) for name in ("scaled_dot_product_attention", "pad", "softmax", "dropout", "linear")),
    *(
        (torch, name)
        for name in ("matmul", "where", "mul", "add", "div", "sub", "permute", "reshape", "full")
    ),
    *((torch, name) for name in ("scalar_tensor", "logical_not", "cat", "arange", "transpose", "eq", "mean")),
    *((torch, name) for name in ("isfinite", "amax", "detach", "slice_copy", "unsqueeze")),
]


@pytest.mark.parametrize("program", [written, with_padding, with_scales])
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "reference"])
def test_what_is_written_is_pytorchs(
    program: Callable[..., Tensor], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = qkv()
    want, gm = program(*given), dynamo_graph(program, *given)
    plain = fusepass.fuse(gm, kernel=kernel)
    for place, name in PLACES:
        monkeypatch.setattr(place, name, raises)
    theirs = fusepass.fuse(gm, kernel=kernel)
    targets = [[str(n.target) for n in g.graph.nodes] for g in (plain, theirs)]
    assert targets[0] == targets[1]
    new = [n for n in theirs.graph.nodes if n.op == "call_function" and n.target in map(vars_of, PLACES)]
    assert not new
    monkeypatch.undo()
    inputs = {f"L_{name}_": t for name, t in zip("qkv", given, strict=True)}
    close(theirs(*(inputs[str(n.target)] for n in theirs.graph.find_nodes(op="placeholder")))[0], want)


def vars_of(place: tuple[Any, str]) -> Any:
    return getattr(*place)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_model_that_never_called_it_does_not_run_theirs(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = qkv()
    want = written(*given)
    monkeypatch.setattr(F, "scaled_dot_product_attention", quantised)
    torch._dynamo.reset()
    options: dict[str, Any] = {"inner": inner, "kernel": "sdpa"}
    close(torch.compile(written, backend="fusepass", options=options)(*given), want)


# ------------------------------------------------------------------------------ models that call theirs


def calls_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6).tril() == 1)


def takes_part(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function: Dynamo traces into it."""
    return fn


def under_its_name(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that claims to be PyTorch's, and that Dynamo does not trace into."""
    named = functools.wraps(REAL)(fn)
    named.__module__ = "torch.nn.functional"
    allowed: Callable[..., Any] = torch.compiler.allow_in_graph(named)
    return allowed


def as_an_operator(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A library's own operator."""
    run = torch.library.custom_op("fusepass_tests::theirs", _plain, mutates_args=())
    run.register_fake(_empty)
    return lambda q, k, v, attn_mask=None: run(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return quantised(q, k, v)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.parametrize("how", [takes_part, under_its_name, as_an_operator])
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "reference"])
def test_a_model_that_calls_theirs_runs_theirs(
    how: Callable[..., Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", how(quantised))
    given = qkv()
    want = calls_it(*given)
    assert (want - REAL(*given, attn_mask=torch.ones(6, 6).tril() == 1)).abs().max() > 0.5
    got, seen = compiled(calls_it, *given, kernel=kernel)
    close(got, want, 1e-2)
    assert how is takes_part or not [s for s in seen.sites if s.fused]


def attends(need_weights: bool) -> tuple[nn.MultiheadAttention, Tensor]:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)


def run_module(need_weights: bool) -> tuple[Tensor, Tensor, Collector]:
    model, x = attends(need_weights)

    def fn(x: Tensor) -> Tensor:
        return model(x, x, x, need_weights=need_weights)[0]  # type: ignore[no-any-return]

    got, seen = compiled(fn, x, kernel="auto")
    return got, fn(x), seen


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "linear", "softmax"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_calls_of_several_steps_run_theirs(
    name: str, need_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is not written out if one of its steps has been replaced."""
    real = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *a, **kw: real(*a, **kw) + 0.25)
    got, want, seen = run_module(need_weights)
    close(got, want)
    (site,) = seen.sites
    assert not site.fused and f"'{name}'" in str(site.reason)
    monkeypatch.undo()
    got, want, seen = run_module(need_weights)
    close(got, want)
    assert [s.fused for s in seen.sites] == [True] and f"'{name}'" not in str(seen.sites[0].reason)


def test_functions_are_known_by_themselves_and_not_by_their_names() -> None:
    for function in (F.softmax, F.linear, torch.matmul, torch.einsum, torch.Tensor.to, torch.ops.aten.mm):
        assert is_pytorchs(function)
    for borrowed in (functools.wraps(F.softmax)(lambda *a: a), functools.partial(F.softmax), quantised):
        assert not is_pytorchs(borrowed)
    assert replaced_function(F.multi_head_attention_forward) is None  # type: ignore[arg-type]
