"""The tensors that may serve as queries, keys and values, and the scales that were multiplied into them."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fusepass.expressions.ir import Expr, scalar_of
from fusepass.rules.engine import STEP_LIMIT, Refuse, Scope, Term
from fusepass.specification.attention import (
    Attention,
)
from fusepass.specification.program import slots


def chain_of(
    scope: Scope, term: Term, low: torch.dtype, scales: bool = True
) -> tuple[list[float], list[Term]]:
    """The constant scales of an operand, and the tensors that hold it without them, behind its views.

    A scale that was written into the operand's own memory (``q *= scale``) stays in the operand.
    ``low``: the dtype of the result; casts from it to a wider one are dropped.  ``scales``: take scales out.
    """
    factors: list[float] = []
    chain = [term]
    for _ in range(STEP_LIMIT):
        node = term.expr
        below = scope.step(term)
        factor = _factor(node) if scales else None
        if factor is not None and not scope.readable(node.args[factor[0]]):
            factor = None
        if below is not None:
            term = below
            chain.append(term)
        elif factor is not None:
            factors.append(factor[1])
            term = term.argument(factor[0])
            chain = [term]
        elif node.op == "cast" and node.args[0].dtype is low and node.dtype.itemsize > low.itemsize:
            term = term.argument(0)
            chain = [term]
        else:
            break
    return factors, chain


def check_operands(scope: Scope, spec: Attention, products: Collection[Expr]) -> None:
    """Refuse a modifier that is computed from the scores, which would have to be computed a second time."""
    for slot in slots(spec):
        todo, seen = [scope.operands[slot].expr], set()
        while todo:
            node = todo.pop()
            if node in products:
                raise Refuse(
                    "a mask, bias or factor of the scores is computed from the scores themselves", node
                )
            if node not in seen and node.op not in ("input", "dot"):
                seen.add(node)
                todo.extend(node.args)


def _factor(node: Expr) -> tuple[int, float] | None:
    """For a node that is a tensor times a constant: the position of the tensor, and the constant."""
    if node.op == "neg":
        return 0, -1.0
    if node.op == "mul":
        for position in (0, 1):
            value = scalar_of(node.args[1 - position])
            if value is not None and node.args[position].rank == node.rank:
                return position, float(value)
    if node.op == "div" and (value := scalar_of(node.args[1])):
        return 0, 1.0 / float(value)
    return None


__all__ = ["check_operands", "chain_of"]
