"""Graphs of CUDA tensors on a machine without a GPU: shapes, dtypes and devices, no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusepass.host.libraries import FLASH3
from fusepass.kernels import gates


def hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Pretend that there is a GPU of this capability, every library except flash-attn 3, and no profile."""
    monkeypatch.setattr(gates, "capability", lambda: capability)
    present = lambda package: package is not FLASH3  # noqa: E731
    for module in ("fusepass.kernels.gates", "fusepass.kernels.fp8"):
        monkeypatch.setattr(f"{module}.installed", present)


def fake_graph(
    program: Callable[..., Any],
    *shapes: tuple[int, ...],
    masks: tuple[tuple[int, ...], ...] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> fx.GraphModule:
    """A traced program whose nodes carry fake CUDA tensors; ``masks`` are the shapes of boolean arguments."""
    graph = fx.symbolic_trace(program)

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["example_value"] = result
            return result

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(s, device="cuda", dtype=dtype) for s in shapes]
        given += [torch.empty(s, device="cuda", dtype=torch.bool) for s in masks]
        Propagate(graph).run(*given)
    return graph


def targets(graph: fx.GraphModule) -> list[str]:
    """The names of the functions that a graph calls."""
    return [
        str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes if n.op == "call_function"
    ]
