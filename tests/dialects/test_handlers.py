"""Handlers of operations: the forms of calls that they describe, and faults, which are something else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
import torch
from torch import fx

from fusepass.dialects.handlers import Result, Value, call_handler, handles
from fusepass.dialects.torch.ops import HANDLERS
from fusepass.expressions.index import Facts, Size
from fusepass.expressions.ir import Expr, leaf

X = leaf("x", (2, 3, 4), torch.float32)
MASK = leaf("m", (2, 3, 4), torch.bool)
N = sympy.Symbol("s0", integer=True, positive=True)
NODE = fx.Graph().placeholder("unknown")


def result(*shape: Size, dtype: torch.dtype = torch.float32) -> Result:
    return Result(shape, dtype, Facts(), "node")


# ------------------------------------------------------------------------------- which forms are described


def typed(r: Result, x: Expr, dim: int, p: float = 0.5, *more: Expr, y: Expr | None = None) -> str:
    return "described"


def untyped(r: Result, x: Value, *rest: Value, **more: Value) -> str:
    return "described"


def of_sizes(r: Result, size: Size, dims: tuple[Value, ...] = (), flag: bool = False) -> str:
    return "described"


DESCRIBED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (typed, (X, 1), {}),
    (typed, (X,), {"dim": 1, "p": 1}),
    (typed, (X, -1, 0.25, X, MASK), {"y": None}),
    (typed, (X, True), {"y": X}),
    (untyped, (NODE, 1, None), {"other": NODE}),
    (of_sizes, (N, (1, NODE)), {"flag": True}),
    (of_sizes, (3,), {}),
]
NOT_DESCRIBED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (typed, (), {}),
    (typed, (X,), {}),
    (typed, (X, 1), {"keepdim": True}),
    (typed, (X, 1), {"dim": 1}),
    (typed, (3, 1), {}),
    (typed, (NODE, 1), {}),
    (typed, (None, 1), {}),
    (typed, (X, N), {}),
    (typed, (X, (0, 1)), {}),
    (typed, (X, 1, "half"), {}),
    (typed, (X, 1, 0.5, X, 2), {}),
    (typed, (X, 1), {"y": NODE}),
    (untyped, (), {}),
    (of_sizes, ("n",), {}),
    (of_sizes, (NODE,), {}),
    (of_sizes, (3, 1), {}),
]


@pytest.mark.parametrize("n", range(len(DESCRIBED)))
def test_a_call_of_the_signature_is_answered(n: int) -> None:
    handler, args, kwargs = DESCRIBED[n]
    assert call_handler(handler, result(2, 3, 4), args, kwargs) == "described"


@pytest.mark.parametrize("n", range(len(NOT_DESCRIBED)))
def test_another_call_is_not_described(n: int) -> None:
    handler, args, kwargs = NOT_DESCRIBED[n]
    assert call_handler(handler, result(2, 3, 4), args, kwargs) is None


@pytest.mark.parametrize(
    "fault", [TypeError, AttributeError, ValueError, IndexError, KeyError, AssertionError]
)
def test_what_a_handler_raises_is_raised(fault: type[Exception]) -> None:
    def handler(r: Result, x: Expr) -> Expr:
        raise fault("inside")

    with pytest.raises(fault, match="inside"):
        call_handler(handler, result(), (X,))
    assert call_handler(handler, result(), (X, 1)) is None


# ------------------------------------------------------------------------------- the table of PyTorch


#: Possible values of any argument: a tensor, a node without a meaning, a size, anything.
ANYTHING = (X, MASK, NODE, N, None, "text", 1, 2.5, (0, NODE), (N, 1), torch.float16)


@pytest.mark.parametrize("name", HANDLERS)
def test_no_handler_fails_on_what_it_does_not_describe(name: str) -> None:
    for count in range(4):
        for args in itertools.product(ANYTHING, repeat=count):
            meaning = call_handler(HANDLERS[name], result(2, 3, 4), args)
            assert meaning is None or isinstance(meaning, (Expr, tuple)), args


#: Calls with arguments that are known only when the graph runs, or that no sample of PyTorch covers.
UNKNOWN: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "dimensions that are not known": ("permute", (X, (NODE, 1, 2)), {}),
    "symbolic dimensions": ("permute", (X, (N, 1, 2)), {}),
    "dimensions by keyword": ("permute", (X,), {"dims": (NODE, 0, 1)}),
    "a dimension moved": ("movedim", (X, N, 0), {}),
    "dimensions moved to somewhere": ("movedim", (X, (0, 1), (NODE, 0)), {}),
    "a flipped dimension": ("flip", (X, (NODE,)), {}),
    "a sum over something": ("sum", (X, (N,)), {}),
    "a maximum over something": ("amax", (X, (NODE, 0)), {}),
    "a softmax over something": ("softmax", (X, N), {}),
    "repeated somehow": ("repeat", (X, 2, NODE, 1), {}),
    "repeated fewer times than it has dimensions": ("repeat", (X, 2, 2), {}),
    "interleaved somehow": ("repeat_interleave", (X,), {"repeats": NODE, "dim": 1}),
    "a stride of a slice": ("slice", (X, 0, 0, 2, NODE), {}),
    "a bias that is no tensor": ("linear", (X, leaf("w", (5, 4), torch.float32), 1), {}),
    "a number in an einsum": ("einsum", ("ijk,jk->i", X, 2), {}),
    "tensors that are not known": ("cat", ((X, NODE), 1), {}),
    "one tensor for several": ("cat", (X, 1), {}),
    "widths that are not known": ("pad", (X, (1, NODE)), {}),
    "a width for several": ("pad", (X, 1), {}),
    "a triangle of a number": ("triu", (3,), {}),
    "the larger of numbers": ("max", (3, X), {}),
    "a minimum of one tensor": ("min", (X,), {}),
    "an index that is no tuple": ("index", (X, MASK), {}),
    "grouped heads of unknown number": (
        "scaled_dot_product_attention",
        tuple(leaf(n, (2, h, 5, 8), torch.float32) for n, h in (("q", N), ("k", 3), ("v", 3))),
        {"enable_gqa": True},
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_described(name: str) -> None:
    operation, args, kwargs = UNKNOWN[name]
    assert call_handler(HANDLERS[operation], result(2, 3, 4), args, kwargs) is None


def test_tensors_without_dimensions() -> None:
    x = leaf("x", (), torch.float32)
    for operation, args in (("permute", ()), ("movedim", (0, 0)), ("transpose", (0, 0)), ("flip", ((),))):
        meaning = call_handler(HANDLERS[operation], result(), (x, *args))
        assert isinstance(meaning, Expr) and meaning.shape == (), operation


def test_a_list_of_indices_is_no_index_of_several_dimensions() -> None:
    """A list arrives as a tuple; the shape of the result tells ``x[[0, 1]]`` and ``x[0, 1]`` apart."""
    from fusepass.dialects.torch.views import getitem

    assert getitem(result(2, 3, 4), X, (0, 1)) is None
    element = getitem(result(4), X, (0, 1))
    assert element is not None and element.shape == (4,)
    with_axes = getitem(result(1, 4), X, (0, None, 1))
    assert with_axes is not None and with_axes.shape == (1, 4)


def test_a_handler_that_is_there_stays_when_the_table_is_filled() -> None:
    def mine(r: Result, *_: object) -> None:
        return None

    HANDLERS["an_operation_of_this_test"] = mine
    try:
        handles("an_operation_of_this_test")(lambda r, x: x)
        assert HANDLERS["an_operation_of_this_test"] is mine
    finally:
        del HANDLERS["an_operation_of_this_test"]
