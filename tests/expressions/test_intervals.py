"""Bounds of expressions: computed values lie within them, and biases are judged by them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusepass.expressions.contents import FILL, Contents
from fusepass.expressions.index import Facts
from fusepass.expressions.intervals import WIDEST, Ranges, is_ordinary, range_of
from fusepass.expressions.ir import Expr, const, expr, leaf, pointwise
from fusepass.patterns import masks
from tests.capture import meaning
from tests.exact import Exact

INF, NAN = math.inf, math.nan
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    3.0,
    -2.0,
    7.0,
    1e-30,
    100.0,
    -1000.0,
    6e4,
    1e8,
    -1e9,
    3e38,
    INF,
    -INF,
    NAN,
]
UNARY = "neg abs exp exp2 log tanh sqrt rsqrt sigmoid erf expm1 log1p relu nan_to_num cast isnan not".split()
BINARY = "add sub mul div floordiv mod pow max min lt eq where".split()
N = 4


def applied(op: str, args: list[Expr], dtype: torch.dtype) -> Expr:
    """A node with the dtype that PyTorch would give it."""
    x, y = args[0], args[-1]
    bits = pointwise("lt", x, y)
    if op in ("lt", "eq", "isnan"):
        return pointwise(op, *(args if op != "isnan" else args[:1]))
    if op == "not":
        return pointwise(op, x)
    if op == "cast":
        return expr("cast", (x,), (dtype,), x.shape, dtype)
    if op in BINARY:
        both = torch.promote_types(x.dtype, y.dtype)
        both = torch.int64 if both is torch.bool else both
        both = torch.float32 if op == "div" and not both.is_floating_point else both
        return (
            pointwise("where", bits, x, y, dtype=both) if op == "where" else pointwise(op, x, y, dtype=both)
        )
    wide = x.dtype if x.is_float else torch.float32
    if op in ("neg", "abs", "relu") and x.dtype is not torch.bool:
        return pointwise(op, x, dtype=x.dtype)
    if op == "nan_to_num":
        x = x if x.is_float else expr("cast", (x,), (wide,), x.shape, wide)
        return expr(op, (x,), (0.5, -3.0, 2.0), x.shape, x.dtype)
    return pointwise(op, x, dtype=wide)


def reduced(op: str, x: Expr) -> Expr:
    if op in ("softmax", "logsumexp", "log_softmax") and not x.is_float:
        return x
    if op in ("softmax", "log_softmax", "cumsum"):
        dtype = x.dtype if x.is_float else torch.int64
        return expr(op, (x,), (0,), x.shape, dtype) if x.rank else x
    dtype = x.dtype if x.is_float or op != "sum" else torch.int64
    return expr(op, (x,), ((0,),), (1,) * x.rank, dtype) if x.rank else x


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Expr, Contents, dict[str, Tensor]]:
    """An expression over tables, positions, constants and given integers, with values for its leaves."""
    tables: dict[Expr, Tensor] = {}
    nodes: list[Expr] = []
    inputs: dict[str, Tensor] = {}
    for n in range(2):
        dtype = draw(st.sampled_from(FLOATS))
        held = torch.tensor(draw(st.lists(st.sampled_from(NUMBERS[:-3]), min_size=N, max_size=N))).to(dtype)
        nodes.append(leaf(f"t{n}", (N,), dtype))
        tables[nodes[-1]] = inputs[f"t{n}"] = held
    kind = draw(st.sampled_from(INTEGERS))
    nodes.append(leaf("n", (N,), kind))
    inputs["n"] = torch.tensor(draw(st.lists(st.integers(-300, 300), min_size=N, max_size=N))).to(kind)
    nodes.append(expr("iota", (), (draw(st.integers(-3, 3)), draw(st.integers(-2, 2))), (N,), torch.int64))
    nodes.append(const(draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(FLOATS[:2]))))
    nodes.append(const(draw(st.integers(-3, 300)), torch.int64))
    for _ in range(draw(st.integers(1, 5))):
        op = draw(
            st.sampled_from([*UNARY, *BINARY, *BINARY, "sum", "amax", "cumsum", "softmax", "logsumexp"])
        )
        args = [nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2)]
        if op in UNARY or op in BINARY:
            nodes.append(applied(op, args, draw(st.sampled_from([*FLOATS, *INTEGERS]))))
        else:
            nodes.append(reduced(op, args[0]))
    return nodes[-1], Contents(tables), inputs


@settings(max_examples=1500)
@given(expressions())
def test_what_is_computed_lies_within_the_bounds(drawn: tuple[Expr, Contents, dict[str, Tensor]]) -> None:
    node, contents, inputs = drawn
    bounds = range_of(node, contents, Facts())
    try:
        value = Exact(inputs)(node).double()
    except RuntimeError:
        return  # a division by the integer zero, a negative power of an integer
    if bounds is not None:
        assert not value.isnan().any(), (bounds, value)
        assert float(value.min()) >= bounds[0] and float(value.max()) <= bounds[1], (bounds, value)
    if is_ordinary(node, torch.float32, contents, Facts()) and inputs["n"].abs().max() <= 64:
        assert value.isfinite().all() and float(value.abs().max()) < FILL


# ---------------------------------------------------------------------------------------- single cases

X, P = leaf("x", (4,), torch.float32), leaf("p", (4,), torch.float32)
BITS, COUNT, BYTES = (
    leaf("m", (4,), torch.bool), leaf("n", (4,), torch.int64), leaf("b", (4,), torch.uint8)
)  # fmt: skip
KNOWN = leaf("t", (4,), torch.float32)
POSITIONS = expr("iota", (), (1, 1), (4,), torch.int64)
S = sympy.Symbol("s0", integer=True, positive=True)


def contents() -> Contents:
    return Contents({KNOWN: torch.tensor([0.5, -1.0, 2.0, 0.0])}, {P})


def op(name: str, *args: Expr, dtype: torch.dtype = torch.float32) -> Expr:
    return pointwise(name, *args, dtype=dtype)


def halved(x: Expr) -> Expr:
    return expr("cast", (x,), (torch.float16,), x.shape, torch.float16)


def along(name: str, x: Expr) -> Expr:
    return expr(name, (x,), ((0,),), (1,), x.dtype)


BOUNDED: dict[str, tuple[Expr, float, float]] = {
    "a number": (const(2.5), 2.5, 2.5),
    "positions": (expr("iota", (), (1, 2), (4,), torch.int64), 1, 7),
    "positions of unknown length": (expr("iota", (), (0, 1), (S,), torch.int64), 0, WIDEST.length - 1),
    "bits": (BITS, 0, 1),
    "a comparison with anything": (op("lt", X, const(0.0), dtype=torch.bool), 0, 1),
    "bytes": (BYTES, 0, 255),
    "bytes that wrap": (op("sub", BYTES, const(1, torch.int64), dtype=torch.uint8), 0, 255),
    "integers": (COUNT, -(2.0**63), 2.0**63),
    "a learned number": (P, -FILL, FILL),
    "a known table": (KNOWN, -1, 2),
    "a clamp": (op("min", P, const(3.0)), -FILL, 3),
    "a hyperbolic tangent": (op("tanh", P), -1, 1),
    "a square": (op("mul", KNOWN, KNOWN), 0, 4.01),
    "a floor": (op("max", op("neg", KNOWN), const(0.0)), 0, 1),
    "numbers mended": (expr("nan_to_num", (X,), (0.0, -1.0, 1.0), (4,), torch.float32), -3.41e38, 3.41e38),
    "a log of zero": (op("log", op("max", KNOWN, const(0.0))), -INF, 0.7),
    "an overflow": (op("exp", P), 0, INF),
    "a narrow overflow": (halved(op("mul", KNOWN, const(1e5))), -INF, INF),
    "an inverse": (op("div", const(1.0), op("add", op("abs", KNOWN), const(1.0))), 0.33, 1.01),
    "a maximum of a sum": (along("amax", along("sum", KNOWN)), -4.01, 8.01),
    "a table of tables": (expr("index", (KNOWN, COUNT), (0,), (4,), torch.float32), -1, 2),
    "a power": (op("pow", const(2.0), op("mul", const(-2.0), POSITIONS)), 0, 0.26),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds(name: str) -> None:
    node, low, high = BOUNDED[name]
    bounds = range_of(node, contents(), Facts())
    assert bounds is not None
    assert low <= bounds[0] and bounds[1] <= high, bounds


UNBOUNDED: dict[str, Expr] = {
    "NaN": const(NAN),
    "a tensor that is not known": X,
    "its hyperbolic tangent": op("tanh", X),
    "a log of something negative": op("log", KNOWN),
    "a root of something negative": op("sqrt", KNOWN),
    "zero by zero": op("div", KNOWN, KNOWN),
    "zero times infinity": op("mul", KNOWN, const(INF)),
    "infinity less infinity": op("sub", op("exp", P), op("exp", P)),
    "a power of something negative": op("pow", KNOWN, const(0.5)),
    "a remainder by zero": op("mod", KNOWN, KNOWN),
    "a softmax of infinities": expr("softmax", (op("exp", P),), (0,), (4,), torch.float32),
    "a complex number": leaf("c", (4,), torch.complex64),
    "a product with fills": expr(
        "dot", (op("where", BITS, const(0.0), const(-INF)), X), ("a", "a", ""), (), torch.float32
    ),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_may_be_nan_has_no_bounds(name: str) -> None:
    assert range_of(UNBOUNDED[name], contents(), Facts()) is None


def test_known_tables_are_relied_upon_where_they_matter_only() -> None:
    known = contents()
    below = op("lt", KNOWN, X, dtype=torch.bool)
    assert is_ordinary(below, torch.float32, known, Facts()) and not known.consulted
    assert is_ordinary(KNOWN, torch.float32, known, Facts()) and known.consulted == {KNOWN}


def test_bounds_of_deep_expressions_are_found() -> None:
    node = P
    for _ in range(5000):
        node = op("tanh", node)
    assert range_of(node, contents(), Facts()) is not None


# ---------------------------------------------------------------------------------------- biases

H = 4
SLOPES, TABLE = nn.Parameter(torch.rand(H, 1, 1)), nn.Parameter(torch.randn(32, H))
ONES = torch.ones(2, 8, dtype=torch.long)


def distance(q: Tensor) -> Tensor:
    n = torch.arange(q.shape[-2])
    return n[None, :] - n[:, None]


def computed_slopes(q: Tensor) -> Tensor:
    return torch.pow(torch.tensor(2.0 ** (-8 / H)), torch.arange(1, H + 1, dtype=torch.int32))[:, None, None]


def buckets(q: Tensor) -> Tensor:
    """T5's: exact for small distances, logarithmic beyond."""
    far = distance(q).abs()
    log = 8 + (torch.log(far.float() / 8) / math.log(16) * 8).long()
    return torch.where(far < 8, far, log.clamp(max=15)) + (distance(q) > 0).long() * 16


Bias = Callable[[Tensor, Tensor], Tensor]
ORDINARY: dict[str, Bias] = {
    "ALiBi": lambda q, x: 2.0 ** (-8 / H * torch.arange(1, H + 1))[:, None, None] * -distance(q).abs(),
    "ALiBi by pow": lambda q, x: computed_slopes(q) * distance(q),
    "ALiBi over a padding": lambda q, x: computed_slopes(q) * ((ONES.cumsum(-1) - 1) * ONES)[:, None, None],
    "learned slopes": lambda q, x: -SLOPES * distance(q).abs(),
    "T5": lambda q, x: TABLE[buckets(q)].permute(2, 0, 1),
    "T5 by embedding": lambda q, x: nn.functional.embedding(buckets(q), TABLE).permute(2, 0, 1),
    "a clamped table": lambda q, x: TABLE[distance(q).clamp(0, 31)].permute(2, 0, 1),
    "KERPLE": lambda q, x: -torch.log(1 + 0.5 * distance(q).abs()),
    "KERPLE, learned": lambda q, x: (
        -SLOPES.clamp(min=0.01) * torch.log(1 + SLOPES.clamp(min=0.01) * distance(q).abs())
    ),
    "Swin's scale": lambda q, x: SLOPES.clamp(max=math.log(100.0)).exp() * torch.tanh(SLOPES * distance(q)),
    "Swin's bias": lambda q, x: 16 * torch.sigmoid(TABLE[distance(q).abs().clamp(max=31)].permute(2, 0, 1)),
    "a small network": lambda q, x: (
        torch.relu(distance(q).float()[..., None] @ TABLE[:1]) @ TABLE[:H]
    ).permute(2, 0, 1),
    "a small fill": lambda q, x: (1.0 - ONES[:, None, None].float()) * -1e4,
    "bits": lambda q, x: (x > 0) * -1e4,
    "sandwich": lambda q, x: torch.cumsum(SLOPES.expand(H, 8, 8), -1) / 8,
}
HIDING: dict[str, Bias] = {
    "anything": lambda q, x: x,
    "a tanh of anything": lambda q, x: torch.tanh(x),
    "the lowest number": lambda q, x: (1.0 - ONES[:, None, None].float()) * torch.finfo(q.dtype).min,
    "a log of zero": lambda q, x: SLOPES * torch.log(distance(q).abs().float()),
    "one by zero": lambda q, x: SLOPES / distance(q),
    "an exponential": lambda q, x: -torch.exp(100.0 * distance(q)) * SLOPES,
    "a fill in two steps": lambda q, x: SLOPES * (1.0 - ONES[:, None, None].float()) * -1e5 * 1e5,
    "an infinite product": lambda q, x: SLOPES * torch.full((), 1e30) * 1e30,
    "a root": lambda q, x: torch.sqrt(SLOPES) * distance(q),
    "a power of two": lambda q, x: -(2.0 ** (distance(q).abs() * 100)) * SLOPES,
    "a product of fills": lambda q, x: x @ torch.where(distance(q) > 0, -INF, 0.0),
    "an integer fill": lambda q, x: ((1 - ONES) * -(10**9)).float()[:, None, None],
    "half overflows": lambda q, x: ((1 - ONES).half() * -1e5).float()[:, None, None],
}  # fmt: skip


def hides(bias: Bias, dynamic: bool) -> bool:
    q, x = torch.randn(2, H, 8, 4), torch.randn(8, 8)
    node, reader = meaning(lambda q, x: bias(q, x) + 0.0, q, x, dynamic=dynamic)
    return masks.may_hide(node, reader.contents, reader.facts)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ORDINARY)
def test_biases_of_positions_and_learned_numbers_hide_nothing(name: str, dynamic: bool) -> None:
    assert not hides(ORDINARY[name], dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", HIDING)
def test_biases_that_may_hold_fills_are_noticed(name: str, dynamic: bool) -> None:
    assert hides(HIDING[name], dynamic)


def test_integers_within_known_bounds_are_looked_at_once_they_are_relied_upon() -> None:
    table = leaf("i", (2,), torch.int64)
    known = Contents({table: torch.tensor([3, 5])})
    assert Ranges(known, Facts()).of(table) == (-(2.0**63), float(2**63 - 1))
    known.consulted.add(table)
    assert Ranges(known, Facts()).of(table) == (3.0, 5.0)


def test_a_sigmoid_may_underflow_to_zero() -> None:
    low = pointwise("sigmoid", leaf("n", (4,), torch.int8), dtype=torch.float32)
    bounds = range_of(low, Contents(), Facts())
    assert bounds is not None and bounds[0] == 0 and bounds[1] <= 1
