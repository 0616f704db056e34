"""Rotary embeddings as ``ai.onnx`` RotaryEmbedding (opset 23 and later).

``x * cos + cat(-x2, x1) * sin`` for the halves ``x1, x2`` of ``x``, where the two halves of ``cos`` and of
``sin`` are equal: what the operator computes of halves of the tables.
Source: Su et al., "RoFormer" (arXiv 2104.09864); ONNX operator specification of RotaryEmbedding, version 23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from fusepass.exporters.onnx_builder import OnnxBuilder
from fusepass.ir import Expr, scalar_of

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rotated(node: Expr) -> tuple[Expr, Expr, Expr] | None:
    """``x``, ``cos`` and ``sin`` of a rotary embedding ``[B, H, S, D]``, or None."""
    if node.op != "add" or node.rank != 4 or node.dtype not in _FLOATS:
        return None
    if any(a.op != "mul" for a in node.args):
        return None
    for straight, turned in (node.args, node.args[::-1]):
        for x, cos in (straight.args, straight.args[::-1]):
            for swapped, sin in (turned.args, turned.args[::-1]):
                if x.shape == node.shape and _is_turned(swapped, x):
                    return x, cos, sin
    return None


def _is_turned(node: Expr, x: Expr) -> bool:
    """Is it ``cat(-x[D/2:], x[:D/2])``?"""
    width = x.shape[-1]
    if node.op != "cat" or node.attrs[0] != 3 or len(node.args) != 2 or not isinstance(width, int):
        return False
    high, low = node.args
    if width % 2 or high.op != "neg":
        return False
    return _is_half(high.args[0], x, width // 2, width) and _is_half(low, x, 0, width)


def _is_half(node: Expr, x: Expr, start: int, width: int) -> bool:
    return (
        node.op == "slice"
        and node.args[0] is x
        and node.attrs == (3, start, 1)
        and node.shape[3] == width // 2
    )


def write(build: OnnxBuilder, found: tuple[Expr, Expr, Expr]) -> ir.Value | None:
    """The operator in place of the embedding; None where the tables' halves are not known to be equal."""
    x, *tables = found
    if any(not _halves_equal(build, t) for t in tables):
        return None
    batch, _, length, width = x.shape
    assert isinstance(width, int)
    caches = []
    for table in tables:
        if table.rank != 4 or table.shape[1] != 1 or table.shape[2] != length or table.dtype is not x.dtype:
            return None
        half = build.cut(build.as_tensor(table), 3, 0, width // 2)
        half = build.reshape(half, (table.shape[0], length, width // 2))
        caches.append(build.expand(half, (batch, length, width // 2)))
    inputs = [build.as_tensor(x), *caches]
    return build.node("RotaryEmbedding", inputs, [(x.shape, x.dtype)], {})[0]


def _halves_equal(build: OnnxBuilder, table: Expr) -> bool:
    """Are the two halves of a table's last dimension equal?"""
    node = table
    for _ in range(16):
        keeps = node.op in ("reshape", "expand") and node.args[0].shape[-1:] == node.shape[-1:]
        if keeps or node.op == "cast" or (node.op == "mul" and scalar_of(node.args[1]) is not None):
            node = node.args[0]
        elif node.op == "mul" and scalar_of(node.args[0]) is not None:
            node = node.args[1]
        else:
            break
    return _twice(node) or _leaf_repeats(build, node)


def _twice(node: Expr) -> bool:
    """Is it ``cat(f, f)`` over the last dimension?"""
    same = node.op == "cat" and len(node.args) == 2 and node.args[0] is node.args[1]
    return same and node.attrs[0] == node.rank - 1


def _leaf_repeats(build: OnnxBuilder, node: Expr) -> bool:
    """A constant with equal halves, or the cosine or sine of a tensor with equal halves."""
    held = build.reader.home.get(node)
    if held is None or node.op not in ("input", "slice"):
        return False
    producer = held.producer()
    if producer is not None and producer.op_type in ("Cos", "Sin"):
        angle = build.reader.expr_of(producer.inputs[0])
        return angle is not None and _halves_equal(build, angle)
    if held.const_value is None or held.is_graph_input():
        return False
    numbers = held.const_value.numpy()
    first, second = np.split(numbers, 2, axis=-1)
    return bool(np.array_equal(first, second))
