"""Masks by meaning: every construction gives the atom it means, and the formula is the mask."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusepass.expressions.index import AxisSpace, Facts
from fusepass.expressions.ir import Expr, walk
from fusepass.patterns import masks
from fusepass.patterns.masks import Positions, classify, conjuncts, every_row_sees
from fusepass.recognition.recognize import RULES
from fusepass.rules.engine import Scope, Term
from fusepass.rules.formulas import Formulas
from fusepass.specification.attention import Atom, Band, Dense, KeyPadding
from tests.capture import agrees, compiled, meaning, qkv
from tests.evaluate import Evaluator, Grid

N = 8
INF = math.inf
LOWEST = torch.finfo(torch.float32).min
Make = Callable[[], Tensor]


def ij(queries: int = N, keys: int = N) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None, :]


@functools.cache
def read(make: Callable[..., Tensor], *args: Any) -> tuple[Expr, Positions, Scope, Term]:
    """The formula of one element of a mask ``[..., Q, K]``."""
    node, reader = meaning(make, *args)
    scope = Scope(AxisSpace(reader.facts), views=RULES.layout)
    index = tuple(scope.space.new_axis("x", n) for n in node.shape)
    letters = dict(zip([next(iter(i.axes), "") for i in index], "bhij"[4 - len(index) :], strict=True))
    scope.keys = index[-1]
    formula = Formulas(scope).lift(Term(node, index))
    return formula, Positions(index[-2], index[-1], letters), scope, Term(node, index)


def atoms(make: Callable[..., Tensor], *args: Any) -> list[Atom]:
    formula, at, scope, _ = read(make, *args)
    parts = [classify(part, at, scope.space) for part in conjuncts(formula)]
    bands = [a for a in parts if isinstance(a, Band)]
    whole = masks.intersect(bands, scope.facts)
    assert whole is not None
    rest: list[Atom] = [a for a in dict.fromkeys(parts) if not isinstance(a, Band)]
    return [whole, *rest] if bands else rest


def text(make: Callable[..., Tensor], *args: Any) -> str:
    return " & ".join(map(str, atoms(make, *args)))


# ---------------------------------------------------------------------------------------- constructions


def cumulative() -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    return mask.cumsum(0) >= mask.cumsum(1)


def written() -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask.tril_()
    return mask


def by_where() -> Tensor:
    i, j = ij()
    return torch.where(j > i, False, True)


CAUSAL: dict[str, Make] = {
    "tril of ones": lambda: torch.ones(N, N).tril().bool(),
    "tril of bools": lambda: torch.tril(torch.ones(N, N, dtype=torch.bool)),
    "tril in place": written,
    "not triu": lambda: ~torch.ones(N, N, dtype=torch.bool).triu(1),
    "not triu, diagonal=": lambda: torch.logical_not(torch.triu(torch.ones(N, N), diagonal=1)),
    "triu is zero": lambda: torch.triu(torch.ones(N, N), 1) == 0,
    "tril is one": lambda: torch.tril(torch.ones(N, N)) == 1,
    "tril is not zero": lambda: torch.tril(torch.ones(N, N)) != 0,
    "triu transposed": lambda: torch.ones(N, N, dtype=torch.bool).triu().T,
    "triu mT": lambda: torch.ones(N, N, dtype=torch.bool).triu().mT,
    "slice of a larger": lambda: torch.ones(32, 32, dtype=torch.bool).tril()[:N, :N],
    "view of a larger": lambda: (
        torch.ones(32, 32, dtype=torch.uint8).tril().view(1, 1, 32, 32)[0, 0, :N, :N].bool()
    ),
    "j <= i": lambda: ij()[1] <= ij()[0],
    "i >= j": lambda: ij()[0] >= ij()[1],
    "j < i + 1": lambda: ij()[1] < ij()[0] + 1,
    "not j > i": lambda: ~(ij()[1] > ij()[0]),
    "i - j >= 0": lambda: ij()[0] - ij()[1] >= 0,
    "j - i < 1": lambda: ij()[1] - ij()[0] < 1,
    "unsqueeze": lambda: torch.arange(N).unsqueeze(1) >= torch.arange(N).unsqueeze(0),
    "view": lambda: torch.arange(N).view(-1, 1) >= torch.arange(N).view(1, -1),
    "floats": lambda: torch.arange(N, dtype=torch.float32)[:, None] >= torch.arange(N, dtype=torch.float32),
    "expand": lambda: torch.arange(N)[None].expand(N, N) <= torch.arange(N)[:, None].expand(N, N),
    "both reversed": lambda: ij()[1].flip(1) >= ij()[0].flip(0),
    "triu flipped": lambda: torch.ones(N, N, dtype=torch.bool).triu().flip(0, 1),
    "where": by_where,
    "masked_fill": lambda: torch.ones(N, N, dtype=torch.bool).masked_fill(ij()[1] > ij()[0], False),
    "and with ones": lambda: torch.ones(N, N, dtype=torch.bool) & (ij()[1] <= ij()[0]),
    "or with zeros": lambda: torch.zeros(N, N, dtype=torch.bool) | (ij()[1] <= ij()[0]),
    "twice": lambda: (ij()[1] <= ij()[0]) & torch.ones(N, N).tril().bool(),
    "gathered": lambda: torch.ones(16, 16, dtype=torch.bool).tril()[
        torch.arange(N)[:, None], torch.arange(N)
    ],
    "shifted both": lambda: (ij()[1] + 3) <= (ij()[0] + 3),
    "doubled": lambda: 2 * ij()[1] <= 2 * ij()[0],
    "cumulative": cumulative,
}
OTHERS: dict[str, tuple[str, Make]] = {
    "strict": ("causal+-1", lambda: ij()[1] < ij()[0]),
    "offset by tril": ("causal+2", lambda: torch.ones(N, N).tril(2).bool()),
    "offset by sum": ("causal+3", lambda: ij()[1] <= ij()[0] + 3),
    "a cache, slice": ("causal+4", lambda: torch.ones(16, 16, dtype=torch.bool).tril()[4:8, :8]),
    "a cache, arange": ("causal+4", lambda: torch.arange(8) <= torch.arange(4, 8)[:, None]),
    "bottom right": ("causal+5", lambda: torch.ones(3, 8, dtype=torch.bool).tril(diagonal=5)),
    "window": ("window(2)", lambda: (ij()[1] <= ij()[0]) & (ij()[1] > ij()[0] - 3)),
    "window by triu": (
        "window(2)",
        lambda: torch.ones(N, N).tril().bool() & torch.ones(N, N).triu(-2).bool(),
    ),
    "window by tril of triu": ("window(3)", lambda: torch.ones(N, N).triu(-3).tril(0) != 0),
    "window by difference": ("window(2)", lambda: (ij()[0] - ij()[1] >= 0) & (ij()[0] - ij()[1] < 3)),
    "two-sided": ("window(2, 2)", lambda: (ij()[0] - ij()[1]).abs() <= 2),
    "two-sided, strict": ("window(2, 2)", lambda: torch.abs(ij()[0] - ij()[1]) < 3),
    "two-sided, not above": ("window(2, 2)", lambda: ~((ij()[0] - ij()[1]).abs() > 2)),
    "uneven": ("window(1, 3)", lambda: (ij()[1] - ij()[0] <= 3) & (ij()[0] - ij()[1] <= 1)),
    "one-sided": ("band(2, )", lambda: ij()[0] - ij()[1] <= 2),
    "not tril": ("band(-1, )", lambda: torch.ones(N, N).triu(1).bool()),
    "diagonal": ("band(0, 0)", lambda: ij()[0] == ij()[1]),
    "eye": ("band(0, 0)", lambda: torch.eye(N, dtype=torch.bool)),
    "chunk": ("chunk(4)", lambda: ij()[0] // 4 == ij()[1] // 4),
    "chunk by div": (
        "chunk(2)",
        lambda: ij()[0].div(2, rounding_mode="floor") == ij()[1].div(2, rounding_mode="floor"),
    ),
    "causal chunk": ("causal & chunk(4)", lambda: (ij()[1] <= ij()[0]) & (ij()[0] // 4 == ij()[1] // 4)),
    "all": ("", lambda: torch.ones(N, N, dtype=torch.bool)),
    "all by bounds": ("", lambda: ij()[1] < N + ij()[0]),
    "all by or": ("", lambda: (ij()[1] <= ij()[0]) | torch.ones(N, N, dtype=torch.bool)),
    "all by a wide window": ("", lambda: ij()[1] > ij()[0] - 100),
    "tril far above": ("", lambda: torch.ones(N, N).tril(N).bool()),
    "none": ("mask[]", lambda: torch.zeros(N, N, dtype=torch.bool)),
    "none by bounds": ("mask[]", lambda: ij()[1] > ij()[0] + 100),
    "checkerboard": ("mask[ij]", lambda: (ij()[0] + ij()[1]) % 2 == 0),
    "first keys": ("mask[j]", lambda: (ij()[1] < 5).expand(N, N)),
    "prefix of a number": ("prefix", lambda: (ij()[1] <= ij()[0]) | (ij()[1] < 3)),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_however_it_is_written(name: str) -> None:
    assert torch.equal(CAUSAL[name](), torch.ones(N, N, dtype=torch.bool).tril())
    assert text(CAUSAL[name]) == "causal"


@pytest.mark.parametrize("name", OTHERS)
def test_the_atom_a_construction_means(name: str) -> None:
    expected, make = OTHERS[name]
    assert text(make) == expected


@pytest.mark.parametrize(
    "make", [*CAUSAL.values(), *(make for _, make in OTHERS.values())], ids=[*CAUSAL, *OTHERS]
)
def test_the_formula_is_the_mask(make: Make) -> None:
    formula, _, scope, term = read(make)
    grid = Grid(scope.space, Evaluator({}))
    got = grid.formula(formula)
    assert torch.equal(got, grid.term(term))
    own = grid.dims(term.index)  # lifting may have made axes of its own
    assert torch.equal(got[tuple(slice(None) if d in own else 0 for d in range(got.dim()))], make())


PAD = torch.tensor([[1] * 8, [1] * 5 + [0] * 3], dtype=torch.bool)
LABELS = torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [2] * 2])
WITH_TENSORS: dict[str, tuple[str, Callable[..., Tensor], Tensor]] = {
    "padding": ("key padding", lambda p: p[:, None, None, :], PAD),
    "padding of integers": ("key padding", lambda p: p[:, None, None, :] == 1, PAD.long()),
    "padding inverted": ("key padding", lambda p: ~(p == 0)[:, None, None, :], PAD.float()),
    "padding expanded": ("key padding", lambda p: p[:, None, None, :].expand(2, 1, N, N), PAD),
    "padding gathered": (
        "key padding",
        lambda p: p[torch.arange(2)[:, None], torch.arange(N)][:, None, None],
        PAD,
    ),
    "lengths": ("key padding", lambda n: torch.arange(N) < n[:, None, None, None], torch.tensor([8, 5])),
    "causal with padding": ("causal & key padding", lambda p: (ij()[1] <= ij()[0]) & p[:, None, None], PAD),
    "document": ("document", lambda d: (d[:, :, None] == d[:, None, :])[:, None], LABELS),
    "causal document": (
        "causal & document",
        lambda d: ((d[:, :, None] == d[:, None, :]) & (ij()[1] <= ij()[0]))[:, None],
        LABELS,
    ),
    "prefix": (
        "prefix",
        lambda n: (ij()[1] <= ij()[0]) | (ij()[1] < n[:, None, None, None]),
        torch.tensor([2, 4]),
    ),
    "queries padded": ("mask[bi]", lambda p: p[:, None, :, None].expand(2, 1, N, N), PAD),
    "dense": ("mask[ij]", lambda m: m, PAD.repeat(4, 1)),
    "dense with heads": ("mask[bhij]", lambda m: m, torch.rand(2, 2, N, N) > 0.5),
}


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_masks_that_read_tensors(name: str) -> None:
    expected, make, tensor = WITH_TENSORS[name]
    assert text(make, tensor) == expected
    formula, _, scope, term = read(make, tensor)
    leaves = [n for n in masks_leaves(term.expr) if n.op == "input"]
    grid = Grid(scope.space, Evaluator({str(n.attrs[0]): tensor for n in leaves}))
    assert torch.equal(grid.formula(formula), grid.term(term))


def masks_leaves(root: Expr) -> list[Expr]:
    return [n for n in walk(root) if not n.args]


# ---------------------------------------------------------------------------------------- generated masks

offsets = st.integers(-4, 4)


@st.composite
def visibilities(draw: st.DrawFn, depth: int = 2) -> Callable[[Tensor, Tensor], Tensor]:
    """A random boolean function of two position tensors."""
    if depth and draw(st.booleans()):
        a, b = draw(visibilities(depth=depth - 1)), draw(visibilities(depth=depth - 1))
        kind = draw(st.sampled_from(["and", "or", "not", "xor", "where"]))
        return lambda i, j: combined(kind, a(i, j), b(i, j), i, j)
    c, m = draw(offsets), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne", "abs", "block", "mod", "key", "scaled"]))
    return lambda i, j: simple(kind, i, j, c, m)


def combined(kind: str, a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    match kind:
        case "and":
            return a & b
        case "or":
            return a | b
        case "not":
            return ~a
        case "xor":
            return torch.logical_xor(a, b)
    return torch.where(a, b, j <= i)


def simple(kind: str, i: Tensor, j: Tensor, c: int, m: int) -> Tensor:
    table: dict[str, Callable[[], Tensor]] = {
        "le": lambda: j <= i + c,
        "lt": lambda: j - i < c,
        "ge": lambda: j >= i + c,
        "gt": lambda: i - j > c,
        "eq": lambda: j - c == i,
        "ne": lambda: j + c != i,
        "abs": lambda: (i - j).abs() <= m,
        "block": lambda: i // m == j // m,
        "mod": lambda: (i - j) % m == 0,
        "key": lambda: (j < m) & (i > -1),
        "scaled": lambda: m * i - j * m >= c,
    }
    return table[kind]()


@settings(max_examples=40)
@given(visibilities(), st.integers(1, 5), st.integers(1, 6))
def test_the_formula_of_a_generated_mask_is_the_mask(
    make: Callable[..., Tensor], queries: int, keys: int
) -> None:
    def mask() -> Tensor:
        i, j = ij(queries, keys)
        return make(i, j).expand(queries, keys)

    formula, _, scope, term = read(mask)
    grid = Grid(scope.space, Evaluator({}))
    assert torch.equal(grid.formula(formula), grid.term(term))
    assert torch.equal(grid.evaluate(term.expr), mask())


# ---------------------------------------------------------------------------------------- rows that see a key


@given(
    st.lists(st.builds(Band, st.none() | offsets, st.none() | offsets), max_size=3),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_rows_are_said_to_see_a_key_only_where_they_do(bands: list[Band], queries: int, keys: int) -> None:
    scope = Scope(AxisSpace(Facts()))
    i, j = ij(queries, keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for band in bands:
        seen &= (j - i >= -int(band.left)) if band.left is not None else True
        seen &= (j - i <= int(band.right)) if band.right is not None else True
    said = every_row_sees(list[Atom](bands), queries, keys, scope)
    assert not said or bool(seen.any(1).all())
    if (
        all((b.left is None or int(b.left) >= 0) and (b.right is None or int(b.right) >= 0) for b in bands)
        and keys >= queries
    ):
        assert said, "bands that hold the diagonal"


@pytest.mark.parametrize("atom", [KeyPadding(), Dense("ij")])
def test_nothing_is_said_of_masks_that_depend_on_tensors(atom: Atom) -> None:
    assert not every_row_sees([atom], 4, 4, Scope(AxisSpace(Facts())))
    assert every_row_sees([], 4, 4, Scope(AxisSpace(Facts())))


def test_symbolic_rows() -> None:
    import sympy

    s = sympy.Symbol("s", integer=True, positive=True)
    scope = Scope(AxisSpace(Facts()))
    assert every_row_sees([Band(None, 0)], s, s, scope)
    assert every_row_sees([Band(3, 0)], s, s, scope)
    assert not every_row_sees([Band(3, 0)], 2 * s, s, scope)
    assert not every_row_sees([Band(None, -1)], s, s, scope)


# ---------------------------------------------------------------------------------------- whole programs

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill -inf": lambda s, m: s.masked_fill(~m, -INF),
    "masked_fill lowest": lambda s, m: s.masked_fill(~m, LOWEST),
    "masked_fill equals zero": lambda s, m: s.masked_fill(m == 0, -1e9),
    "where": lambda s, m: torch.where(m, s, -INF),
    "where tensor": lambda s, m: torch.where(m, s, torch.tensor(LOWEST)),
    "where inverted": lambda s, m: torch.where(~m, torch.full_like(s, -INF), s),
    "added": lambda s, m: s + torch.zeros(m.shape).masked_fill(~m, -INF),
    "added where": lambda s, m: torch.where(m, 0.0, LOWEST) + s,
    "added product": lambda s, m: s + (1.0 - m.float()) * LOWEST,
    "subtracted": lambda s, m: s - (1.0 - m.to(s.dtype)) * 1e9,
    "multiplied and added": lambda s, m: s * m - 1e10 * (1 - m.float()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["causal", "window(2)", "causal & key padding"])
def test_a_mask_means_the_same_in_every_form(form: str, kind: str) -> None:
    q, k, v = qkv(Q=N, D=4)

    def visible(p: Tensor) -> Tensor:
        i, j = ij()
        m = j <= i
        if kind == "window(2)":
            return m & (i - j < 3)
        return m & p[:, None, None] if "padding" in kind else m

    def program(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * 0.5
        return FORMS[form](scores, visible(p)).softmax(-1) @ v

    seen = agrees(program, q, k, v, PAD)
    assert [kind in site.spec and site.fused for site in seen.sites] == [True], seen.sites


EMPTY_ROWS = list(
    itertools.product(
        ["masked_fill -inf", "masked_fill lowest", "added", "added where"], ["reference", "auto"]
    )
)


@pytest.mark.parametrize(("form", "kernel"), EMPTY_ROWS)
def test_rows_that_see_no_key_are_eagers(form: str, kernel: str) -> None:
    q, k, v = qkv(Q=N, D=4)
    pad = torch.tensor([[True] * N, [False] * N])

    def strictly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = ij()
        return FORMS[form](q @ k.mT, j < i).softmax(-1) @ v

    def padded(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return FORMS[form](q @ k.mT, p[:, None, None]).softmax(-1) @ v

    agrees(strictly, q, k, v, kernel=kernel)
    agrees(padded, q, k, v, pad, kernel=kernel)


TWO_MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "both added": lambda s, a, b: s + torch.where(a, 0.0, LOWEST).to(s) + torch.where(b, 0.0, LOWEST).to(s),
    "-inf, then lowest": lambda s, a, b: s.masked_fill(~a, -INF).masked_fill(~b, LOWEST),
    "lowest, then -inf": lambda s, a, b: s.masked_fill(~a, LOWEST).masked_fill(~b, -INF),
    "filled, then added": lambda s, a, b: s.masked_fill(~a, LOWEST) + torch.where(b, 0.0, LOWEST).to(s),
    "same fill twice": lambda s, a, b: s.masked_fill(~a, LOWEST).masked_fill(~b, LOWEST),
    "two fills": lambda s, a, b: s.masked_fill(~a, -1e9).masked_fill(~b, LOWEST),
}


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("form", TWO_MASKS)
def test_rows_that_see_no_key_under_two_masks_are_eagers(form: str, kernel: str) -> None:
    pad = torch.tensor([[False] * N, [True] * 3 + [False] * 5])

    def program(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        i, j = ij()
        return TWO_MASKS[form](q @ k.mT, p[:, None, None], j < i).softmax(-1) @ v

    agrees(program, *qkv(Q=N, D=4), pad, kernel=kernel)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("form", ["masked_fill lowest", "added where", "added product"])
def test_gradients_of_rows_that_see_no_key_are_eagers(form: str, kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = ij()
        return FORMS[form](q @ k.mT, j < i).softmax(-1) @ v

    args = qkv(Q=N, D=4)
    mine, theirs = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    compiled(program, *mine, kernel=kernel)[0].square().sum().backward()
    program(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
