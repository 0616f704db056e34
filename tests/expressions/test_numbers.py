"""Numbers have dtypes: constants, casts and computations on them agree with PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusepass.expressions import arithmetic
from fusepass.expressions.contents import Contents, Ramp, Uniform, describe
from fusepass.expressions.index import AxisSpace, Facts
from fusepass.expressions.ir import Expr, cast, const, expr, leaf, parse, pointwise, scalar_of, to_text, walk
from fusepass.patterns.terms import number
from fusepass.recognition.recognize import RULES
from fusepass.reports import collector
from fusepass.rules.engine import Scope, Term
from fusepass.rules.formulas import FALSE, TRUE, Formulas
from tests import checking
from tests.capture import agrees, compiled, meaning, qkv
from tests.evaluate import UNARY, Grid
from tests.exact import OPERATIONS, Exact, Loose

INF, NAN = math.inf, math.nan
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
AWKWARD = [
    0.0,
    -0.0,
    0.1,
    -0.1,
    0.5,
    1.0,
    2.9,
    -2.9,
    3.0,
    255.0,
    258.0,
    2049.0,
    65504.0,
    65519.0,
    65520.0,
    1e9,
]
AWKWARD += [-1e9, 3.4028234e38, 3.4028236e38, 1e39, 1e-46, 6e-8, 5e-324, INF, -INF, NAN]
WHOLE = [0, 1, -1, 2, 127, 128, 255, 256, 258, -129, 2**24 + 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1]


def same(a: Any, b: Any) -> bool:
    """The same number of the same type, NaN and the sign of zero included."""
    return type(a) is type(b) and repr(a) == repr(b)


def meant(value: Any, dtype: torch.dtype) -> Any:
    kind = torch.float64 if isinstance(value, float) else torch.bool if value is True else torch.int64
    return torch.tensor(value, dtype=kind).to(dtype).item()


def defined(value: Any, dtype: torch.dtype) -> bool:
    """Does PyTorch define the number in a dtype?"""
    if not isinstance(value, float) or not arithmetic.is_integer(dtype):
        return True
    info = torch.iinfo(dtype)
    return math.isfinite(value) and info.min <= math.trunc(value) <= info.max


# ---------------------------------------------------------------------------------------- constants


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [*AWKWARD, *WHOLE, True, False], ids=repr)
def test_a_constant_is_what_its_dtype_holds(value: Any, dtype: torch.dtype) -> None:
    constant = const(value, dtype)
    assert constant.dtype is dtype and constant.shape == ()
    if defined(value, dtype):
        assert same(scalar_of(constant), meant(value, dtype))
        assert same(scalar_of(cast(const(value, torch.float64), dtype)), meant(float(value), dtype)) or (
            not defined(float(value), dtype) or isinstance(value, int)
        )
    else:
        assert constant.op == "cast" and scalar_of(constant) is None


@settings(max_examples=300)
@given(st.floats(), st.sampled_from(FLOATS))
def test_floats_round_as_in_pytorch(value: float, dtype: torch.dtype) -> None:
    assert same(scalar_of(const(value, dtype)), meant(value, dtype))


@settings(max_examples=300)
@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([*FLOATS, *INTEGERS]))
def test_integers_wrap_and_round_as_in_pytorch(value: int, dtype: torch.dtype) -> None:
    assert same(scalar_of(const(value, dtype)), meant(value, dtype))


@settings(max_examples=200)
@given(st.sampled_from([*AWKWARD, *WHOLE]), st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
def test_a_chain_of_casts_is_looked_through_one_by_one(value: Any, dtypes: list[torch.dtype]) -> None:
    value = meant(value, torch.float32)
    node, tensor, known = const(value, torch.float32), torch.tensor(value, dtype=torch.float32), True
    node = expr("expand", (node,), (), (2, 3), node.dtype)
    for dtype in dtypes:
        known = known and defined(tensor.item(), dtype)
        node, tensor = expr("cast", (node,), (dtype,), node.shape, dtype), tensor.to(dtype)
    assert same(scalar_of(node), tensor.item() if known else None)
    assert number(node, Scope(AxisSpace(Facts()))) is not None or not known


def test_what_has_no_meaning_stays_a_cast() -> None:
    for value, dtype in itertools.product([NAN, INF, 1e30], INTEGERS):
        assert to_text(const(value, dtype)).splitlines()[-1].startswith("%1 = cast")
    assert parse(to_text(const(NAN, torch.int32))) is const(NAN, torch.int32)


def test_complex_numbers_are_numbers_that_nobody_takes_for_real() -> None:
    constant = const(2, torch.complex64)
    assert constant.attrs[0] == 2 + 0j and scalar_of(constant) is None
    assert const(0.5 + 1j, torch.float32).op == "cast"
    assert number(constant, Scope(AxisSpace(Facts()))) is None
    assert arithmetic.folded("add", ((1j, torch.complex64), (2.0, torch.float32)), torch.complex64) is None


class Deaf(TorchDispatchMode):
    """Fails if an operation runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is seen by the modes of others")


def test_constants_are_made_while_fake_tensors_are_traced() -> None:
    want = meant(0.37, torch.float8_e4m3fn)
    for mode in (FakeTensorMode(), Deaf()):
        with mode, torch.device("meta"):
            assert scalar_of(const(0.37, torch.float8_e4m3fn)) == want
            assert arithmetic.folded("exp", ((0.0, torch.float64),), torch.float64) == 1.0
    with FakeTensorMode(), torch.device("meta"):
        assert arithmetic.folded("exp", ((1.0, torch.float64),), torch.float64) == math.exp(1.0)


# ---------------------------------------------------------------------------------------- folding

NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.1, -2.5, 3.0, 88.0, 710.0, 1e-30, 60000.0, 3e38, -1e9, INF, -INF, NAN]
COUNTS = [0, 1, -1, 2, 3, 7, 100, 200, -100, 32767, 2**31 - 1]
ARITHMETIC = sorted({"add", "sub", "mul", "div", "floordiv", "mod", "pow", "max", "min"})
COMPARED = sorted(arithmetic.COMPARISONS)


def folded(op: str, values: list[Any], dtypes: list[torch.dtype], dtype: torch.dtype) -> Expr:
    formulas = Formulas(Scope(AxisSpace(Facts())))
    args = tuple(const(v, d) for v, d in zip(values, dtypes, strict=True))
    return formulas.make(op, args, dtype)


def eager(op: str, values: list[Any], dtypes: list[torch.dtype]) -> Tensor | None:
    """On tensors with a dimension, as graphs compute."""
    kinds = [torch.float64 if isinstance(v, float) else torch.int64 for v in values]
    tensors = [torch.tensor([v], dtype=k).to(d) for v, k, d in zip(values, kinds, dtypes, strict=True)]
    try:
        return OPERATIONS[op](*tensors)
    except RuntimeError:
        return None  # a division by the integer zero


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", sorted(UNARY))
def test_functions_of_constants(op: str, dtype: torch.dtype) -> None:
    for value in NUMBERS:
        want = eager(op, [value], [dtype])
        assert want is not None
        got = folded(op, [value], [dtype], want.dtype)
        assert got.op == "const", (op, value)
        held = torch.tensor(got.attrs[0], dtype=want.dtype)
        least = 1e-29 if op == "erf" else 0  # PyTorch's vectorised one gives zero
        torch.testing.assert_close(held, want[0], equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=least)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [*ARITHMETIC, *COMPARED])
def test_arithmetic_of_floats(op: str, dtype: torch.dtype) -> None:
    for a, b in itertools.product(NUMBERS, NUMBERS):
        want = eager(op, [a, b], [dtype, dtype])
        assert want is not None
        got = folded(op, [a, b], [dtype, dtype], want.dtype)
        assert got.op == "const", (op, a, b)
        held = torch.tensor(got.attrs[0], dtype=want.dtype)
        torch.testing.assert_close(held, want[0], equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("op", [*ARITHMETIC, *COMPARED])
def test_arithmetic_of_integers_wraps(op: str, dtype: torch.dtype) -> None:
    for a, b in itertools.product(COUNTS, COUNTS):
        want = eager(op, [a, b], [dtype, dtype])
        kind = torch.float32 if op == "div" else torch.bool if op in COMPARED else dtype
        got = folded(op, [a, b], [dtype, dtype], kind)
        if want is None:
            assert got.op != "const"
        elif op != "pow" or meant(b, dtype) >= 0:
            assert got.op == "const", (op, a, b)
            assert same(got.attrs[0], want.item()) or (math.isnan(got.attrs[0]) and bool(want.isnan()))


@pytest.mark.parametrize("op", ["and", "or", "xor", "not"])
def test_logic_of_numbers(op: str) -> None:
    for a, b in itertools.product([0, 1, 2, -1, 0.0, 0.5, NAN], repeat=2):
        values = [a] if op == "not" else [a, b]
        dtypes = [torch.float32 if isinstance(v, float) else torch.int64 for v in values]
        want = eager(op, values, dtypes)
        assert want is not None
        assert folded(op, values, dtypes, torch.bool) is (TRUE if want.item() else FALSE)


def test_numbers_meet_tensors_in_the_precision_they_are_computed_with() -> None:
    half = torch.float16
    assert folded("mul", [0.0, -1e9], [half, torch.float32], half).attrs[0] == 0.0
    assert folded("mul", [1.0, -1e9], [half, torch.float32], half).attrs[0] == -INF
    assert folded("mul", [3.0, 0.1], [half, torch.float32], half).attrs[0] == (
        torch.tensor([3.0], dtype=half) * 0.1
    )
    assert folded("eq", [0.1, 0.1], [half, torch.float32], torch.bool).op == "eq"  # devices differ
    assert folded("lt", [0.1, 0.2], [half, torch.float32], torch.bool) is TRUE
    assert folded("sub", [0.1, 0.1], [half, torch.float32], half).op == "sub"
    assert folded("sub", [1.0, 0.5], [half, torch.float32], half).attrs[0] == 0.5
    assert folded("sub", [INF, 1e9], [half, torch.float32], half).op == "sub"


# ---------------------------------------------------------------------------------------- programs of numbers

Program = Callable[[Tensor, Tensor], Tensor]
KINDS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float16]
PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "max": torch.maximum, "where": lambda a, b: torch.where(a > b, a, b),
    "under": lambda a, b: torch.where(a == 0, b + a, b),
}  # fmt: skip
SINGLE: dict[str, Callable[[Any], Any]] = {
    "neg": lambda a: -a, "abs": lambda a: a.abs(), "half": lambda a: a // 2, "mod": lambda a: a % 3,
    "wide": lambda a: a // 258, "rest": lambda a: a % 300,
    "more": lambda a: a + 250, "less": lambda a: a - 1, "many": lambda a: a * 1000,
    "bool": lambda a: a.bool(),
    "small": lambda a: a < 3, "large": lambda a: a > 255, "tril": lambda a: a.expand(5, 5).tril(),
    **{f"to {d}": partial(torch.Tensor.to, dtype=d) for d in KINDS},
}  # fmt: skip


def drawn(data: st.DataObject) -> Callable[[], Tensor]:
    """A program of a few steps over positions."""
    leaves = data.draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=2))
    steps = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(sorted(SINGLE)), st.integers(0, 9), st.just(0)),
                st.tuples(st.sampled_from(sorted(PAIRS)), st.integers(0, 9), st.integers(0, 9)),
            ),
            min_size=1,
            max_size=5,
        )
    )

    def program() -> Tensor:
        tensors = [torch.arange(5).to(leaves[0])[:, None], torch.arange(5).to(leaves[1])[None, :]]
        for name, a, b in steps:
            x, y = tensors[a % len(tensors)], tensors[b % len(tensors)]
            if name in SINGLE:
                tensors.append(
                    SINGLE[name](x) if x.dtype is not torch.bool or name == "tril" else x.logical_not()
                )
            else:
                y = y.to(x.dtype) if name == "max" or torch.bool in (x.dtype, y.dtype) else y
                bits = x.dtype is torch.bool
                tensors.append(x.logical_and(y) if bits else PAIRS[name](x, y))
        return tensors[-1].expand(5, 5)

    return program


FAR = 2**24
BYTE, SHORT = torch.uint8, torch.int16
EDGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "integers compared as floats": lambda i, j: (i + FAR) > float(FAR) + 0 * j,
    "an integer compared with a float": lambda i, j: ((i + FAR) > float(FAR)) & (j >= 0),
    "integers rounded to half": lambda i, j: (i + 2049) + j.half(),
    "halves that round": lambda i, j: (i + 1024).half() + (j + 1024).half(),
    "a number times a half": lambda i, j: (i.half() * 2049.3) - j,
    "a float beyond exactness": lambda i, j: (i + FAR).float() - j,
    "bytes of bytes": lambda i, j: (((i.to(BYTE) - 1) + j.to(BYTE)) * 3 - 300) // 7,
    "bytes that are compared": lambda i, j: (i.to(BYTE) - 1) + j.to(BYTE) > 200,
    "bytes by a wide number": lambda i, j: i.to(BYTE) // 258 + j.to(BYTE) % 257,
    "negated bytes": lambda i, j: (-(i.to(BYTE) + j)).to(BYTE) // 2,
    "a distance of bytes": lambda i, j: (i.to(BYTE) - j.to(BYTE)).abs() + 0 * j.to(BYTE),
    "shorts": lambda i, j: (i * 10000).to(SHORT) * 3 + j.to(SHORT),
    "integers": lambda i, j: (i * 10**9).int() * 3 + j.int(),
    "words": lambda i, j: (i.int() * 10**9) * 3 + j.int(),
    "floored floats": lambda i, j: (i.float() - 2.5) // 0.7 + j,
    "a remainder of floats": lambda i, j: (i.float() - 2.5) % -0.7 + j,
    "bits as numbers": lambda i, j: (i > j).to(BYTE) - 2,
    "a choice among bytes": lambda i, j: torch.where(i > j, i.to(BYTE), 250) + 10,
}


@pytest.mark.parametrize("name", EDGES)
def test_the_formula_at_the_edges_of_dtypes(name: str) -> None:
    check(lambda: EDGES[name](torch.arange(5)[:, None], torch.arange(5)[None, :]))


@settings(max_examples=150)
@given(st.data())
def test_the_formula_of_a_program_of_numbers_is_the_program(data: st.DataObject) -> None:
    check(drawn(data))


def check(program: Callable[[], Tensor]) -> None:
    """The expression and the formula of a program give eager's result."""
    node, reader = meaning(program)
    scope = Scope(AxisSpace(reader.facts), views=RULES.layout)
    term = Term(node, tuple(scope.space.new_axis("x", n) for n in node.shape))
    formula = Formulas(scope).lift(term)
    want = program()
    torch.testing.assert_close(Exact({})(node).to(want.dtype), want, rtol=0, atol=0)
    for evaluate in (Exact({}), Loose({})):
        got = Grid(scope.space, evaluate).formula(formula)
        exact = isinstance(evaluate, Exact) and not isinstance(evaluate, Loose)
        if exact or not any(n.is_float for n in walk(formula)):  # kernels round less
            torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- formulas


def scoped(**sizes: int) -> tuple[Formulas, dict[str, Any]]:
    scope = Scope(AxisSpace(Facts()))
    return Formulas(scope), {name: scope.space.new_axis(name, n) for name, n in sizes.items()}


def test_a_product_with_bits_is_a_choice_of_finite_numbers_only() -> None:
    formulas, axes = scoped(i=4)
    x = leaf("x", (4,), torch.float32)
    bits = expr("load", (leaf("m", (4,), torch.bool),), (axes["i"],), (), torch.bool)
    kept = formulas.make("cast", (bits,), torch.float32)
    element = expr("load", (x,), (axes["i"],), (), torch.float32)
    assert formulas.make("mul", (kept, element), torch.float32).op == "mul"
    formulas.scope.contents.ordinary.add(x)
    assert Formulas(formulas.scope).make("mul", (kept, element), torch.float32).op == "where"
    finite = formulas.make("nan_to_num", (element,), torch.float32, (0.0, -1.0, 1.0))
    assert (
        formulas.make("mul", (kept, formulas.make("tanh", (finite,), torch.float32)), torch.float32).op
        == "where"
    )


def test_a_pinned_zero_is_not_put_where_its_sign_matters() -> None:
    formulas, axes = scoped(i=4)
    x = expr("load", (leaf("x", (4,), torch.float32),), (axes["i"],), (), torch.float32)
    zero = formulas.make("eq", (x, const(0.0)), torch.bool)
    for op in ("rsqrt", "sqrt", "neg"):
        inside = formulas.make("div", (const(1.0), formulas.make(op, (x,), torch.float32)), torch.float32)
        assert formulas.make("where", (zero, inside, x), torch.float32).args[1] is inside
    rsqrt = formulas.make("rsqrt", (x,), torch.float32)
    assert formulas.make("where", (zero, rsqrt, x), torch.float32).args[1] is rsqrt
    plain = formulas.make("add", (x, const(1.0)), torch.float32)
    assert formulas.make("where", (zero, plain, x), torch.float32).args[1] is const(1.0)


def test_a_rounded_comparison_pins_nothing() -> None:
    formulas, axes = scoped(i=4)
    n = expr("load", (leaf("n", (4,), torch.int64),), (axes["i"],), (), torch.int64)
    same_float = formulas.make("eq", (n, const(float(2**24))), torch.bool)  # 2**24 + 1 is equal too
    assert (
        formulas.make("where", (same_float, formulas.make("neg", (n,), torch.int64), n), torch.int64)
        .args[1]
        .op
        == "neg"
    )
    whole = formulas.make("eq", (n, const(5, torch.int64)), torch.bool)
    assert formulas.make("where", (whole, formulas.make("neg", (n,), torch.int64), n), torch.int64).args[
        1
    ].attrs == (-5,)


def test_bits_are_compared_with_one_and_with_nothing_else() -> None:
    formulas, axes = scoped(i=4)
    bit = expr("load", (leaf("m", (4,), torch.bool),), (axes["i"],), (), torch.bool)
    n = expr("load", (leaf("n", (4,), torch.int64),), (axes["i"],), (), torch.int64)
    assert formulas.make("eq", (bit, const(1, torch.int64)), torch.bool) is bit
    assert formulas.make("eq", (bit, const(2, torch.int64)), torch.bool) is FALSE
    assert formulas.make("ne", (bit, const(-1, torch.int64)), torch.bool) is TRUE
    assert formulas.make("eq", (n, const(True, torch.bool)), torch.bool).op == "eq"  # 3 is not 1
    assert formulas.make("eq", (n, const(False, torch.bool)), torch.bool).op == "not"


# ---------------------------------------------------------------------------------------- programs

M, V = torch.tensor([True, True, False, True])[:, None], [True, False, True, True]
PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "three as a bool": lambda s: s * torch.full((6, 1), 3.0).bool(),
    "a fraction as an integer": lambda s: s / torch.full((6, 1), 2.9).int(),
    "an integer as a byte": lambda s: s * torch.full((6, 1), 258).to(torch.uint8),
    "minus one as a byte": lambda s: s / torch.full((), -1).to(torch.uint8),
    "a tenth as half": lambda s: s * torch.full((), 0.1).half(),
    "a tenth as bfloat16": lambda s: s / torch.full((6, 1), 0.1).bfloat16().float(),
    "large as half": lambda s: (s / torch.full((), 1e9).half()) + s,
    "a number as fp8": lambda s: s * torch.full((), 0.3).to(torch.float8_e4m3fn).float(),
    "bytes below zero": lambda s: s.masked_fill((torch.ones(6, 6, dtype=torch.uint8).tril() - 1) > 0, -INF),
    "bytes around zero": lambda s: s.masked_fill((torch.ones(6, 6).byte().tril() - 1) == 255, -INF),
    "positions in bytes": lambda s: s.masked_fill((torch.arange(6, dtype=torch.uint8) - 1) > 5, -1e9),
    "far positions in bytes": lambda s: s.masked_fill(
        (torch.arange(6, dtype=torch.int8) * 50)[:, None] < torch.arange(6, dtype=torch.int8) * 50, -1e9
    ),
    "a comparison that wraps": lambda s: s.masked_fill(torch.arange(6, dtype=torch.uint8) > 258, -1e9),
    "a quotient of bytes": lambda s: s.masked_fill(torch.arange(6, dtype=torch.uint8) // 258 > 1, -1e9),
    "bits and a two": lambda s: s.masked_fill(torch.ones(6, 6, dtype=torch.bool).tril() == 2, -1e9),
    "an overflowing fill": lambda s: s + torch.where(torch.ones(6, 6).tril() > 0, 0.0, -1e30) * 1e10,
    "a maximum with NaN": lambda s: s + torch.ones(6, 6).tril().log().maximum(torch.tensor(-1e30)),
    "an infinite bound": lambda s: s * torch.full((), 3e38).mul(10).reciprocal().add(1),
    "an overflowing exponential": lambda s: s.masked_fill(torch.exp(torch.arange(6.0) * 100) > 1e38, -1e9),
    "zero over zero": lambda s: s.masked_fill((torch.zeros(6) / torch.zeros(6)) >= 0, -1e9),
    "zero by zero": lambda s: s.masked_fill(~((torch.zeros(6) / torch.zeros(6)) >= 0), -1e9),
    "far positions as half": lambda s: s.masked_fill((torch.arange(6) + 2049).half() > 2050, -1e9),
    "floors of negatives": lambda s: s.masked_fill((torch.arange(6) - 3) // 2 < -1, -1e9),
    "remainders of negatives": lambda s: s.masked_fill((torch.arange(6) - 3) % 4 == 1, -1e9),
    "truncated quotients": lambda s: s.masked_fill(
        torch.div(torch.arange(6) - 3, 2, rounding_mode="trunc") == -1, -1e9
    ),
    "sums of halves": lambda s: s.masked_fill(torch.full((6,), 1024.0).half().cumsum(0) >= 4096, -1e9),
    "a sum of infinities": lambda s: s.masked_fill(torch.full((6,), INF).cumsum(0) < 1, -1e9),
    "an integer of NaN": lambda s: s.masked_fill(torch.full((6,), NAN).bool().int() > 1, -1e9),
}  # fmt: skip


def attention(score: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: score(q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "flex"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_numbers_compute_what_eager_computes(name: str, kernel: str) -> None:
    agrees(attention(PROGRAMS[name]), *qkv(), kernel=kernel)


FUSED = [
    "three as a bool",
    "a fraction as an integer",
    "an integer as a byte",
    "bytes below zero",
    "a number as fp8",
]


@pytest.mark.parametrize("name", FUSED)
def test_numbers_that_are_known_are_no_tensors(name: str) -> None:
    seen = agrees(attention(PROGRAMS[name]), *qkv())
    (site,) = seen.sites
    assert site.fused and "[" not in site.spec.split(";")[-1]


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "a scale": lambda s: s * 0.1,
    "a quotient": lambda s: s / math.sqrt(7),
    "a hidden half": lambda s: torch.where(torch.ones(6, 6).tril() > 0, s, -1e9),
    "a hidden row": lambda s: torch.where(torch.arange(6)[:, None] > 2, s, -1e9),
    "a clamped bound": lambda s: s.clamp(min=-6e4),
    "an added overflow": lambda s: s + (1 - torch.ones(6, 6).tril()).half() * -1e9,
    "a cast overflow": lambda s: s + torch.full((6, 6), -1e9).triu(1).half(),
}


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("name", HALVES)
def test_numbers_in_half_precision(name: str, kernel: str) -> None:
    fn, args = attention(HALVES[name]), [t.half() for t in qkv()]
    want = fn(*args)
    got, _ = compiled(fn, *args, kernel=kernel)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=3e-3, atol=3e-3, equal_nan=True)


SIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a root": lambda s, n: s / n**0.5,
    "math.sqrt": lambda s, n: s / math.sqrt(n),
    "a negative root": lambda s, n: s * n**-0.5,
    "half a size": lambda s, n: s / (n / 2),
}


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", SIZES)
def test_scales_of_symbolic_sizes_keep_the_precision_of_the_tensor(
    name: str, dtype: torch.dtype, kernel: str
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SIZES[name](q @ k.mT, q.shape[-1]).softmax(-1) @ v

    args = [t.to(dtype) for t in qkv(D=3)]
    got, seen = compiled(fn, *args, kernel=kernel, dynamic=True)
    assert seen.fused
    eps = torch.finfo(dtype).eps
    assert got.dtype is dtype
    torch.testing.assert_close(got, fn(*args), rtol=32 * eps, atol=32 * eps)


# ---------------------------------------------------------------------------------------- buffers


class Holding(nn.Module):
    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], held: Tensor) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("held", held)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(self.held, Tensor)
        return self.score(q @ k.mT, self.held).softmax(-1) @ v


BUFFERS: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "bytes that fall below zero": (
        torch.arange(6, dtype=torch.uint8), lambda s, b: s.masked_fill((b - 1) > 5, -1e9)
    ),
    "a table of bytes": (
        torch.ones(6, 6, dtype=torch.uint8).tril(), lambda s, b: s.masked_fill((b - 1) > 0, -INF)
    ),
    "a number as a byte": (torch.tensor([2.9]), lambda s, b: s * b.to(torch.uint8)),
    "a number as a bool": (torch.tensor([2.9]), lambda s, b: s * b.bool()),
    "a number seen anew": (torch.tensor([0.1]), lambda s, b: s * b.view(1, 1).half().float()),
    "fp8": (torch.tensor([0.5, 0.5]).to(torch.float8_e4m3fn), lambda s, b: s * b.float()[0]),
    "fp8 that differ": (
        torch.tensor([0.5, 0.25, 1, 2, 1, 1]).to(torch.float8_e5m2), lambda s, b: s + b.float()
    ),
    "complex": (torch.ones(6, dtype=torch.complex64), lambda s, b: s * b.real),
    "far apart": (torch.tensor([2**63 - 1, -(2**63), 0, 1, 2, 3]), lambda s, b: s.masked_fill(b > 0, -1e9)),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["auto", "reference", "flex"])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_every_dtype(name: str, kernel: str) -> None:
    held, score = BUFFERS[name]
    model, args = Holding(score, held), qkv()
    want = model(*args)
    with collector.collect():
        got = checking.compiled(model, kernel, fullgraph=False)(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_forms_of_awkward_buffers() -> None:
    assert describe(torch.full((3,), 0.5).to(torch.float8_e4m3fn)) == Uniform(0.5)
    assert describe(torch.ones(4, 4).tril().to(torch.float8_e5m2)) == describe(torch.ones(4, 4).tril())
    assert describe(torch.ones(3, dtype=torch.complex64)) is None
    assert describe(torch.tensor([2**63 - 1, -(2**63)])) is None
    assert describe(torch.arange(250, 256, dtype=torch.uint8)) == Ramp(250, (1,))
    assert describe(torch.arange(250, 256).to(torch.uint16)) == Ramp(250, (1,))
    node = leaf("b", (2, 2), torch.float32)
    contents = Contents({node: torch.tensor([[1.0, -2.0], [3.0, 0.5]])})
    assert contents.extremes(node) == (-2.0, 3.0) and node in contents.consulted


def test_narrow_positions_are_bands_where_they_fit() -> None:
    def positions(dtype: torch.dtype, factor: int) -> str:
        def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = torch.arange(6, dtype=dtype) * factor
            return (q @ k.mT).masked_fill(n[None, :] > n[:, None], -INF).softmax(-1) @ v

        (site,) = agrees(fn, *qkv()).sites
        return site.kind

    assert positions(torch.uint8, 1) == positions(torch.int8, 25) == positions(torch.int32, 1000) == "causal"
    assert (
        positions(torch.uint8, 52) == positions(torch.int8, 50) == positions(torch.int16, 7000) == "mask[ij]"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions_of_unknown_length_do_not_wrap(dtype: torch.dtype) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(q.shape[2], dtype=dtype)
        return (q @ k.mT).masked_fill((n[None, :] - n[:, None]).abs() > 2, -INF).softmax(-1) @ v

    (site,) = agrees(fn, *qkv(), dynamic=True).sites
    assert site.fused and site.kind == "window(2, 2)"


def test_a_choice_holds_numbers_in_its_dtype() -> None:
    x = leaf("x", (3,), torch.float16)
    choice = pointwise("where", leaf("m", (3,), torch.bool), x, const(-1e9), dtype=torch.float16)
    assert choice.args[2] is const(-INF, torch.float16)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "flex"])
@pytest.mark.parametrize("how", ["added", "added in half", "cast to half"])
def test_fills_that_add_up_to_infinity(how: str, kernel: str) -> None:
    """In a row where both fills are added everywhere, the scores are infinite and the weights NaN."""
    fill = LOWEST if how == "added" else torch.finfo(torch.half).min if how == "added in half" else -1e9
    dtype = torch.float16 if how == "added in half" else torch.float32

    def fn(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        low, zero = torch.tensor(fill, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        hidden = torch.where(rows[:, None], low, zero) + torch.where(keys[:, None, None], low, zero)
        return (q @ k.mT + hidden.to(q.dtype)).softmax(-1) @ v

    kind = torch.float32 if how == "added" else torch.float16
    q, k, v = (t.to(kind) for t in qkv())
    rows, keys = torch.arange(6) == 2, torch.ones(2, 6, dtype=torch.bool)
    keys[0, 3:] = False
    want = fn(q, k, v, rows, keys)
    assert want.isnan().any()
    got, _ = compiled(fn, q, k, v, rows, keys, kernel=kernel)
    torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3, equal_nan=True)
