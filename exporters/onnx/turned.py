"""Rotary embeddings that GroupQueryAttention computes itself (``do_rotary``).

The operator takes tables with a row for every position, and turns the new token ``n`` by row ``past + n``.
The model's tables have a row for every new token.  Rows of zeros are put in front of them, as many as the
cache has keys; nothing reads the zeros.  The positions themselves do not matter, as long as all sequences
share them.  Keys in a cache were turned when they were new, both in the model and in the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.exporters.onnx.cache import Cache
from fusepass.exporters.onnx.rotary import Rotation, half_table, heads_dim
from fusepass.rules.engine import Term
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention


@dataclass(frozen=True)
class Turned:
    """Queries and keys before they are turned, as chains of terms, and the rotation that turns them."""

    query: Sequence[Term]
    keys: Sequence[Term]
    rotation: Rotation

    @property
    def neighbours(self) -> bool:
        """Are neighbours turned together, instead of halves?"""
        return self.rotation.neighbours

    def new_key(self, build: OnnxBuilder) -> ir.Value:
        """The new keys ``[B, G, Q, D]`` of a site with a cache, before they are turned."""
        return build.as_tensor(self.keys[0].expr)

    def tables(self, build: OnnxBuilder, spec: Attention, cache: Cache | None) -> list[ir.Value]:
        """Cosines and sines, ``[K, D / 2]``."""
        assert isinstance(spec.head_dim, int)
        tables = []
        for table in (self.rotation.cos, self.rotation.sin):
            rows = half_table(build, table, self.rotation)
            rows = build.reshape(rows, (spec.queries, spec.head_dim // 2))
            if cache is not None:
                zero = build.constant([[0.0]], build.dtype_of(rows))
                unread = build.expand(zero, (cache.length, spec.head_dim // 2))
                rows = build.join([unread, rows], 0)
            tables.append(rows)
        return tables


def find_turned(site: Site, build: OnnxBuilder, cache: Cache | None) -> Turned | None:
    """Queries and keys of a site that are turned by the same tables, or None."""
    r, spec = site.roles, site.spec
    if not isinstance(spec.head_dim, int) or spec.head_dim % 16:
        return None
    query = _turned(site, build, site.query, [r.query, r.head_dim])
    if query is None:
        return None
    if cache is None:
        keys = _turned(site, build, site.keys, [r.key, r.head_dim])
    else:
        known = build.written.rotations.get(cache.new[0])
        whole = known is not None and heads_dim(known) == 1
        keys = (Term(known.x, ()), known) if known is not None and whole else None
    if keys is None or any(_read_elsewhere(build, rotation) for _, rotation in (query, keys)):
        return None
    rotation, other = query[1], keys[1]
    same = (rotation.cos, rotation.sin, rotation.neighbours) == (other.cos, other.sin, other.neighbours)
    shared = all(t.rank < 4 or t.shape[0] == 1 for t in (rotation.cos, rotation.sin))
    if not same or not shared or rotation.x.dtype is not other.x.dtype:
        return None
    return Turned(_chain(site, query[0]), _chain(site, keys[0]) if cache is None else [keys[0]], rotation)


def _turned(
    site: Site, build: OnnxBuilder, chain: Sequence[Term], wanted: Sequence[Sequence[str]]
) -> tuple[Term, Rotation] | None:
    """The rotation that a tensor of a chain is; ``wanted``: the axes of its positions and elements."""
    positions, elements = build.finest(wanted)
    for term in chain:
        rotation = build.written.rotations.get(term.expr)
        digits = None if rotation is None else build.digits(term)
        if rotation is None or digits is None:
            continue
        heads = heads_dim(rotation)
        if heads is None or list(digits[3 - heads]) != positions or list(digits[3]) != elements:
            return None
        return Term(rotation.x, term.index), rotation
    return None


def _chain(site: Site, term: Term) -> list[Term]:
    """A term and all terms below its views."""
    chain = [term]
    while (below := site.scope.step(chain[-1])) is not None:
        chain.append(below)
    return chain


def _read_elsewhere(build: OnnxBuilder, rotation: Rotation) -> bool:
    """Is the turned tensor an output of the model, so that it has to be computed anyway?"""
    held = build.home(rotation.out)
    return held is not None and held.is_graph_output()
