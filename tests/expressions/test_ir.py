"""Expressions: one object for one content, a text that reads back, errors that name the line."""

from __future__ import annotations

import gc
import math
from collections.abc import Hashable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusepass.expressions import ir
from fusepass.expressions.index import Affine, Size
from fusepass.expressions.ir import (
    Expr,
    broadcast,
    const,
    expr,
    leaf,
    parse,
    pointwise,
    scalar_of,
    to_text,
    walk,
)

S0, S1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def sample(shape: tuple[Size, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> Expr:
    return leaf("x", shape, dtype)


# ---------------------------------------------------------------------------------------- interning


def test_equal_content_is_the_same_object() -> None:
    a, b = (pointwise("add", sample(), const(1.0)) for _ in range(2))
    assert a is b
    assert pointwise("add", sample(), const(2.0)) is not a


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (const(1, torch.int64), const(True, torch.bool)),
        (const(1.0), const(1, torch.int64)),
        (const(1.0), const(1.0, torch.float64)),
        (const(0.0), const(-0.0)),
        (sample(), sample((3, 2))),
        (sample(), sample(dtype=torch.float16)),
        (leaf("x", (), torch.float32), leaf("y", (), torch.float32)),
        (expr("iota", (), (0, 1), (4,), torch.int64), expr("iota", (), (False, True), (4,), torch.int64)),
    ],
)
def test_different_content_is_another_object(one: Expr, other: Expr) -> None:
    assert one is not other


def test_constants_take_the_kind_of_their_dtype() -> None:
    assert const(2, torch.float32).attrs == (2.0,) and isinstance(const(2, torch.float32).attrs[0], float)
    assert const(2.0, torch.int64).attrs == (2,) and isinstance(const(2.0, torch.int64).attrs[0], int)
    assert const(2, torch.bool).attrs == (True,)


def test_nan_constants_are_equal() -> None:
    assert const(math.nan) is const(math.nan)


def test_unknown_operations_are_refused_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown operation 'conv'; the accepted ones are abs, .*softmax"):
        expr("conv", (sample(),), (), (2, 3))


def test_unused_nodes_are_forgotten() -> None:
    gc.collect()
    before = len(ir._table)
    kept = pointwise("exp", leaf("only here", (5,), torch.float32))
    assert len(ir._table) == before + 2
    del kept
    gc.collect()
    assert len(ir._table) == before


# ---------------------------------------------------------------------------------------- shapes and dtypes


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_broadcast_is_torchs(full: list[int], data: st.DataObject) -> None:
    shapes = []
    for _ in range(data.draw(st.integers(1, 3))):
        drop = data.draw(st.integers(0, len(full)))
        shapes.append(tuple(data.draw(st.sampled_from([1, n])) for n in full[drop:]))
    assert broadcast(*shapes) == tuple(torch.broadcast_shapes(*shapes))


def test_broadcast_of_symbols() -> None:
    assert broadcast((2, 1, S0), (S1, S0)) == (2, S1, S0)
    assert broadcast() == ()


@pytest.mark.parametrize("op", ["lt", "le", "eq", "ne", "and", "or", "isnan"])
def test_comparisons_are_boolean(op: str) -> None:
    assert pointwise(op, sample(), sample()).dtype is torch.bool


@pytest.mark.parametrize(
    "args",
    [
        (sample(dtype=torch.float16), const(2.0)),
        (sample(dtype=torch.bfloat16), sample()),
        (sample(dtype=torch.float16), leaf("n", (), torch.float32)),
        (sample(dtype=torch.float16), leaf("n", (2, 3), torch.int64)),
    ],
)
def test_result_types_are_torchs(args: tuple[Expr, ...]) -> None:
    tensors = [torch.ones([int(n) for n in a.shape], dtype=a.dtype) for a in args]
    assert pointwise("mul", *args).dtype is torch.result_type(*tensors)


def test_walk_gives_arguments_first_and_each_node_once() -> None:
    x = sample()
    shared = pointwise("exp", x)
    root = pointwise("add", pointwise("neg", shared), shared)
    order = list(walk(root))
    assert order[-1] is root and len(order) == len(set(order)) == 4
    assert all(order.index(a) < order.index(node) for node in order for a in node.args)


def test_walk_does_not_recurse() -> None:
    x = sample()
    for _ in range(5000):
        x = pointwise("neg", x)
    assert sum(1 for _ in walk(x)) == 5001


def test_scalar_of_sees_through_views_and_casts_of_constants_only() -> None:
    value = expr("expand", (const(3.0),), (), (2, 3), torch.float32)
    assert scalar_of(value) == 3.0
    assert scalar_of(expr("reshape", (value,), (), (6,), torch.float32)) == 3.0
    assert scalar_of(sample()) is None
    assert scalar_of(pointwise("cast", sample(), dtype=torch.float64)) is None


# ---------------------------------------------------------------------------------------- text

sizes = st.one_of(st.integers(1, 64), st.sampled_from([S0, S1, S0 + 1, 2 * S0, S0 * S1, S0 - 1]))
shapes = st.lists(sizes, max_size=4).map(tuple)
dtypes = st.sampled_from(list(ir.DTYPES.values()))
names = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
numbers = st.one_of(
    st.builds(
        const, st.floats(allow_nan=False), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    ),
    st.builds(const, st.integers(-(2**40), 2**40), st.just(torch.int64)),
    st.builds(const, st.booleans(), st.just(torch.bool)),
)
leaves = st.one_of(
    st.builds(leaf, names, shapes, dtypes),
    numbers,
    st.builds(lambda a, b, n: expr("iota", (), (a, b), (n,), torch.int64), sizes, sizes, sizes),
)


def _grown(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def node(
        op: str, args: list[Expr], attrs: tuple[Hashable, ...], shape: tuple[Size, ...], dtype: Any
    ) -> Expr:
        return expr(op, tuple(args), attrs, shape, dtype)

    few = st.lists(children, min_size=1, max_size=3)
    dims = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    number = st.integers(0, 9)
    some = st.one_of(
        st.tuples(),
        st.tuples(dims),
        st.tuples(number, number, number),
        st.just(("abmk", "abkn", "abmn")),
        st.tuples(st.floats(allow_nan=False), names),
    )
    plain = sorted(ir.OPS - ir.LEAVES - ir.SCALAR - {"cast"})
    return st.one_of(
        st.builds(node, st.sampled_from(plain), few, some, shapes, dtypes),
        st.builds(lambda x, d: expr("cast", (x,), (d,), x.shape, d), children, dtypes),
    )


expressions = st.recursive(leaves, _grown, max_leaves=12)


@given(expressions)
def test_the_parser_reads_what_the_printer_writes(node: Expr) -> None:
    assert parse(to_text(node)) is node


@given(shapes.filter(bool), st.data())
def test_symbolic_attributes_read_back(shape: tuple[Size, ...], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    node = expr("slice", (leaf("x", shape, torch.float32),), (dim, data.draw(sizes), 1), shape, torch.float32)
    assert parse(to_text(node)) is node


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, -0.0, 1e-300, torch.finfo(torch.float32).min]
)
def test_unusual_constants_read_back(value: float) -> None:
    node = const(value, torch.float64)
    assert parse(to_text(node)) is node


@pytest.mark.parametrize(
    "node",
    [
        ir.affine(Affine((("x0", 1), ("x1", 3)), 5)),
        expr("load", (sample(),), (Affine((("i", 1),)), Affine()), ()),
    ],
)
def test_scalar_formulas_print_their_indices(node: Expr) -> None:
    text = to_text(node)
    assert "x0 + 3*x1 + 5" in text or "'i', '0'" in text


def test_the_text_is_one_line_a_node() -> None:
    root = pointwise("mul", leaf("q", (2, S0), torch.bfloat16), const(0.25, torch.bfloat16))
    assert to_text(root).splitlines() == [
        "%0 = input['q'] : bf16[2, s0]",
        "%1 = const[0.25] : bf16[]",
        "%2 = mul(%0, %1) : bf16[2, s0]",
    ]
    assert str(root) == to_text(root) and repr(root) == "<mul bf16[2, s0]>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no expression", "empty"]),
        ("%0 = input['x'] f32[2]", ["line 1", "expected '%n = op[attrs](args) : dtype[shape]'", "got"]),
        ("%0 = input['x'] : f32[2]\n%1 = neg(%7) : f32[2]", ["line 2", "undefined '%7'", "neg(%7)"]),
        ("%0 = input['x'] : f33[2]", ["line 1", "'f33'"]),
        ("%0 = conv['x'] : f32[2]", ["unknown operation 'conv'", "softmax"]),
    ],
)
def test_parse_errors_say_where_and_what(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"line|empty|unknown") as raised:
        parse(text)
    assert all(word in str(raised.value) for word in words), str(raised.value)
