"""Key/value caches: what the graph joins by ``Concat(past, new)`` becomes the operators' past and present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr
from fusepass.rules.engine import Term
from fusepass.rules.site import Site


@dataclass(frozen=True)
class Cache:
    """The cache of a site: past tensors ``[B, G, length, D]`` and new ones ``[B, G, Q, D]``.

    Attributes:
        length: the number of keys in the cache.
        joined: ``Concat(past, new)`` of the keys and of the values; the operator writes them as present.
        new: the new keys and values as expressions.
    """

    past_key: ir.Value
    new_key: ir.Value
    past_value: ir.Value
    new_value: ir.Value
    length: Size
    joined: tuple[ir.Value, ir.Value]
    new: tuple[Expr, Expr]

    def take(self, build: OnnxBuilder, present: Sequence[ir.Value]) -> None:
        """Record that the operator's outputs are the joined tensors from now on."""
        for old, new in zip(self.joined, present, strict=True):
            build.presents.append((old, new))


def find_cache(site: Site, build: OnnxBuilder) -> Cache | None:
    """The cache of a site whose keys and values are both joined over the key axis, or None."""
    r = site.roles
    key = _joined(site.keys, build, (r.batch, r.kv_heads, r.key, r.head_dim))
    value = _joined(site.values, build, (r.batch, r.kv_heads, r.key, r.value_dim))
    if key is None or value is None:
        return None
    length, other = key[1].args[0].shape[2], value[1].args[0].shape[2]
    if not build.reader.facts.equal(length, other):
        return None
    parts = [build.home(p) for _, e in (key, value) for p in e.args]
    joined = [v for v, _ in (key, value)]
    if any(p is None for p in parts) or any(v in build.written.present for v in joined):
        return None
    past_key, new_key, past_value, new_value = (p for p in parts if p is not None)
    new = (key[1].args[1], value[1].args[1])
    return Cache(past_key, new_key, past_value, new_value, length, (joined[0], joined[1]), new)


def _joined(
    chain: Sequence[Term], build: OnnxBuilder, groups: Sequence[Sequence[str]]
) -> tuple[ir.Value, Expr] | None:
    """The tensor ``[B, G, K, D]`` that joins two over the keys, before heads are repeated."""
    wanted = [list(g) for g in build.finest(groups)]
    for term in chain:
        if term.expr.op != "cat" or term.expr.attrs[0] != 2 or len(term.expr.args) != 2:
            continue
        digits = build.digits(term)
        held = build.home(term.expr)
        if term.expr.rank == 4 and held is not None and [list(d) for d in digits or ()] == wanted:
            return held, term.expr
    return None
