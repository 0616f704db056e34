"""Writes a specification into a graph by a kernel, without a program that spells it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusepass.dialects.torch.graph import Reader
from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr
from fusepass.kernels import Kernel, Target
from fusepass.recognition.recognize import recognise
from fusepass.rules.engine import Term
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, ScoreModifier, Sink, WeightModifier
from fusepass.specification.samples import SIZES
from fusepass.writing.emit import Builder

B, H, Q, K = SIZES.values()
D = 8
CPU = Target("cpu", False, False, requested=True)


def spec_of(
    scores: Sequence[ScoreModifier],
    weights: Sequence[WeightModifier] = (),
    sink: Sink | None = None,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Attention:
    """A specification of the samples' sizes."""
    return Attention(
        B, H, H, Q, K, D, D, dtype, tuple(scores), tuple(weights), dtype, dtype, sink, **more
    )  # fmt: skip


@functools.cache
def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the samples' sizes."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((B, H, n, D), generator=g, dtype=torch.float64).to(dtype) for n in (Q, K, K))
    return q, k, v


def written(
    spec: Attention, operands: Sequence[Tensor], kernel: Kernel, target: Target = CPU
) -> fx.GraphModule:
    """A graph of q, k, v and the operands, written by a kernel; refusals are raised."""
    gm, anchor = _plain([*qkv(spec.dtype), *operands])
    reader = Reader(gm.graph, gm)
    meaning = reader.defined[anchor]
    assert isinstance(meaning, Expr)
    site = recognise(meaning, reader.facts)
    assert isinstance(site, Site), site
    axes = (*site.out.index[:3], site.scope.keys)
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"][3:]:
        leaf = reader.defined[node]
        assert isinstance(leaf, Expr)
        index = (Affine() if n == 1 else axis for n, axis in zip(leaf.shape, axes, strict=True))
        site.operands.append(Term(leaf, tuple(index)))
    site = replace(site, spec=replace(spec, operands=len(operands)))
    build = Builder(reader, anchor, {}, site.space, {})
    result = kernel.write(site, build, target)
    anchor.replace_all_uses_with(result)
    gm.graph.erase_node(anchor)
    gm.recompile()
    return gm


def _plain(tensors: Sequence[Tensor]) -> tuple[fx.GraphModule, fx.Node]:
    """Attention without modifiers, with fake values, and the node of its result."""
    graph = fx.Graph()
    given = [graph.placeholder(f"t{n}") for n in range(len(tensors))]
    scores = graph.call_function(torch.matmul, (given[0], graph.call_method("transpose", (given[1], -2, -1))))
    weights = graph.call_function(torch.softmax, (scores, -1))
    anchor = graph.call_function(torch.matmul, (weights, given[2]))
    graph.output(anchor)
    gm = fx.GraphModule({}, graph)

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["example_value"] = super().run_node(n)
            return n.meta["example_value"]

    mode = FakeTensorMode()
    with mode:
        Propagate(gm).run(*[mode.from_tensor(t) for t in tensors])
    return gm, anchor
