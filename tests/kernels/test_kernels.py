"""Kernels: what each refuses and why, what it writes, and that sites without a kernel stay right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.host.kernel_names import KERNELS as NAMES
from fusepass.kernels import BY_NAME, KERNELS, REFERENCE, SDPA, Kernel, Target, reference
from fusepass.kernels.flex import FLEX
from fusepass.reports.collector import collect
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    Finite,
    Keep,
    KeyGate,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    SoftCap,
    WeightScale,
    ZeroEmptyRows,
)
from tests.capture import agrees, close, compiled, copies, dynamo_graph, qkv
from tests.fake_cuda import fake_graph, hopper
from tests.specs import specification

INF = math.inf
CAUSAL = Mask(0, -INF, atoms=(Band(None, 0),))
CPU, CUDA = Target("cpu", False, False), Target("cuda", False, False)


spec = partial(specification, dtype=torch.float32, queries=8, keys=8, head_dim=16, value_dim=16, operands=4)


@dataclass(frozen=True)
class Novelty:
    """A modifier that no kernel has heard of."""

    slot: int = 0
    axes: str = "bhij"


# ---------------------------------------------------------------------------------------- refusals

SDPA_REFUSES: dict[str, tuple[Attention, str]] = {
    "softcap": (spec(SoftCap(50.0)), "it has no 'softcap 50'"),
    "scale after a bias": (spec(Bias(0), Scale(0.5)), "'scale 0.5' comes after 'bias[]'"),
    "scale after a mask": (spec(CAUSAL, ScaleBy(1, "h")), "'scale by [h]' comes after 'causal'"),
    "scale over keys": (spec(ScaleBy(0, "bj")), "multiplied by a tensor that varies over the keys"),
    "fill within reach": (spec(replace(CAUSAL, fill=-1e4)), "set to -10000, which is within reach"),
    "fill within reach in half": (
        spec(replace(CAUSAL, fill=-6e4), dtype=torch.float32),
        "set to -60000, which is within reach",
    ),
    "kept weights": (spec(weights=(Keep(0, axes="bj"),)), "after the softmax without renormalising"),
    "made finite": (spec(Finite(0.0, -1e38, 1e38)), "it has no 'nan to 0'"),
    "unknown": (spec(Novelty()), "Novelty"),
    "unknown weight": (spec(weights=(Novelty(),)), "Novelty"),
}
SDPA_TAKES: dict[str, Attention] = {
    "plain": spec(),
    "scales": spec(Scale(-0.5), ScaleBy(0, "hi"), Scale(2.0)),
    "bias and mask": spec(Scale(0.1), Bias(0, "h"), CAUSAL, Mask(1, -INF, atoms=(KeyPadding(),))),
    "lowest": spec(replace(CAUSAL, fill=torch.finfo(torch.float32).min)),
    "lowest half": spec(replace(CAUSAL, fill=torch.finfo(torch.float16).min), dtype=torch.float16),
    "small fills added": spec(replace(CAUSAL, fill=-1e4, additive=True)),
    "implied keep": spec(CAUSAL, weights=(Keep(0, axes="ij", implied=True),)),
    "rows kept": spec(weights=(Keep(0, axes="bi"),)),
    "weights scaled": spec(weights=(WeightScale(0.5), ZeroEmptyRows(), Dropout(0.1))),
    "keys gated": spec(weights=(KeyGate(0, "bhj"), Dropout(0.1))),
}
FLEX_REFUSES: dict[str, tuple[Attention, Target, str]] = {
    "exported": (spec(), replace(CPU, aten=True), "not written into exported graphs"),
    "training on cpu": (spec(SoftCap(5.0)), replace(CPU, training=True), "no gradients on cpu"),
    "dropout": (spec(weights=(Dropout(0.1),)), CPU, "no dropout"),
    "dropout on cuda": (spec(weights=(Dropout(0.1),)), CUDA, "no dropout"),
    "kept weights": (spec(weights=(Keep(0, axes="j"),)), CPU, "after the softmax without renormalising"),
    "float64": (spec(dtype=torch.float64), CPU, "does not compute in float64"),
    "unknown": (spec(Novelty()), CPU, "Novelty"),
    "unknown weight": (spec(weights=(Novelty(),)), CPU, "Novelty"),
}
FLEX_TAKES: dict[str, tuple[Attention, Target]] = {
    "softcap": (spec(Scale(0.5), SoftCap(5.0), CAUSAL), CPU),
    "any order": (spec(Bias(0), Scale(2.0), ScaleBy(1, "bj"), CAUSAL, SoftCap(1.0)), CPU),
    "made finite": (spec(Scale(0.5), Finite(0.0, -1e38, 1e38), CAUSAL), CPU),
    "any fill": (spec(replace(CAUSAL, fill=-1e4)), CPU),
    "training on cuda": (spec(SoftCap(5.0)), replace(CUDA, training=True)),
    "half": (spec(dtype=torch.bfloat16), CPU),
    "keys gated": (spec(SoftCap(5.0), weights=(KeyGate(0, "bj"),)), CPU),
}


@pytest.mark.parametrize("name", SDPA_REFUSES)
def test_sdpa_refuses(name: str) -> None:
    given, words = SDPA_REFUSES[name]
    assert words in str(SDPA.refuse(given, CPU)) and words in str(SDPA.refuse(given, CUDA))


@pytest.mark.parametrize("name", SDPA_TAKES)
def test_sdpa_takes(name: str) -> None:
    assert SDPA.refuse(SDPA_TAKES[name], CPU) is None


@pytest.mark.parametrize("name", FLEX_REFUSES)
def test_flex_refuses(name: str) -> None:
    given, target, words = FLEX_REFUSES[name]
    assert words in str(FLEX.refuse(given, target))


@pytest.mark.parametrize("name", FLEX_TAKES)
def test_flex_takes(name: str) -> None:
    given, target = FLEX_TAKES[name]
    assert FLEX.refuse(given, target) is None


def test_the_reference_takes_everything_known() -> None:
    """Requested by name, it takes everything; otherwise everything in training and nothing else."""
    for given in (*SDPA_TAKES.values(), *(s for s, _ in FLEX_TAKES.values())):
        assert REFERENCE.refuse(given, replace(CPU, requested=True)) is None
        assert REFERENCE.refuse(given, replace(CPU, training=True)) is None
        assert "what the graph has already" in str(REFERENCE.refuse(given, CPU))


def test_the_list_of_kernels() -> None:
    assert KERNELS[-1] is REFERENCE, "plain mathematics comes last"
    assert tuple(BY_NAME.values()) == KERNELS and set(BY_NAME) <= set(NAMES)
    assert all(k.name == name for name, k in BY_NAME.items())


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k is not REFERENCE], ids=lambda k: k.name)
def test_every_kernel_refuses_what_it_does_not_know(kernel: Kernel) -> None:
    for unknown in (spec(Novelty()), spec(Scale(0.5), Novelty()), spec(weights=(Novelty(),))):
        assert all(kernel.refuse(unknown, target) for target in (CPU, CUDA)), kernel.name


# ---------------------------------------------------------------------------------------- what is written


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * 0.3
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INF).softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (5.0 * torch.tanh(q @ k.transpose(-1, -2) / 5.0)).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5) @ v


def rewritten(program: Callable[..., Tensor], *args: Any, kernel: str = "auto") -> fx.GraphModule:
    graph = dynamo_graph(program, *args)
    rewrite_graph(graph, Options(kernel=kernel))
    return graph


def calls(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]


def test_what_is_proved_causal_carries_no_mask() -> None:
    (call,) = calls(rewritten(causal, *qkv()), "scaled_dot_product_attention")
    assert call.kwargs.get("is_causal") is True and call.kwargs.get("attn_mask") is None
    assert call.kwargs.get("scale") == pytest.approx(0.3)


def test_what_has_no_mask_gets_none() -> None:
    (call,) = calls(rewritten(plain, *qkv()), "scaled_dot_product_attention")
    assert not {"attn_mask", "is_causal", "dropout_p"} & set(call.kwargs) and len(call.args) == 3


@pytest.mark.parametrize(("Q", "K"), [(3, 7), (7, 3)])
def test_a_causal_mask_from_the_top_left_or_the_bottom_right(Q: int, K: int) -> None:
    def bottom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(s.shape[-1] - s.shape[-2] + 1)
        return s.masked_fill(hidden, -1e30).softmax(-1) @ v

    for program, kernel in itertools.product((causal, bottom), ("auto", "sdpa", "flex", "reference")):
        agrees(program, *qkv(Q=Q, K=K), kernel=kernel)


def test_nothing_of_the_site_is_left() -> None:
    for kernel in ("auto", "reference"):
        graph = rewritten(causal, *qkv(), kernel=kernel)
        assert not [n for n in graph.graph.nodes if "softmax" in str(n.target) or "matmul" in str(n.target)]


def test_rewriting_twice_changes_nothing_more() -> None:
    args = qkv()
    graph = rewritten(causal, *args, kernel="reference")
    code = graph.code
    report = rewrite_graph(graph, Options(kernel="reference"))
    assert graph.code == code and not report.sites


# ---------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("kernel", ["cudnn", "flash2", "flash3", "flash4"])
def test_a_kernel_that_is_not_here_gives_a_reason_and_the_right_result(kernel: str) -> None:
    args = qkv()
    got, seen = compiled(causal, *args, kernel=kernel)
    close(got, causal(*args))
    (site,) = seen.sites
    assert not site.fused and site.kernel is None and site.reason and kernel in site.reason


@pytest.mark.parametrize(
    ("kernel", "program", "words"),
    [
        ("sdpa", capped, "sdpa: it has no 'softcap 5'"),
        ("flex", dropped, "flex: it has no dropout"),
    ],
)
def test_a_named_kernel_means_that_kernel(kernel: str, program: Callable[..., Tensor], words: str) -> None:
    _, seen = compiled(program, *qkv(), kernel=kernel)
    (site,) = seen.sites
    assert not site.fused and site.reason == words and site.rejected == ((kernel, words.partition(": ")[2]),)


def test_the_first_kernel_that_takes_a_site_gets_it_and_the_others_are_told() -> None:
    seen = agrees(capped, *qkv(), kernel="auto")
    (site,) = seen.sites
    assert (site.fused, site.kernel) == (True, "flex")
    assert site.rejected == (("sdpa", "it has no 'softcap 5'"),)


def test_gradients_on_cpu_keep_softcaps_out_of_flex() -> None:
    """The reference operator has gradients, and serves what no library kernel does."""
    args = [t.requires_grad_() for t in qkv()]
    got, seen = compiled(capped, *args, kernel="auto")
    (site,) = seen.sites
    assert (site.fused, site.kernel) == (True, "reference")
    assert dict(site.rejected)["flex"] == "FlexAttention has no gradients on cpu"
    close(got, capped(*args))
    named, seen = compiled(capped, *args, kernel="flex")
    (site,) = seen.sites
    assert not site.fused and "FlexAttention has no gradients on cpu" in str(site.reason)
    close(named, capped(*args))


def test_plain_mathematics_is_not_written_for_inference() -> None:
    def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) % 2 == 0
        return (q @ k.transpose(-1, -2)).softmax(-1).masked_fill(~seen, 0.0) @ v

    args = qkv()
    got, seen = compiled(kept, *args, kernel="auto")
    (site,) = seen.sites
    assert not site.fused and "reference: plain mathematics is what the graph has already" in str(site.reason)
    assert torch.equal(got, kept(*args))
    trained = [t.requires_grad_() for t in args]
    assert compiled(kept, *trained, kernel="auto")[1].sites[0].kernel == "reference"


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "reference"])
def test_float64(kernel: str) -> None:
    args = [t.double() for t in qkv()]
    got, _ = compiled(causal, *args, kernel=kernel)
    close(got, causal(*args), 1e-10)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("program", [plain, causal])
def test_gradients_are_eagers(program: Callable[..., Tensor], kernel: str) -> None:
    args = qkv()
    mine, theirs = ([t.requires_grad_() for t in copies(args)] for _ in range(2))
    got, seen = compiled(program, *mine, kernel=kernel)
    assert seen.sites[0].fused
    got.square().sum().backward()
    program(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- TorchInductor


def forget_the_operator() -> None:
    """TorchInductor as in a process that has compiled, but without fusepass."""
    from torch._inductor import decomposition

    for op in (reference.attention, reference.attention_backward):
        decomposition.decompositions.pop(op._opoverload, None)
    decomposition.fast_random_decomps.cache_clear()
    decomposition.select_decomp_table()


def test_inductor_learns_the_operator_at_any_time() -> None:
    from torch._inductor.decomposition import select_decomp_table

    forget_the_operator()
    ops = {reference.attention._opoverload, reference.attention_backward._opoverload}
    assert not ops & set(select_decomp_table())
    for _ in range(2):
        reference.let_inductor_inline()
        assert ops <= set(select_decomp_table())


def test_inductor_writes_the_operator_out() -> None:
    """A T5-like site in training: unscaled scores and a learned bias, for which no library kernel serves."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    def t5(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v

    forget_the_operator()
    args = [t.requires_grad_() for t in (*qkv(), torch.randn(1, 2, 6, 6))]
    fn = torch.compile(t5, backend="fusepass", fullgraph=True)
    with collect() as seen:
        got, code = run_fw_bw_and_get_code(lambda: fn(*args))
    assert [(s.fused, s.kernel) for s in seen.sites] == [(True, "reference")]
    assert len(code) == 2, "a forward and a backward graph"
    lines = [line.strip() for text in code for line in text.splitlines()]
    assert not [line for line in lines if "ops.fusepass" in line and not line.startswith("#")]
    mine = [t.grad for t in args]
    for t in args:
        t.grad = None
    want = t5(*args)
    close(got, want)
    want.sum().backward()
    close(mine, [t.grad for t in args])


# ---------------------------------------------------------------------------------------- fills within reach


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "reference"])
@pytest.mark.parametrize(
    ("fill", "scores"), [(-1e4, 0.0), (-1e4, -1e4), (-5e3, -4998.0), (-1e9, 0.0), (-INF, 0.0)]
)
def test_scores_that_survive_a_finite_fill(fill: float, scores: float, kernel: str) -> None:
    bias = torch.full((6, 6), scores)

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) + b
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
        return s.masked_fill(hidden, fill).softmax(-1) @ v

    q, k, v = qkv()
    want = program(q, k, v, bias)
    got, _ = compiled(program, q, k, v, bias, kernel=kernel)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)


def test_flex_on_a_cpu_reads_queries_and_keys_from_memory() -> None:
    """PyTorch's template is wrong if both are computed in the same graph, as with rotary embeddings."""

    def fn(x: Tensor) -> Tensor:
        q, k, v = x.reshape(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
        angle = torch.arange(32)[:, None] * torch.ones(16)
        q, k = (t * angle.cos() + t.flip(-1) * angle.sin() for t in (q, k))
        future = torch.ones(32, 32, dtype=torch.bool).triu(1)
        out: Tensor = (q @ k.mT * 0.25).masked_fill(future, -torch.inf).softmax(-1) @ v
        return out

    x = torch.randn(2, 32, 192, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(fn, backend="fusepass", options={"kernel": "flex"})(x)
        torch.testing.assert_close(got, fn(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- grids of a GPU


@pytest.mark.parametrize(
    ("batch", "heads", "left"),
    [(70000, 1, True), (2, 70000, True), (300, 300, False), (200, 300, False)],
)
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "reference"])
def test_more_blocks_than_a_gpu_launches_are_refused(
    kernel: str, batch: int, heads: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention's grid has one dimension for batch and heads, the others have two."""
    hopper(monkeypatch)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    graph = fake_graph(attention, *[(batch, heads, 4, 16)] * 3)
    (site,) = rewrite_graph(graph, Options(kernel=kernel)).sites
    refused = kernel != "reference" and (left or (kernel == "flex" and batch * heads > 65535))
    assert site.fused != refused
    assert not refused or "at most 65535 blocks" in str(site.reason)
