"""Index algebra: an index expression names the element that PyTorch's view holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod

from fusepass.expressions.index import Affine, AxisSpace, Facts, Size, prod, simplify_size
from fusepass.expressions.ir import Expr, expr, leaf
from fusepass.recognition.recognize import RULES
from fusepass.rules.engine import Scope, Term
from tests.evaluate import Evaluator, Grid, value

S0, S1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def walk_down(root: Expr, space: AxisSpace) -> tuple[Term, Term]:
    """The element of ``root`` at fresh axes, and the element below its views that it names."""
    scope = Scope(space, views=RULES.layout)
    top = term = Term(root, tuple(space.new_axis("x", n) for n in root.shape))
    while (below := scope.step(term)) is not None:
        term = below
    return top, term


# ---------------------------------------------------------------------------------------- view chains


@dataclass
class Chain:
    """An expression of views, and the tensor it stands for, built together."""

    node: Expr
    value: Tensor
    steps: list[str] = field(default_factory=list)

    def push(self, op: str, value: Tensor, *attrs: Any) -> None:
        self.node = expr(op, (self.node,), attrs, tuple(value.shape), torch.int64)
        self.value = value
        self.steps.append(f"{op}{attrs} -> {tuple(value.shape)}")


def grow(chain: Chain, op: str, data: st.DataObject) -> None:
    """One random view."""
    x = chain.value
    d = data.draw(st.integers(0, x.dim() - 1)) if x.dim() else None
    if op == "reshape":
        shape = data.draw(reshapes(x.numel()))
        chain.push(op, x.reshape(shape))
    elif op == "permute":
        dims = tuple(data.draw(st.permutations(range(x.dim()))))
        chain.push(op, x.permute(dims), dims)
    elif op == "expand":
        wide = [data.draw(st.integers(1, 3)) if n == 1 else n for n in x.shape]
        chain.push(op, x.expand(wide))
    elif op == "slice" and d is not None:
        start = data.draw(st.integers(0, x.shape[d] - 1))
        step = data.draw(st.integers(1, 2))
        length = data.draw(st.integers(1, (x.shape[d] - start + step - 1) // step))
        selected = x[(slice(None),) * d + (slice(start, start + length * step, step),)]
        chain.push(op, selected, d, start, step)
    elif op == "select" and d is not None and x.dim() > 1:
        at = data.draw(st.integers(0, x.shape[d] - 1))
        chain.push(op, x.select(d, at), d, at)
    elif op == "flip":
        dims = tuple(data.draw(st.sets(st.integers(0, x.dim() - 1)))) if x.dim() else ()
        chain.push(op, x.flip(dims), dims)


def reshapes(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of a given extent."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]

    def split(sizes: list[int]) -> tuple[int, ...]:
        out, left = [], count
        for n in sizes:
            n = math.gcd(n, left)
            out.append(n)
            left //= n
        return (*out, left) if left > 1 or not out else tuple(out)

    return st.lists(st.sampled_from(divisors), max_size=4).map(split)


OPS = ["reshape", "permute", "expand", "slice", "select", "flip"]


@settings(max_examples=300)
@given(st.sampled_from([(24,), (2, 12), (4, 6), (2, 3, 4), (2, 2, 6), (8, 1, 3), (36,), (3, 5)]), st.data())
def test_an_index_through_views_names_the_element_that_torch_finds(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    base = torch.arange(math.prod(shape)).view(shape)
    chain = Chain(leaf("x", shape, torch.int64), base)
    for op in data.draw(st.lists(st.sampled_from(OPS), min_size=1, max_size=6)):
        grow(chain, op, data)
        assume(chain.value.numel() <= 500)
    space = AxisSpace(Facts())
    top, bottom = walk_down(chain.node, space)
    grid = Grid(space, Evaluator({"x": base}))
    assert torch.equal(grid.term(bottom), grid.term(top)), "\n".join(chain.steps)
    assert torch.equal(grid.evaluate(chain.node), chain.value), "\n".join(chain.steps)


@settings(max_examples=200)
@given(reshapes(48), reshapes(48), st.data())
def test_reshapes_and_permutes_of_whole_tensors_always_resolve(
    first: tuple[int, ...], second: tuple[int, ...], data: st.DataObject
) -> None:
    base = torch.arange(48).view(first)
    chain = Chain(leaf("x", first, torch.int64), base)
    grow(chain, "permute", data)
    chain.push("reshape", chain.value.reshape(second))
    space = AxisSpace(Facts())
    _, bottom = walk_down(chain.node, space)
    nested = all(
        a % b == 0 or b % a == 0
        for a, b in itertools.product(radices(chain.node.args[0].shape), radices(second))
    )
    if nested:  # every digit boundary of one side is a digit boundary of the other, or divides it
        assert bottom.expr.op == "input", "\n".join(chain.steps)


def radices(shape: tuple[Size, ...]) -> list[int]:
    """The strides of a contiguous tensor."""
    sizes = [int(n) for n in shape]
    return [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]


# ---------------------------------------------------------------------------------------- affine


coefficients = st.integers(-4, 4)
affines = st.builds(
    lambda terms, c: Affine.of(terms, c),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), coefficients, max_size=3),
    coefficients,
)


@given(affines, affines, coefficients, st.fixed_dictionaries({a: st.integers(0, 9) for a in "abc"}))
def test_affine_arithmetic(x: Affine, y: Affine, c: int, at: dict[str, int]) -> None:
    assert value(x + y, at) == value(x, at) + value(y, at)
    assert value(x - y, at) == value(x, at) - value(y, at)
    assert value(x * c, at) == value(x, at) * c
    assert value(x + c, at) == value(x, at) + c
    assert x - x == Affine() and x + y == y + x and x.is_const == (not x.terms)


def test_affine_text() -> None:
    assert str(Affine()) == "0"
    assert str(Affine((("i", 1), ("j", -2)), 3)) == "i + -2*j + 3"
    assert str(Affine((("i", S0),), S1)) == "s0*i + s1"


@given(st.integers(2, 6), st.integers(2, 6), coefficients, coefficients, coefficients)
def test_bounds_are_exact(m: int, n: int, a: int, b: int, c: int) -> None:
    space = AxisSpace(Facts())
    x, y = space.new_axis("x", m), space.new_axis("y", n)
    index = x * a + y * b + c
    values = [a * i + b * j + c for i in range(m) for j in range(n)]
    assert space.bounds(index) == (min(values), max(values))


def test_an_axis_of_size_one_is_the_constant_zero() -> None:
    space = AxisSpace(Facts())
    assert space.new_axis("x", 1) == Affine() and not space.sizes


# ---------------------------------------------------------------------------------------- splits and digits


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_split_is_a_bijection(outer: int, inner: int) -> None:
    space = AxisSpace(Facts())
    axis = space.new_axis("x", outer * inner)
    if axis.is_const or not space.split("x0", inner):
        return
    at = Grid(space, Evaluator({})).index(axis)
    assert torch.equal(at.flatten().sort().values, torch.arange(outer * inner))


def test_a_split_that_does_not_divide_is_refused() -> None:
    space = AxisSpace(Facts())
    space.new_axis("x", 10)
    assert not space.split("x0", 4) and not space.splits


def test_splits_of_splits_resolve_to_the_finest_axes() -> None:
    space = AxisSpace(Facts())
    x = space.new_axis("x", 24)
    assert space.split("x0", 6)
    low = (
        space.splits["x0"].terms[-1][0]
        if space.splits["x0"].terms[-1][1] == 1
        else space.splits["x0"].terms[0][0]
    )
    assert space.split(low, 2)
    resolved = space.resolve(x)
    assert sorted(int(c) for _, c in resolved.terms) == [1, 2, 6]
    assert not resolved.axes & set(space.splits)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 24))
def test_divmod_is_exact_where_it_answers(m: int, n: int, by: int) -> None:
    space = AxisSpace(Facts())
    x, y = space.new_axis("x", m), space.new_axis("y", n)
    flat = x * n + y
    parts = space.divmod(flat, by)
    if parts is None:
        return
    grid = Grid(space, Evaluator({}))
    total = grid.index(flat)
    assert torch.equal(grid.index(parts[0]), total // by) and torch.equal(grid.index(parts[1]), total % by)


def test_digits_name_each_element_once() -> None:
    space = AxisSpace(Facts())
    x, y = space.new_axis("x", 3), space.new_axis("y", 4)
    assert space.digits(x * 4 + y, 12) == ("x0", "y1")
    assert space.digits(y * 3 + x, 12) == ("y1", "x0")
    assert space.digits(Affine(), 1) == ()
    for index, size in [
        (x * 4 + y + 1, 13),
        (x * 5 + y, 15),
        (x * 4, 12),
        (x * 4 + y, 13),
        (x, 4),
        (Affine(), 2),
    ]:
        assert space.digits(index, size) is None, str(index)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.permutations(range(4)), st.integers(0, 1))
def test_digits_only_of_permutations(sizes: list[int], order: list[int], shift: int) -> None:
    space = AxisSpace(Facts())
    axes = [space.new_axis("x", n) for n in sizes]
    flat, stride = Affine((), shift), 1
    for d in [o for o in order if o < len(sizes)]:
        flat, stride = flat + axes[d] * stride, stride * sizes[d]
    digits = space.digits(flat, stride)
    assert (digits is not None) == (shift == 0)


# ---------------------------------------------------------------------------------------- symbolic sizes


def test_symbolic_reshapes_resolve() -> None:
    """[B, S, H*D] -> [B, S, H, D] -> [B, H, S, D] -> [B*H, S, D] and back, with symbolic B and S."""
    space = AxisSpace(Facts())
    x = leaf("x", (S0, S1, 48), torch.float32)
    parts = expr("reshape", (x,), (), (S0, S1, 4, 12), torch.float32)
    heads = expr("permute", (parts,), ((0, 2, 1, 3),), (S0, 4, S1, 12), torch.float32)
    flat = expr("reshape", (heads,), (), (4 * S0, S1, 12), torch.float32)
    _, bottom = walk_down(flat, space)
    assert bottom.expr is x
    sizes = {S0: 3, S1: 5}
    value = torch.randn(3, 5, 48, dtype=torch.float64)
    grid = Grid(space, Evaluator({"x": value}, sizes))
    expected = value.view(3, 5, 4, 12).permute(0, 2, 1, 3).reshape(12, 5, 12)
    assert torch.equal(grid.term(bottom).flatten().sort().values, value.flatten().sort().values)
    assert torch.equal(grid.evaluate(flat), expected)
    top = Term(
        flat,
        tuple(space.resolve(i) for i in (Affine((("x0", 1),)), Affine((("x1", 1),)), Affine((("x2", 1),)))),
    )
    assert torch.equal(grid.term(bottom), grid.term(top))


def test_facts_prove_and_never_guess() -> None:
    facts = Facts()
    assert (
        facts.equal(S0 * 2, S0 + S0)
        and facts.equal(4, 4)
        and not facts.equal(S0, 4)
        and not facts.equal(S0, S1)
    )
    assert facts.at_most(S0 - 1, S0) and facts.at_most(3, 4) and not facts.at_most(4, 3)
    assert facts.at_most(1, S0) and facts.at_most(0, S0 - 1), "a positive integer is at least 1"
    assert not facts.at_most(2, S0) and not facts.at_most(S0, 5) and not facts.at_most(S0, S1)
    assert facts.quotient(12, 4) == 3 and facts.quotient(10, 4) is None and facts.quotient(4 * S0, 4) == S0
    assert facts.quotient(S0 * S1, S0) == S1 and facts.quotient(S0, 2) is None and facts.quotient(S0, S0) == 1
    assert facts.quotient(7, 0) is None


def test_facts_use_what_a_shape_environment_knows_and_not_its_hints() -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = ShapeEnv()
    symbols = [
        env.create_symbol(
            7, source=ConstantSource(f"n{i}"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        for i in range(2)
    ]
    facts = Facts(env)
    a, b = symbols
    assert not facts.equal(a, 7) and not facts.equal(a, b), "both are 7 in the example alone"
    assert facts.at_most(2, a), "sizes 0 and 1 are never symbols"
    assert not facts.at_most(a, 7) and not facts.at_most(7, a)


def test_quotients_are_factors() -> None:
    """Products of numbers of blocks are split into them, whether or not the divisions are exact."""
    s, t = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "st")
    rows, columns = FloorDiv(s, 4), FloorDiv(t, 4)
    facts = Facts()
    assert facts.quotient(rows * columns, columns) == rows and facts.quotient(6 * rows, 2) == 3 * rows
    assert facts.quotient(rows, 2) is None and facts.quotient(s, rows) is None


def test_sizes_that_stay_below_a_number_are_proved_guarded_or_taken_from_the_example() -> None:
    env = ShapeEnv()
    size, other = (
        env.create_unspecified_symbol(n, ConstantSource(f"n{n}"), DimDynamic.DYNAMIC) for n in (7, 9)
    )
    facts = Facts(env, {size: 7})
    assert facts.stays_below(8, 8) and not facts.stays_below(9, 8)
    assert facts.example(size * other) == 63 and facts.example(5) == 5
    assert not facts.stays_below(size, 6) and not facts.stays_below(other, 8)
    assert not env.guards
    assert facts.stays_below(other, 9) and not env.guards, "its example alone tells"
    assert facts.stays_below(size, 8) and len(env.guards) == 1 and facts.at_most(size, 8)
    assert facts.stays_below(size, 8) and len(env.guards) == 1


def test_sizes() -> None:
    assert simplify_size(sympy.Integer(3)) == 3 and isinstance(simplify_size(sympy.Integer(3)), int)
    assert prod([]) == 1 and prod([2, 3]) == 6 and prod([2, S0]) == 2 * S0


@pytest.mark.parametrize("hint", [2, 7])
def test_symbolic_divmod_of_two_axes(hint: int) -> None:
    space = AxisSpace(Facts())
    b, h = space.new_axis("b", S0), space.new_axis("h", 4)
    parts = space.divmod(b * 4 + h, 4)
    assert parts is not None and parts == (b, h)
    grid = Grid(space, Evaluator({}, {S0: hint}))
    assert torch.equal(grid.index(parts[0]), grid.index(b * 4 + h) // 4)


def test_guards_prove_exact_divisions_and_numbers() -> None:
    """Guards are what a program's views have required; the example's sizes prove nothing."""
    env = ShapeEnv()
    size, other = (
        env.create_unspecified_symbol(n, ConstantSource(f"size{n}"), DimDynamic.DYNAMIC) for n in (9, 12)
    )
    third = FloorDiv(size, 3)
    facts = Facts(env)
    assert not facts.equal(size, 3 * third) and facts.quotient(size, third) is None
    assert env.evaluate_expr(sympy.Eq(Mod(size, 3), 0)) == True  # noqa: E712
    facts = Facts(env)
    assert facts.equal(size, 3 * third) and facts.quotient(size, third) == 3
    assert not facts.equal(size, 9) and not facts.equal(other, 3 * FloorDiv(other, 3))
    assert env.evaluate_expr(sympy.Eq(third, 3)) == True  # noqa: E712
    assert facts.equal(size, 9) and facts.settled(third) == 3 and facts.at_most(size, 9)
    assert not facts.equal(other, 12) and not facts.at_most(other, 12)


def test_ratios_are_compared_as_integers() -> None:
    """PyTorch does not evaluate negative powers: a claim about ratios becomes one about their numerators."""
    env = ShapeEnv()
    size, part = (
        env.create_symbol(
            n, source=ConstantSource(f"size{n}"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        for n in (12, 4)
    )
    facts = Facts(env)
    assert facts.at_most(size / part, 2 * size / part) and not facts.at_most(size, size / part)
    assert facts.equal(size / part, size * part / part**2) and not facts.equal(size / part, 3)
