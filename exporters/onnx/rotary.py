"""Rotary embeddings as ``ai.onnx`` RotaryEmbedding (opset 23 and later).

Two forms are recognised.  In ``x * cos + turned(x) * sin``, ``turned`` is ``cat(-x2, x1)`` of the halves of
``x``, or the same for every pair of neighbours.  ``cos`` and ``sin`` hold the same number for both elements
that are turned together, and the operator takes half of each table.  In
``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)``, and its form for pairs, the tables are such halves already.
Source: Su et al., "RoFormer" (arXiv 2104.09864); ONNX operator specification of RotaryEmbedding, version 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr, Shape, scalar_of

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rotation:
    """``x`` of rank 4, the rotated ``out``, and the tables.

    Attributes:
        neighbours: are neighbours turned together, instead of halves?
        halved: do the tables hold every number once, not twice?
    """

    out: Expr
    x: Expr
    cos: Expr
    sin: Expr
    neighbours: bool
    halved: bool = False

    @property
    def width(self) -> int:
        """The size of the last dimension of the tables."""
        full = self.x.shape[3]
        assert isinstance(full, int)
        return full // 2 if self.halved else full


def rotated(node: Expr) -> Rotation | None:
    """The rotary embedding that an expression is, or None."""
    width = node.shape[-1] if node.rank == 4 else None
    if node.dtype not in _FLOATS or not isinstance(width, int) or width % 2:
        return None
    return _rotation_of_sum(node) if node.op == "add" else _rotation_of_parts(node)


def _rotation_of_sum(node: Expr) -> Rotation | None:
    """``x * cos + turned(x) * sin``."""
    factors = [list(_factors(a)) for a in node.args]
    for straight, turned in (factors, factors[::-1]):
        for x, cos in straight:
            for swapped, sin in turned:
                kind = _turned(swapped, x) if x.shape == node.shape else None
                if kind is not None:
                    return Rotation(node, x, cos, sin, kind)
    return None


def _rotation_of_parts(node: Expr) -> Rotation | None:
    """``x1 * cos - x2 * sin`` and ``x2 * cos + x1 * sin``, joined."""
    parts = _parts(node)
    if parts is None or parts[0].op != "sub" or parts[1].op != "add":
        return None
    minus, plus = parts
    for first, cos in _factors(minus.args[0]):
        for second, sin in _factors(minus.args[1]):
            if not _adds(plus, (second, cos), (first, sin)):
                continue
            for x in _sources(first, node):
                assert isinstance(x.shape[3], int)
                picked = [_picked(p, x) for p in (first, second)]
                for kind in (False, True):
                    wanted = [(0, 2), (1, 2)] if kind else [(0, 1), (x.shape[3] // 2, 1)]
                    if picked == wanted and kind == (node.op != "cat"):
                        return Rotation(node, x, cos, sin, kind, halved=True)
    return None


def _parts(node: Expr) -> tuple[Expr, Expr] | None:
    """The two tensors that are concatenated over the last dimension, or interleaved."""
    if node.op == "cat" and len(node.args) == 2 and node.attrs[0] == 3:
        return node.args[0], node.args[1]
    inner = node.args[0] if node.op == "reshape" else node
    if inner.op != "cat" or len(inner.args) != 2 or inner.rank != 5 or inner.attrs[0] != 4:
        return None
    if inner.shape != (*node.shape[:3], inner.shape[3], 2):
        return None
    first, second = map(_without_view, inner.args)
    return first, second


def _adds(node: Expr, *pairs: tuple[Expr, Expr]) -> bool:
    """Is it the sum of the products of these two pairs?"""
    for sides in (node.args, node.args[::-1]):
        if all(pair in _factors(side) for side, pair in zip(sides, pairs, strict=True)):
            return True
    return False


def _sources(part: Expr, node: Expr) -> Iterator[Expr]:
    """The tensors of a node's shape from which a part may have been taken."""
    while part.op in ("slice", "select", "reshape"):
        part = part.args[0]
        if part.shape == node.shape:
            yield part


def _factors(node: Expr) -> Iterator[tuple[Expr, Expr]]:
    """The two factors of a product, in both orders, as they are and without factors of 1."""
    node = _bare(node)
    if node.op == "mul":
        for first, second in dict.fromkeys([node.args, tuple(map(_bare, node.args))]):
            yield first, second
            yield second, first


def _bare(node: Expr) -> Expr:
    """An expression without factors of 1."""
    while node.op == "mul":
        kept = [a for a in node.args if scalar_of(a) != 1]
        if len(kept) != 1 or kept[0].shape != node.shape:
            break
        node = kept[0]
    return node


def _turned(node: Expr, x: Expr) -> bool | None:
    """Is it ``x`` with its last dimension turned, by halves (False) or by neighbours (True)?"""
    width = x.shape[-1]
    assert isinstance(width, int)
    joined = node
    while joined.op == "reshape":
        joined = joined.args[0]
    if joined.op != "cat" or len(joined.args) != 2:
        return None
    minus, plus = joined.args
    if minus.op != "neg":
        minus = _without_view(minus)
    if minus.op != "neg":
        return None
    picked = [_picked(p, x) for p in (minus.args[0], plus)]
    if joined is node and joined.attrs[0] == 3:
        return False if picked == [(width // 2, 1), (0, 1)] else None
    inner = joined.rank == 5 and joined.attrs[0] == 4 and joined.shape[-1] == 2
    return True if inner and node.shape == x.shape and picked == [(1, 2), (0, 2)] else None


def _without_view(node: Expr) -> Expr:
    """The expression below a last dimension of size 1."""
    return node.args[0] if node.op == "reshape" and node.shape == (*node.args[0].shape, 1) else node


def _picked(node: Expr, x: Expr) -> tuple[Size, Size] | None:
    """The start and step of the half of ``x``'s last dimension that a node holds, or None."""
    width = x.shape[-1]
    assert isinstance(width, int)
    half = (*x.shape[:-1], width // 2)
    if node.shape not in (half, (*half, 1)):
        return None
    while node.op == "reshape" and node.shape in (half, (*half, 1)) and node.args[0] is not x:
        node = node.args[0]
    pairs = (*half, 2)
    if node.op == "select" and node.args[0].shape == pairs and node.attrs[0] == 4:
        return (node.attrs[1], 2) if _same_elements(node.args[0], x) else None
    if node.op != "slice":
        return None
    dim, start, step = node.attrs
    if node.args[0] is x and dim == 3 and node.shape[3] == width // 2:
        return start, step
    if node.args[0].shape == pairs and dim == 4 and node.shape[4] == 1 and _same_elements(node.args[0], x):
        return start, 2
    return None


def _same_elements(node: Expr, x: Expr) -> bool:
    """Is it ``x`` with another shape?"""
    while node.op == "reshape" and node is not x:
        node = node.args[0]
    return node is x


def heads_dim(rotation: Rotation) -> int | None:
    """The dimension of ``x``, 1 or 2, that the tables do not vary over; the other one holds positions."""
    x, wide = rotation.x, [_wide(t) for t in (rotation.cos, rotation.sin)]
    if any(s[3] != rotation.width or s[0] not in (1, x.shape[0]) for s in wide):
        return None
    return next((d for d in (1, 2) if all(s[d] == 1 and s[3 - d] == x.shape[3 - d] for s in wide)), None)


def _wide(table: Expr) -> Shape:
    return (1,) * (4 - table.rank) + table.shape


def tabled(build: OnnxBuilder, rotation: Rotation) -> bool:
    """Are the tables known to have the operators' form: every number twice, in the dtype of ``x``?"""
    tables = (rotation.cos, rotation.sin)
    if any(t.rank > 4 or t.dtype is not rotation.x.dtype for t in tables) or heads_dim(rotation) is None:
        return False
    return rotation.halved or all(_repeats(build, t, rotation.neighbours) for t in tables)


def half_table(build: OnnxBuilder, table: Expr, rotation: Rotation) -> ir.Value:
    """A table with every number once, ``[B | 1, S, D / 2]``."""
    shape, width = _wide(table), rotation.width
    heads = heads_dim(rotation)
    assert heads is not None
    value = build.reshape(build.as_tensor(table), shape)
    if not rotation.halved:
        step, width = (2, width) if rotation.neighbours else (1, width // 2)
        value = build.cut(value, 3, 0, width, step)
        width = width // step
    return build.reshape(value, (shape[0], rotation.x.shape[3 - heads], width))


def write(build: OnnxBuilder, rotation: Rotation) -> ir.Value | None:
    """Write the operator in place of the embedding; None if no layout of ``x`` is suitable."""
    x, heads = rotation.x, heads_dim(rotation)
    assert heads is not None
    batch, length, width = x.shape[0], x.shape[3 - heads], x.shape[3]
    assert isinstance(width, int)
    tables = [half_table(build, table, rotation) for table in (rotation.cos, rotation.sin)]
    caches = [build.expand(table, (batch, length, width // 2)) for table in tables]
    attributes = {"interleaved": 1} if rotation.neighbours else {}
    value, shape = build.as_tensor(x), x.shape
    if heads == 2:  # the operator needs heads before positions, or packed heads
        if not isinstance(x.shape[2], int):
            return None
        attributes["num_heads"] = x.shape[2]
        shape = (batch, length, x.shape[2] * width)
        value = build.reshape(value, shape)
    out = build.node("RotaryEmbedding", [value, *caches], [(shape, x.dtype)], attributes)[0]
    return build.reshape(out, x.shape)


def _repeats(build: OnnxBuilder, table: Expr, neighbours: bool) -> bool:
    """Does a table's last dimension hold every number twice: in its two halves, or in neighbours?"""
    node = table
    for _ in range(16):
        if node.op == "expand" and node.args[0].shape[-1:] in ((), (1,)):
            return True
        keeps = node.op in ("reshape", "expand") and node.args[0].shape[-1:] == node.shape[-1:]
        if keeps or node.op == "cast" or (node.op == "mul" and scalar_of(node.args[1]) is not None):
            node = node.args[0]
        elif node.op == "mul" and scalar_of(node.args[0]) is not None:
            node = node.args[1]
        else:
            break
    return (_in_pairs(node) if neighbours else _twice(node)) or _leaf_repeats(build, node, neighbours)


def _twice(node: Expr) -> bool:
    """Is it ``cat(f, f)`` over the last dimension?"""
    same = node.op == "cat" and len(node.args) == 2 and node.args[0] is node.args[1]
    return same and node.attrs[0] == node.rank - 1


def _in_pairs(node: Expr) -> bool:
    """Does it repeat every element of a tensor, as neighbours?"""
    if node.op != "reshape" or node.args[0].shape[-1:] != (2,):
        return False
    inner = node.args[0]
    return _twice(inner) or (inner.op == "expand" and inner.args[0].shape[-1] == 1)


def _leaf_repeats(build: OnnxBuilder, node: Expr, neighbours: bool) -> bool:
    """Is it a constant that holds everything twice, or the cosine or sine of a tensor that does?"""
    held = build.reader.home.get(node)
    if held is None or node.op not in ("input", "slice"):
        return False
    producer = held.producer()
    if producer is not None and producer.op_type in ("Cos", "Sin"):
        angle = build.reader.expr_of(producer.inputs[0])
        return angle is not None and _repeats(build, angle, neighbours)
    if held.const_value is None or held.is_graph_input():
        return False
    numbers = held.const_value.numpy()
    if neighbours:
        return bool(np.array_equal(numbers[..., ::2], numbers[..., 1::2]))
    first, second = np.split(numbers, 2, axis=-1)
    return bool(np.array_equal(first, second))
