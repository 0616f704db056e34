"""Key paddings that are lengths: ``j < lengths[b]`` becomes ``nonpad_kv_seqlen`` (Attention, opset 24).

Runtimes keep their fast kernels if there is no mask.  For a sequence of length zero the operator returns
zero; if the model gives another result, that is restored.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.exporters.onnx.operands import Added, Operands
from fusepass.expressions.index import Affine
from fusepass.rules.engine import Term
from fusepass.rules.site import Site
from fusepass.specification.attention import KeyPadding, Mask, empty_rows

_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def find_lengths(site: Site) -> Term | None:
    """The integers ``lengths[b]``, if keys are hidden by ``j < lengths[b]`` alone; otherwise None."""
    added = site.spec.added
    if (
        len(added) != 1
        or not isinstance(added[0], Mask)
        or added[0].additive
        or not site.spec.hides(added[0])
    ):
        return None
    mask = added[0]
    if mask.atoms != (KeyPadding(),) or len(site.roles.batch) != 1 or len(site.roles.key) != 1:
        return None
    term, attends = site.operands[mask.slot], mask.attends
    while term.expr.op not in _NEGATED:
        if term.expr.op == "not":
            attends = not attends
        below = term.argument(0) if term.expr.op == "not" else site.scope.step(term)
        if below is None:
            return None
        term = below
    op = term.expr.op if attends else _NEGATED[term.expr.op]
    sides = _below(site, term.argument(0)), _below(site, term.argument(1))
    for kind, (position, lengths) in ((op, sides), (_MIRRORED[op], sides[::-1])):
        if kind == "lt" and _is_position(site, position) and _is_of_batch(site, lengths):
            return lengths
    return None


def _below(site: Site, term: Term) -> Term:
    """The tensor below the views."""
    while (below := site.scope.step(term)) is not None:
        term = below
    return term


def _is_position(site: Site, term: Term) -> bool:
    """Is the formula the position of the key?"""
    node = term.expr
    return (
        node.op == "iota"
        and node.rank == 1
        and node.attrs == (0, 1)
        and _runs_over(site, term, site.roles.key[0])
    )


def _is_of_batch(site: Site, term: Term) -> bool:
    """Is it one integer per sequence?"""
    node = term.expr
    whole = node.rank == 1 and node.dtype in (torch.int64, torch.int32)
    return whole and _runs_over(site, term, site.roles.batch[0])


def _runs_over(site: Site, term: Term, axis: str) -> bool:
    space = site.space
    return space.resolve(term.index[0]) == space.resolve(Affine(((axis, 1),)))


def of_lengths(
    site: Site, build: OnnxBuilder, lengths: Term, x: Operands
) -> tuple[ir.Value, Operands, Added]:
    """``nonpad_kv_seqlen`` ``[B]``, the operands, and what remains to be done for sequences without a key."""
    spec = site.spec
    given = build.cast(build.as_tensor(lengths.expr), torch.int64)
    keys, zero = build.length(spec.keys), build.constant([0], torch.int64)
    least = build.pointwise("Max", zero, build.pointwise("Min", keys, given))
    if not spec.unseen_rows:
        return least, x, Added(None)
    some = build.pointwise("Greater", given, zero)
    seen = build.reshape(some, (spec.batch, 1, 1, 1))
    if empty_rows(spec) != "mean":
        return least, x, Added(None, seen)
    # Zero queries give uniform weights over all keys: the mean of the values.
    q = build.pointwise("Mul", build.cast(seen, build.dtype_of(x.q)), x.q)
    return build.call("Where", [some, least, keys], (spec.batch,), torch.int64), replace(x, q=q), Added(None)
