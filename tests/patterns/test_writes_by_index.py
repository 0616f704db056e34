"""Scores and masks that are written to by index: with ranges, triangles, data and boolean tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.expressions.index import AxisSpace, Facts
from fusepass.expressions.ir import Expr, expr
from fusepass.recognition.recognize import RULES
from fusepass.reports import collector
from fusepass.rules.engine import Scope, Term
from fusepass.rules.formulas import Formulas
from tests import checking
from tests.capture import agrees, meaning, qkv
from tests.evaluate import Evaluator, Grid, random_inputs

N = 8
INF = math.inf
PAIRS = torch.tensor([3, 5, 5, -1]), torch.tensor([0, 1, 1, -2])
EVERY_ROW = torch.tensor([1, 3, 3, 0, 2, 7, 1, 5])
PAD = torch.arange(N) > torch.tensor([[6], [4]])
Write = Callable[[Tensor], Any]
WRITES: dict[str, tuple[str, Write]] = {}


def writes(words: str) -> Callable[[Write], Write]:
    """Register a write to scores ``[2, 4, N, N]``, with the words of the specification."""

    def add(write: Write) -> Write:
        WRITES[write.__name__] = words, write
        return write

    return add


def at(n: int = N) -> Tensor:
    return torch.arange(n)


# ----------------------------------------------------------------------------------- indices that are known


@writes("causal")
def an_upper_triangle(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] = -INF


@writes("causal")
def a_lower_triangle_turned(s: Tensor) -> Any:
    i, j = torch.tril_indices(N, N, -1, dtype=torch.int32)
    s[..., j, i] = -INF


@writes("causal")
def a_smaller_triangle_moved(s: Tensor) -> Any:
    i, j = torch.triu_indices(N - 1, N - 1)
    s[..., i, j + 1] = -INF


@writes("causal")
def out_of_place_in_the_first_dimensions(s: Tensor) -> Any:
    ij = torch.triu_indices(N, N, 1)
    return s.permute(2, 3, 0, 1).index_put((ij[0], ij[1]), torch.tensor(-INF)).permute(2, 3, 0, 1)


@writes("causal")
def in_all_dimensions(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s.index_put_((at(2)[:, None, None], at(4)[:, None], i, j), torch.tensor(-INF))


@writes("causal")
def the_same_number_everywhere(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] = torch.full((N * (N - 1) // 2,), -INF)


@writes("causal")
def added(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] -= 1e9


@writes("causal")
def beside_a_new_dimension(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[:, None, :, i, j] = -INF


@writes("causal, mask[ij]")
def a_triangle_and_then_the_diagonal(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] = -INF
    s[..., at(), at()] = -5e4


@writes("mask[ij], causal")
def the_diagonal_and_then_a_triangle(s: Tensor) -> Any:
    s[..., at(), at()] = -5e4
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] = -INF


@writes("causal+2, band(2, )")
def both_corners(s: Tensor) -> Any:
    for i, j in (torch.triu_indices(N, N, 3), torch.tril_indices(N, N, -3)):
        s[..., i, j] = -INF


@writes("mask[ij]")
def a_diagonal_beside_the_main_one(s: Tensor) -> Any:
    s[..., at()[2:], at()[:-2]] = -INF


@writes("mask[j]")
def every_second_key(s: Tensor) -> Any:
    s[..., torch.arange(1, N, 2)] = -INF


@writes("mask[j]")
def every_third_key_by_a_slice(s: Tensor) -> Any:
    s[:, at(4), :, 1::3] = -INF


@writes("mask[j]")
def the_last_keys(s: Tensor) -> Any:
    s[..., torch.arange(-3, 0)] = -INF


@writes("mask[ij]")
def a_box(s: Tensor) -> Any:
    s[..., torch.arange(2, 6)[:, None], at(3)] = -INF


@writes("mask[j]")
def index_filled(s: Tensor) -> Any:
    return s.index_fill(-1, at(3), -INF)


@writes("mask[j]")
def scattered(s: Tensor) -> Any:
    s.scatter_(-1, torch.zeros(2, 4, N, 1, dtype=torch.int64), -INF)


@writes("prefix")
def two_of_the_heads(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[:, 1:3, i, j] = -1e9


# ---------------------------------------------------------------------------------------- masks and data


@writes("causal")
def a_mask_as_an_index(s: Tensor) -> Any:
    s[:, :, torch.ones(N, N, dtype=torch.bool).triu(1)] = -INF


@writes("key padding")
def a_mask_of_keys(s: Tensor) -> Any:
    s[..., PAD[0]] = -INF


@writes("mask[ij]")
def a_mask_of_rows_at_one_key(s: Tensor) -> Any:
    s[:, :, PAD[0], 3] = -INF


@writes("key padding")
def keys_by_number(s: Tensor) -> Any:
    s[..., PAIRS[0]] = -1e9


@writes("key padding")
def keys_of_every_sequence(s: Tensor) -> Any:
    s[at(2)[:, None], :, :, torch.stack((PAIRS[0], PAIRS[1]))] = -1e9


@writes("key padding")
def index_filled_by_number(s: Tensor) -> Any:
    s.index_fill_(-1, PAIRS[0] % N, -INF)


@writes("mask[ij]")
def pairs_by_number(s: Tensor) -> Any:
    s[..., PAIRS[0], PAIRS[1]] = -1e9


@writes("mask[ij]")
def one_key_of_every_row(s: Tensor) -> Any:
    s[..., at(), EVERY_ROW] = -INF


@writes("mask[ij]")
def scattered_by_number(s: Tensor) -> Any:
    return s.scatter(-1, EVERY_ROW[:, None].expand(2, 4, N, 1), -INF)


# ---------------------------------------------------------------------------------------- lists out of step


@writes("mask[ij]")
def columns_of_two_lists(s: Tensor) -> Any:
    s[..., torch.triu_indices(N, N, 1)[0], torch.tril_indices(N, N, -1)[1]] = -1e9


@writes("mask[ij]")
def a_list_beside_a_count(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[..., at(i.shape[0]) // 4, j] = -1e9


@writes("mask[ij]")
def one_column_twice(s: Tensor) -> Any:
    i, _ = torch.triu_indices(N, N, 1)
    s[..., i, i] = -1e9


@writes("key padding")
def one_column_alone(s: Tensor) -> Any:
    s[..., torch.triu_indices(N, N, 5)[1]] = -1e9


# ---------------------------------------------------------------------------------------- through views


@writes("causal")
def turned(s: Tensor) -> Any:
    i, j = torch.tril_indices(N, N, -1)
    s.mT[..., i, j] = -INF


@writes("causal, mask[ij]")
def with_heads_folded_twice(s: Tensor) -> Any:
    flat = s.view(8, N, N)
    i, j = torch.triu_indices(N, N, 1)
    flat[:, i, j] = -INF
    flat[:, at(), at()] = -5e4


@writes("causal")
def filled_with_heads_folded(s: Tensor) -> Any:
    s.flatten(0, 1).masked_fill_(torch.ones(N, N).triu(1) == 1, -INF)


@writes("prefix")
def one_sequence(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    s[1][..., i, j] = -1e9


@writes("mask[ij]")
def a_part_twice(s: Tensor) -> Any:
    part = s[:, :, 2:]
    part.masked_fill_(PAD[0], -INF)
    part.masked_fill_(EVERY_ROW == 7, -INF)


@writes("mask[ij]")
def a_part_of_a_view(s: Tensor) -> Any:
    s.view(8, N, N)[:, 1:].mT.masked_fill_(PAD[0][:, None], -INF)


# ----------------------------------------------------------------------------------- masks that are written


@writes("causal")
def a_boolean_mask(s: Tensor) -> Any:
    seen = torch.ones(N, N, dtype=torch.bool)
    i, j = torch.triu_indices(N, N, 1)
    seen[i, j] = False
    return s.masked_fill(~seen, -INF)


@writes("causal")
def a_bias(s: Tensor) -> Any:
    i, j = torch.triu_indices(N, N, 1)
    return s + torch.zeros(N, N).index_put((i, j), torch.tensor(-1e9))


def program(name: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * 0.35
        given = WRITES[name][1](s)
        return (s if given is None else given).softmax(-1) @ v

    return attention


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", WRITES)
def test_a_number_written_by_index_is_a_mask(name: str, kernel: str) -> None:
    seen = agrees(program(name), *qkv(H=4, Q=N), kernel=kernel)
    assert [site.fused for site in seen.sites] == [True], seen.sites
    words = WRITES[name][0]
    missing = [w for w in words.split(", ") if w not in seen.sites[0].spec]
    assert not missing, seen.sites[0].spec


@pytest.mark.parametrize("name", ["an_upper_triangle", "turned", "pairs_by_number", "a_part_twice"])
def test_gradients(name: str) -> None:
    given = dict(zip("qkv", qkv(H=4, Q=N), strict=True))
    fn = program(name)
    eager = checking.call(fn, given, grads=True)
    exact = checking.call(fn, given, torch.float64, grads=True)
    got = checking.call(checking.compiled(fn, "reference"), given, grads=True)
    assert got.site.fused, got.site.reason
    checking.assert_same_accuracy(got, eager, exact)


def by_size(s: Tensor) -> None:
    n = s.shape[-1]
    i, j = torch.triu_indices(n, n, 1)
    s[..., i, j] = -INF


def by_size_in_steps(s: Tensor) -> None:
    n = s.shape[-1]
    i = torch.arange(n - 1)
    s[..., i, i + 1] = -INF
    s.flatten(0, 1)[:, i + 1, torch.arange(0, 1)] = -1e9


@pytest.mark.parametrize("write", [by_size, by_size_in_steps])
def test_sizes_that_are_not_known(write: Write) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        write(s)
        return s.softmax(-1) @ v

    seen = agrees(attention, *qkv(H=4, Q=N), dynamic=True)
    assert [site.fused for site in seen.sites] == [True], seen.sites
    assert "causal" in seen.sites[0].spec or write is by_size_in_steps


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_graph_of_unknown_sizes_is_restricted_to_the_size_that_a_triangle_is_written_for(
    inner: str,
) -> None:
    torch._dynamo.reset()
    options: Any = {"inner": inner}
    attention = program("an_upper_triangle")
    call: Any = torch.compile(attention, backend="fusepass", options=options, dynamic=True)
    for size, kind in ((N, "causal"), (N + 3, "mask[ij]"), (N, None), (N + 5, None)):
        given = [torch.randn(2, 4, size, 8) for _ in range(3)]
        with collector.collect() as seen:
            torch.testing.assert_close(call(*given), attention(*given))
        assert [site.kind for site in seen.sites] == ([] if kind is None else [kind])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        call(*(torch.randn(2, 4, N - 1, 8) for _ in range(3)))


def test_a_size_that_is_declared_dynamic_is_not_restricted() -> None:
    torch._dynamo.reset()
    options: Any = {"inner": "aot_eager"}
    attention = program("an_upper_triangle")
    call: Any = torch.compile(attention, backend="fusepass", options=options)
    given = [torch.randn(2, 4, N, 8) for _ in range(3)]
    for t in given:
        torch._dynamo.mark_dynamic(t, 2)
    with collector.collect() as seen:
        torch.testing.assert_close(call(*given), attention(*given))
    assert [site.kind for site in seen.sites] == ["mask[ij]"]


# ---------------------------------------------------------------------------------------- look-alikes


def other_numbers(s: Tensor) -> None:
    i, j = torch.triu_indices(N, N, 1)
    s[..., i, j] = torch.linspace(-9, 9, N * (N - 1) // 2)


def accumulated(s: Tensor) -> None:
    """A number that is added twice to some scores."""
    s.index_put_((at(2)[:, None, None], at(4)[:, None], *PAIRS), torch.tensor(-1e3), accumulate=True)


def a_number_that_is_learned(s: Tensor) -> None:
    s[..., at(), at()] = s.sum()


@pytest.mark.parametrize("write", [other_numbers, accumulated, a_number_that_is_learned])
def test_other_writes_stay(write: Write) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        write(s)
        return s.softmax(-1) @ v

    seen = agrees(attention, *qkv(H=4, Q=N))
    assert [site.fused for site in seen.sites] == [False], seen.sites


def test_indices_out_of_range_stay_an_error() -> None:
    """An index that is not proved to be within the scores is used as it is."""

    def attention(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        s = q @ k.mT
        s[..., i] = -INF
        return s.softmax(-1) @ v

    agrees(attention, *qkv(H=4, Q=N), torch.tensor([0, N - 1]))
    with pytest.raises(IndexError):
        agrees(attention, *qkv(H=4, Q=N), torch.tensor([0, N]))


# ---------------------------------------------------------------------------------------- the formula


def drawn(rng: random.Random, size: int) -> tuple[int, int, int]:
    """The start, step and greatest length of a range of indices of a dimension."""
    start, step = rng.randrange(size), rng.choice([1, 1, 2, -1])
    return start, step, 1 + ((size - 1 - start) // step if step > 0 else start // -step)


@pytest.mark.parametrize("seed", range(60))
def test_the_formula_of_written_elements_is_what_was_written(seed: int) -> None:
    rng = random.Random(seed)
    rows, columns, k = rng.randrange(2, 6), rng.randrange(2, 6), rng.randrange(-2, 3)

    def listed() -> tuple[Tensor, Tensor]:
        i, j = torch.triu_indices(rows, columns, k)
        return (i, j) if seed % 4 else (rows - 1 - i, j)

    (a, c, p), (b, d, q) = drawn(rng, rows), drawn(rng, columns)
    crossed = rng.random() < 0.4
    p, q = (p, q) if crossed else (min(p, q),) * 2

    def counted() -> tuple[Tensor, Tensor]:
        i, j = torch.arange(p) * c + a, torch.arange(q) * d + b
        return (i[:, None], j) if crossed else (i, j)

    def make() -> Tensor:
        x = torch.zeros(rows, columns, dtype=torch.bool)
        i, j = listed() if seed % 2 else counted()
        x[i, j] = True
        return x

    want = make()
    node, reader = meaning(make)
    scope = Scope(AxisSpace(reader.facts), views=RULES.layout)
    index = tuple(scope.space.new_axis("x", n) for n in node.shape)
    term = Term(node, index)
    formula = Formulas(scope).lift(term)
    grid = Grid(scope.space, Evaluator(random_inputs(node, 0)))
    assert torch.equal(grid.formula(formula), grid.term(term)), formula
    assert torch.equal(Evaluator(random_inputs(node, 0))(node), want)


def hit(*indices: Expr) -> Expr:
    return expr("hit", indices, (), (N, N), torch.bool)


def test_what_is_not_within_the_tensor_is_not_solved() -> None:
    """Positions that may be out of bounds stay a mask that is computed."""
    ramp = expr("iota", (), (0, 1), (N + 1,), torch.int64)
    short = expr("iota", (), (0, 1), (N,), torch.int64)
    scope = Scope(AxisSpace(Facts()), views=RULES.layout)
    index = tuple(scope.space.new_axis("x", N) for _ in range(2))
    formulas = Formulas(scope)
    assert formulas.lift(Term(hit(ramp, ramp), index)).op == "load"
    assert formulas.lift(Term(hit(short, short), index)).op == "eq"
