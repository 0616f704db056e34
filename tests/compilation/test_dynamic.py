"""Dynamic shapes: the same recognition, one graph for many sizes, and no extra compilations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fusepass.reports import collector
from tests import checking, programs
from tests.programs import SQUARE, Program, Sizes

PROGRAMS = {
    "plain": Program(),
    "causal": Program(mask="causal", build="tril"),
    "causal additive": Program(mask="causal", build="triu", apply="additive", fill="min"),
    "offset": Program(mask="offset", build="tril"),
    "offset by positions": Program(mask="offset"),
    "window": Program(mask="window"),
    "window from tril": Program(mask="window", build="tril", fill="min"),
    "symmetric": Program(mask="symmetric"),
    "padding": Program(mask="causal+padding", fill="min"),
    "additive padding": Program(mask="padding", apply="inverted", fill="min"),
    "grouped": Program(mask="causal", heads="interleave"),
    "grouped by reshape": Program(mask="causal", heads="reshape", layout="bshd"),
    "single": Program(heads="single"),
    "folded heads": Program(layout="3d", product="bmm", heads="expand", mask="causal"),
    "packed": Program(layout="packed", heads="expand", mask="causal", build="tril"),
    "einsum": Program(layout="einsum", mask="causal"),
    "transposed": Program(layout="transposed", mask="causal"),
    "alibi": Program(bias="alibi", mask="causal"),
    "t5": Program(bias="t5"),
    "softcap": Program(function="tanh", mask="window"),
    "document": Program(mask="causal+document"),
    "written out": Program(softmax="safe", mask="causal"),
    "buffer": Program(mask="causal", build="buffer"),
}
MANY = (
    SQUARE,
    Sizes(B=3, Q=7, K=7),
    Sizes(B=1, Q=9, K=9),
    Sizes(B=5, Q=2, K=2),
    Sizes(B=4, Q=12, K=12),
)


def static_words(p: Program) -> list[str]:
    """The parts of a specification that do not depend on sizes."""
    return [w for w in programs.words(p) if not w.startswith(("Q=", "K=", "causal+"))]


def head_sizes_fixed(p: Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Heads and head sizes are constants of a model; batch and lengths vary."""
    length = 1 if p.layout in ("bshd", "packed", "einsum") else 2
    for name, tensor in given.items():
        if name in ("q", "k", "v"):
            torch._dynamo.mark_static(tensor, [d for d in range(tensor.dim()) if d not in (0, length)])
        elif name in ("slopes", "table"):
            torch._dynamo.mark_static(tensor)
    return given


def check_all(p: Program, fn: Callable[..., Tensor], sizes: tuple[Sizes, ...]) -> list[checking.Run]:
    """Call one compiled function with inputs of many sizes."""
    runs = []
    for n, size in enumerate(sizes):
        sized = replace(p, sizes=size)
        given = programs.inputs(sized, seed=n)
        eager = checking.call(programs.function(p), given).out
        exact = checking.call(programs.function(p, exact=True), given, torch.float64).out
        fixed = head_sizes_fixed(sized, checking.copies(given))
        with collector.collect() as seen, torch.no_grad():
            out = fn(**fixed)
        runs.append(checking.Run(seen.sites, out, {}))
        checking.assert_as_accurate(runs[-1].out, eager, exact, str(size))
    return runs


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_dynamic_graph_serves_many_sizes(name: str) -> None:
    p = PROGRAMS[name]
    fn = checking.compiled(programs.function(p), dynamic=True)
    runs = check_all(p, fn, tuple(s for s in MANY if s.B > 1))
    sites = [s for run in runs for s in run.sites]
    assert len(sites) == 1, "more than one graph was compiled"
    assert sites[0].fused, sites[0].reason
    missing = [w for w in static_words(p) if w not in sites[0].spec]
    assert not missing, f"{missing} not in {sites[0].spec}"


@pytest.mark.parametrize("heads", ["equal", "expand", "repeat"])
@pytest.mark.parametrize("bias", ["none", "head"])
def test_packed_heads_of_unknown_number_and_size(heads: str, bias: str) -> None:
    """Sizes of heads are quotients of quotients here; guards of the products say which of them are equal."""
    p = Program(layout="packed", heads=heads, bias=bias, mask="causal")
    given = programs.inputs(p)
    run = checking.call(checking.compiled(programs.function(p), dynamic=True), given)
    assert run.site.fused, run.site.reason
    eager, exact = (checking.call(programs.function(p), given, t).out for t in (None, torch.float64))
    checking.assert_as_accurate(run.out, eager, exact)


@pytest.mark.parametrize(
    "name", ["causal", "offset", "window", "padding", "grouped", "packed", "t5", "buffer"]
)
def test_no_more_compilations_than_with_the_inner_backend(name: str) -> None:
    """Automatic dynamic shapes: first static, then dynamic; torch treats 0 and 1 specially."""
    p = PROGRAMS[name]
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    check_all(p, torch.compile(programs.function(p), backend=counter), MANY)
    alone = counter.frame_count
    torch.compiler.reset()
    runs = check_all(p, checking.compiled(programs.function(p)), MANY)
    sites = [s for run in runs for s in run.sites]
    assert len(sites) == alone
    assert all(s.fused for s in sites), [s.reason for s in sites]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", ["causal", "grouped", "folded heads", "padding"])
def test_gradients_of_a_dynamic_graph(name: str, kernel: str) -> None:
    p = PROGRAMS[name]
    fn = checking.compiled(programs.function(p), kernel, inner="aot_eager", dynamic=True)
    for size in (SQUARE, Sizes(B=3, Q=7, K=7)):
        given = programs.inputs(replace(p, sizes=size))
        eager, exact = (
            checking.call(programs.function(p, exact), given, dtype, grads=True)
            for exact, dtype in ((False, None), (True, torch.float64))
        )
        checking.assert_same_accuracy(checking.call(fn, given, grads=True), eager, exact)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_cache_that_grows(kernel: str) -> None:
    """Decoding: one query, keys that grow by one; the offset is the number of earlier keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        seen = torch.arange(m)[None, :] <= torch.arange(n)[:, None] + (m - n)
        s = (q @ k.transpose(-2, -1) * 0.35).masked_fill(~seen, torch.finfo(q.dtype).min)
        return torch.softmax(s, -1) @ v

    fn = checking.compiled(attention, kernel)
    sites = 0
    for length in range(3, 12):
        given = {name: torch.randn(2, 4, n, 8) for name, n in (("q", 1), ("k", length), ("v", length))}
        eager, exact = (checking.call(attention, given, dtype).out for dtype in (None, torch.float64))
        run = checking.call(fn, given)
        checking.assert_as_accurate(run.out, eager, exact, str(length))
        assert all(s.fused for s in run.sites), run.sites
        sites += len(run.sites)
    assert sites == 2  # one static graph, one dynamic


# -------------------------------------------------------------------------------- sizes that depend on data


def kept(x: Tensor, keep: Tensor) -> Tensor:
    """Attention among the rows of ``[S, 96]`` that a mask keeps, causal."""
    rows = x[keep]
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(0, 1) for t in rows.chunk(3, -1))
    n = rows.shape[0]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    out: Tensor = (q @ k.transpose(-2, -1) * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return out


def promised(x: Tensor, keep: Tensor) -> Tensor:
    """The same among the first rows, which are promised to be at least two."""
    n = int(keep.sum().item())
    torch._check(n >= 2)
    torch._check(n <= x.shape[0])
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(0, 1) for t in x[:n].chunk(3, -1))
    hidden = torch.arange(n)[:, None] < torch.arange(n)
    out: Tensor = (q @ k.transpose(-2, -1) * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return out


@pytest.mark.parametrize(("program", "fused"), [(kept, False), (promised, True)])
@pytest.mark.parametrize("kernel", ["auto", "flex"])
def test_sizes_that_depend_on_data(program: Callable[..., Tensor], fused: bool, kernel: str) -> None:
    """PyTorch's operators ask whether such a size is 0; without a promise that it is not, the site stays."""
    torch.manual_seed(0)
    given = {"x": torch.randn(10, 96), "keep": torch.arange(10) % 3 != 0}
    ask = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(ask):
        got = checking.call(checking.compiled(program, kernel, "aot_eager"), given)
    eager, exact = (checking.call(program, given, dtype) for dtype in (None, torch.float64))
    checking.assert_same_accuracy(got, eager, exact)
    if kernel == "auto":
        assert got.site.fused == fused, got.site
    else:
        words = "depends on data" if fused else "there may be no keys: u0"
        assert not got.site.fused and words in str(got.site.reason), got.site


# ---------------------------------------------------------------------------------------- grids and means


def a_grid_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The literal sizes of views fix those of the inputs, through guards on remainders and quotients."""
    s = (q @ k.mT).view(-1, 3, 3, 3, 3) + torch.arange(3.0)
    return s.view(-1, 9, 9).softmax(-1) @ v


def a_grid_by_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relative positions of a picture, added row by row and column by column, as in SAM."""
    b, h, w, d = q.shape
    s = q.flatten(1, 2) @ k.flatten(1, 2).mT
    rows = torch.einsum("bhwc,hkc->bhwk", q, torch.ones(h, h, 1, dtype=q.dtype).expand(h, h, d))
    s = (s.view(b, h, w, h, w) + rows[..., None]).view(b, h * w, h * w)
    return (s.softmax(-1) @ v.flatten(1, 2)).view(b, h, w, d)


def less_the_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - s.mean(-1, keepdim=True)).softmax(-1) @ v


def less_the_mean_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - s.mean()).softmax(-1) @ v


SHAPES = {a_grid_and_back: ((8, 9, 8), (4, 9, 8)), a_grid_by_sizes: ((2, 3, 5, 8), (3, 4, 2, 8))}


FOLLOWED = [a_grid_and_back, a_grid_by_sizes, less_the_mean, less_the_mean_of_all]


@pytest.mark.parametrize("program", FOLLOWED, ids=lambda f: f.__name__)
def test_what_fuses_at_fixed_sizes_fuses_at_any(program: Callable[..., Tensor]) -> None:
    fn = checking.compiled(program, "reference", dynamic=True)
    for shape in SHAPES.get(program, ((2, 4, 6, 8), (3, 4, 9, 8))):
        given = {n: torch.randn(shape) for n in "qkv"}
        eager, exact = checking.call(program, given), checking.call(program, given, torch.float64)
        got = checking.call(fn, given)
        assert all(site.fused for site in got.sites), got.sites  # no sites if nothing is compiled
        assert got.sites or shape != SHAPES.get(program, ((2, 4, 6, 8),))[0]
        checking.assert_same_accuracy(got, eager, exact)


def test_half_precision_sums_may_overflow() -> None:
    """A sum in half precision may overflow; divided by the number of keys, it is not their mean."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        return (s - s.sum(-1, keepdim=True) / s.shape[-1]).softmax(-1) @ v

    given = {n: torch.randn(2, 2, 6, 8).half() * 1e2 for n in "qkv"}
    want = checking.call(attention, given).out
    got = checking.call(checking.compiled(attention, "reference", dynamic=True), given)
    torch.testing.assert_close(got.out, want, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_gradients_of_heads_that_are_padded_with_zeros() -> None:
    """Values have other head sizes than keys, and all sizes are symbols."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, queries = q.shape[1] // k.shape[1], q.shape[2]
        wide = k.unsqueeze(2).repeat(1, 1, groups, 1, 1).flatten(1, 2)
        scores = torch.bmm(q.flatten(0, 1), wide.flatten(0, 1).mT).view(*q.shape[:3], k.shape[2])
        seen = torch.arange(queries)[:, None] < 2
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return weights @ v.repeat_interleave(groups, 1)

    shapes = ((3, 4, 2, 1), (3, 2, 2, 1), (3, 2, 2, 2))
    given = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    program(*given).sum().backward()
    expected = [t.grad for t in given]
    mine = [t.detach().clone().requires_grad_() for t in given]
    options: dict[str, Any] = {"inner": "aot_eager", "kernel": "sdpa"}
    with collector.collect() as seen:
        torch.compile(program, backend="fusepass", dynamic=True, options=options)(*mine).sum().backward()
    assert {site.kernel for site in seen.fused} == {"sdpa"}
    torch.testing.assert_close([t.grad for t in mine], expected)
