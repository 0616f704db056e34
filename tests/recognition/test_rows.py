"""Rows that see no key, and the start of the causal diagonal: exactly as in eager, under every kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import checking

B, H, Q, K, D = 2, 2, 6, 6, 8
Apply = Callable[[Tensor, Tensor], Tensor]


def fill_of(s: Tensor, fill: str) -> float:
    return torch.finfo(s.dtype).min if fill == "min" else float(fill)


def replaced(s: Tensor, seen: Tensor, fill: str) -> Tensor:
    return s.masked_fill(~seen, fill_of(s, fill))


def added(s: Tensor, seen: Tensor, fill: str) -> Tensor:
    return s + torch.zeros(seen.shape, dtype=s.dtype).masked_fill(~seen, fill_of(s, fill))


def inverted(s: Tensor, seen: Tensor, fill: str) -> Tensor:
    return s + (1.0 - seen.to(s.dtype)) * fill_of(s, fill)


def chosen(s: Tensor, seen: Tensor, fill: str) -> Tensor:
    return torch.where(seen, s, torch.full([], fill_of(s, fill), dtype=s.dtype))


APPLIED = {"replaced": replaced, "added": added, "inverted": inverted, "chosen": chosen}


def causal(q: Tensor, pad: Tensor) -> Tensor:
    return torch.ones(Q, K, dtype=torch.bool).tril() & pad[:, None, None, :]


def padding(q: Tensor, pad: Tensor) -> Tensor:
    return pad[:, None, None, :]


def strictly_causal(q: Tensor, pad: Tensor) -> Tensor:
    """The first query sees nothing: known without looking at any tensor."""
    return torch.arange(K)[None, :] < torch.arange(Q)[:, None]


MASKS = {"causal": causal, "padding": padding, "strictly causal": strictly_causal}
AFTER: dict[str, Apply] = {
    "as is": lambda w, seen: w,
    "nan to zero": lambda w, seen: torch.nan_to_num(w),
    "masked again": lambda w, seen: w.masked_fill(~seen, 0.0),
    "times the mask": lambda w, seen: w * seen,
}
FILLS = ("-inf", "min", "-1e9", "-1e4")
DTYPES = ("float32", "bfloat16", "float16")


def pads(kind: str) -> Tensor:
    """`left`: the first keys are padding, and with a causal mask the first queries see nothing."""
    lengths = {"left": (4, 6), "all": (0, 3)}[kind]
    return torch.arange(K)[None, :] >= K - torch.tensor(lengths)[:, None]


def program(mask: str, how: str, fill: str, after: str, soft: str) -> Callable[..., Tensor]:
    """Attention with one mask, applied in one way."""
    apply, where, clean = APPLIED[how], MASKS[mask], AFTER[after]

    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        seen = where(q, pad)
        s = apply(q @ k.transpose(-2, -1) * 0.35, seen, fill)
        w = s.softmax(-1) if soft == "own" else torch.softmax(s, -1, dtype=torch.float32).to(q.dtype)
        return clean(w, seen) @ v

    return attention


def inputs(kind: str, dtype: str, mask: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    out = {name: torch.randn(B, H, n, D, generator=g) for name, n in (("q", Q), ("k", K), ("v", K))}
    given = {name: t.to(getattr(torch, dtype)) for name, t in out.items()}
    return given | {"pad": pads(kind)}


def possible(how: str, fill: str, dtype: str) -> bool:
    """Does the dtype hold the fill, and is zero never multiplied by infinity?"""
    if fill == "-inf":
        return how != "inverted"
    return not (dtype == "float16" and fill == "-1e9" and how != "inverted")


def cases() -> list[tuple[str, ...]]:
    """Every way to hide with every fill and clean-up; dtypes, masks and softmax dtypes take turns."""
    out: list[tuple[str, ...]] = []
    whole = itertools.product(APPLIED, FILLS, AFTER)
    for n, (how, fill, after) in enumerate(whole):
        dtype = DTYPES[(n + n // 16) % 3]
        if possible(how, fill, dtype):
            mask, kind = list(MASKS)[n % 3], ("left", "all")[(n // 3) % 2]
            out.append((mask, how, fill, after, ("own", "float32")[n % 2], kind, dtype))
    return out


def exact_of(given: dict[str, Tensor], case: tuple[str, ...]) -> Tensor:
    """Float64 with the exact fill of the low dtype, so that rows that hold only fills have the same meaning.

    A fill of -1e4 that is added shifts a row of fills without changing it, except for rounding.
    """
    mask, how, fill, after, _, _, dtype = case
    low = torch.float64 if fill == "-1e4" else getattr(torch, dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        seen = MASKS[mask](q, pad)
        s = (q @ k.transpose(-2, -1) * 0.35).to(low)
        s = APPLIED[how](s, seen, fill).double()
        return AFTER[after](s.softmax(-1), seen) @ v

    return checking.call(attention, given, torch.float64).out


@pytest.mark.parametrize("case", cases(), ids=",".join)
def test_rows_that_see_no_key(case: tuple[str, ...]) -> None:
    mask, how, fill, after, soft, kind, dtype = case
    fn, given = program(mask, how, fill, after, soft), inputs(kind, dtype, mask)
    eager = checking.call(fn, given)
    exact = exact_of(given, case)
    for kernel in ("reference", "auto", "flex"):
        torch.compiler.reset()
        run = checking.call(checking.compiled(fn, kernel), given)
        assert run.site.fused or kernel != "reference", run.site.reason
        checking.assert_as_accurate(run.out, eager.out, exact, f"{kernel} (fused: {run.site.fused})")


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("fill", ["-inf", "min", "-1e9"])
@pytest.mark.parametrize("how", ["replaced", "added"])
def test_gradients_of_rows_that_see_no_key(how: str, fill: str, kernel: str) -> None:
    if (how, fill) == ("added", "-inf"):
        return  # eager's gradients are NaN everywhere: nothing to compare with
    after = "nan to zero" if fill == "-inf" else "as is"
    fn, given = program("causal", how, fill, after, "own"), inputs("left", "float32", "causal")
    eager = checking.call(fn, given, grads=True)
    exact = checking.call(
        program("causal", how, "min" if fill == "-1e9" else fill, after, "own"), given, torch.float64, True
    )
    got = checking.call(checking.compiled(fn, kernel), given, grads=True)
    checking.assert_same_accuracy(got, eager, exact)


# ------------------------------------------------------------------------------- alignment


def top_left(n: int, m: int) -> Tensor:
    return torch.arange(m)[None, :] <= torch.arange(n)[:, None]


def bottom_right(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


ALIGNED = {"top left": top_left, "bottom right": bottom_right}


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 6), (6, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("where", ALIGNED)
@pytest.mark.parametrize("fill", ["-inf", "min"])
def test_alignment_of_the_diagonal(where: str, shape: tuple[int, int], fill: str) -> None:
    n, m = shape

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = replaced(q @ k.transpose(-2, -1), ALIGNED[where](n, m), fill)
        return torch.softmax(s, -1) @ v

    g = torch.Generator().manual_seed(0)
    given = {name: torch.randn(B, H, size, D, generator=g) for name, size in (("q", n), ("k", m), ("v", m))}
    eager, exact = (checking.call(attention, given, dtype).out for dtype in (None, torch.float64))
    for kernel in ("reference", "sdpa", "flex"):
        torch.compiler.reset()
        run = checking.call(checking.compiled(attention, kernel), given)
        empty = where == "bottom right" and n > m
        assert run.site.fused or (kernel == "flex" and empty and fill == "-inf"), run.site.reason
        checking.assert_as_accurate(run.out, eager, exact, kernel)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fills_within_reach_of_scores(dtype: str, scale: float) -> None:
    """With large scores a fill of -1e4 (or float16's lowest number) leaves something visible."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = replaced(q @ k.transpose(-2, -1) * scale - 9990.0 * (scale > 1), top_left(Q, K), "-1e4")
        return torch.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    given = {k: t for k, t in inputs("left", dtype, "causal").items() if k != "pad"}
    eager, exact = (checking.call(attention, given, dtype).out for dtype in (None, torch.float64))
    for kernel in ("reference", "auto"):
        torch.compiler.reset()
        got = checking.call(checking.compiled(attention, kernel), given).out
        checking.assert_as_accurate(got, eager, exact, kernel)


def scores_moved_and_capped(s: Tensor) -> Tensor:
    return 5 * torch.tanh((s + torch.arange(Q)[:, None]) / 5)


def scores_moved_below_a_fill(s: Tensor) -> Tensor:
    return torch.where(top_left(Q, K), s - 9999, -1e4)


def scores_moved_and_scaled_by_key(s: Tensor) -> Tensor:
    return (s + torch.arange(Q)[:, None]) * torch.linspace(0.1, 1, K)


def scores_moved_below_the_lowest_fill(s: Tensor) -> Tensor:
    return (s - 100.0).masked_fill(~top_left(Q, K), float("-inf"))


MOVED = [
    scores_moved_and_capped,
    scores_moved_below_a_fill,
    scores_moved_and_scaled_by_key,
    scores_moved_below_the_lowest_fill,
]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("move", MOVED, ids=lambda move: move.__name__)
def test_a_shift_of_rows_cancels_only_at_the_softmax(move: Callable[[Tensor], Tensor], kernel: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(move(q @ k.transpose(-2, -1)), -1) @ v

    given = {k: t for k, t in inputs("left", "float32", "causal").items() if k != "pad"}
    eager, exact = (checking.call(attention, given, dtype).out for dtype in (None, torch.float64))
    got = checking.call(checking.compiled(attention, kernel), given).out
    checking.assert_as_accurate(got, eager, exact)
