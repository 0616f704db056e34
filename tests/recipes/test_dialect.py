"""docs/recipes/dialect.md: a handler for a library's operator, and a front end that nobody has thought of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.dialects.handlers import HANDLERS, Result, call_handler, handles, permute
from fusepass.expressions.index import Facts
from fusepass.expressions.ir import Expr, const, expr, leaf, pointwise
from fusepass.recognition.recognize import Miss, recognise
from fusepass.rules.site import Site
from tests.capture import agrees, qkv

# ------------------------------------------------------------ an operation


@torch.library.custom_op("recipes::cap", mutates_args=())
def cap(x: Tensor, bound: float) -> Tensor:
    return bound * torch.tanh(x / bound)


@cap.register_fake
def _(x: Tensor, bound: float) -> Tensor:
    return torch.empty_like(x)


def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = cap(q @ k.mT * 0.5, 5.0).softmax(-1) @ v
    return out


def by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.recipes.cap(q @ k.mT * 0.5, bound=5.0).softmax(-1) @ v
    return out


@pytest.fixture
def handler() -> Iterator[None]:
    """The one step: what the operator means, in operations that rules know."""

    @handles("recipes::cap")
    def capped(r: Result, x: Expr, bound: float) -> Expr:
        number = const(bound, x.dtype)
        return pointwise("mul", pointwise("tanh", pointwise("div", x, number)), number, dtype=r.dtype)

    yield
    del HANDLERS["recipes::cap"]


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("program", [called, by_name])
def test_an_operator_with_a_handler_is_read(program: Any) -> None:
    (site,) = agrees(program, *qkv()).sites
    assert site.kernel == "reference" and "scale 0.5, softcap 5" in site.spec


@pytest.mark.usefixtures("handler")
def test_a_form_that_the_handler_does_not_describe_is_no_fault() -> None:
    """Its signature says which forms it describes: here no bound that is a tensor."""
    x, result = leaf("x", (2, 3), torch.float32), Result((2, 3), torch.float32, Facts(), "node")
    assert call_handler(HANDLERS["recipes::cap"], result, (x, 5.0)) is not None
    assert call_handler(HANDLERS["recipes::cap"], result, (x, x)) is None


def test_without_its_handler_it_is_a_leaf_and_the_reason_names_it() -> None:
    (site,) = agrees(called, *qkv()).sites
    assert not site.fused and "its scores go through 'recipes::cap'" in str(site.reason)


# ------------------------------------------------------------ a front end

#: A language of our own: a name, an operation and its operands, one line after another.
LINES = """
kt = turn k
s  = times q kt
a  = scale s 0.125
w  = softmax a
o  = times w v
"""


def meaning_of(lines: str, shapes: dict[str, tuple[int, ...]]) -> Expr:
    """The one step: the last line as an expression.  What is not known becomes a leaf."""
    known: dict[str, Expr] = {name: leaf(name, shape, torch.float32) for name, shape in shapes.items()}
    for line in lines.strip().splitlines():
        name, _, operation, *operands = line.split()
        x, *rest = (known.get(o) for o in operands)
        known[name] = _line(operation, x, rest[0] if rest else None, operands) or leaf(
            name, shapes["q"], torch.float32
        )
    return known[name]


def _line(operation: str, x: Any, y: Any, operands: list[str]) -> Expr | None:
    match operation:
        case "turn":
            return permute(x, (0, 1, 3, 2))
        case "times":
            shape = (*x.shape[:-1], y.shape[-1])
            return expr("dot", (x, y), ("abmk", "abkn", "abmn"), shape, x.dtype)
        case "scale":
            return pointwise("mul", x, const(float(operands[1]), x.dtype))
        case "softmax":
            return expr("softmax", (x,), (x.rank - 1,), x.shape, x.dtype)
    return None


SHAPES: dict[str, tuple[int, ...]] = {"q": (2, 4, 6, 8), "k": (2, 4, 6, 8), "v": (2, 4, 6, 8)}


def test_what_a_front_end_reads_is_recognised() -> None:
    site = recognise(meaning_of(LINES, SHAPES), Facts())
    assert isinstance(site, Site)
    assert str(site.spec) == "attention(B=2 H=4 G=4 Q=6 K=6 D=8 Dv=8; float32; scale 0.125)"


def test_what_it_does_not_read_stays() -> None:
    reading = recognise(meaning_of(LINES.replace("softmax a", "somehow a"), SHAPES), Facts())
    assert reading is None or isinstance(reading, Miss)
