"""Helpers that run programs through the pass: captured graphs, compiled functions, comparison with eager."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from fusepass.dialects.torch.graph import Reader
from fusepass.expressions.ir import Expr
from fusepass.reports.collector import Collector, collect

Program = Callable[..., Any]


class Wrapped(nn.Module):
    """A function as a module, for those who take modules only."""

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def dynamo_graph(fn: Program, *args: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """The one graph that Dynamo captures."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    assert len(graphs) == 1
    return graphs[0]


def meaning(fn: Program, *args: Any, dynamic: bool | None = None) -> tuple[Expr, Reader]:
    """The expression that the reader gives for a function's (first) result."""
    gm = dynamo_graph(fn, *args, dynamic=dynamic)
    reader = Reader(gm.graph, gm)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    result = reader.meaning[output.args[0][0]]
    assert isinstance(result, Expr)
    return result, reader


def compiled(
    fn: Program, *args: Any, kernel: str = "reference", dynamic: bool | None = None
) -> tuple[Any, Collector]:
    """The results of a compiled call, and what the pass did; faults of the pass are raised."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"inner": "eager", "kernel": kernel}
    with mock.patch.dict(os.environ, FUSEPASS_STRICT="1"), collect() as seen:
        result = torch.compile(fn, backend="fusepass", fullgraph=True, dynamic=dynamic, options=options)(
            *args
        )
    return result, seen


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def copies(args: Any) -> list[Any]:
    """Arguments that a program may write into."""
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Assert equal shapes and dtypes, equal numbers up to rounding, and NaN in the same places."""
    mine, theirs = tensors(got), tensors(want)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def agrees(fn: Program, *args: Any, kernel: str = "reference", dynamic: bool | None = None) -> Collector:
    """Assert that compiled and eager give the same results and leave the inputs in the same state."""
    mine, theirs = copies(args), copies(args)
    want = fn(*theirs)
    got, seen = compiled(fn, *mine, kernel=kernel, dynamic=dynamic)
    close(got, want)
    close(mine, theirs)
    return seen


def qkv(
    B: int = 2, H: int = 2, Q: int = 6, K: int | None = None, D: int = 8, G: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries ``[B, H, Q, D]``, keys and values ``[B, G, K, D]``."""
    shape = (B, G or H, K or Q, D)
    return torch.randn(B, H, Q, D), torch.randn(shape), torch.randn(shape)
