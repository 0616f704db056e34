"""Stand-ins for the rewriter, for tests of its surroundings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusepass.host.config import Options
from fusepass.reports.report import GraphReport, SiteReport, source_of

Engine = Callable[[torch.fx.GraphModule, Options, Any], GraphReport]


def install(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Make the backend call `engine` in place of the rewriter."""
    monkeypatch.setattr("fusepass.compilation.backend.rewrite_graph", engine)


def softmaxes(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if "softmax" in str(node.target)]


def idle(gm: torch.fx.GraphModule, options: Options, example_inputs: Any, **_: Any) -> GraphReport:
    """Reports every softmax and changes nothing."""
    sites = [
        SiteReport(node.name, False, "", "", None, f"idle, kernel {options.kernel}", source_of(node))
        for node in softmaxes(gm)
    ]
    return GraphReport(sites, seconds=0.25, nodes=len(gm.graph.nodes))


def wrong(gm: torch.fx.GraphModule, options: Options, example_inputs: Any, **_: Any) -> GraphReport:
    """Multiplies every softmax by 1.01, and reports it as fused."""
    sites = []
    for node in softmaxes(gm):
        with gm.graph.inserting_after(node):
            scaled = gm.graph.call_function(torch.mul, (node, 1.01))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)  # type: ignore[misc]
        sites.append(SiteReport(node.name, True, "softmax(q·k)·v", "full", "sdpa", None, source_of(node)))
    gm.recompile()
    return GraphReport(sites, nodes=len(gm.graph.nodes))


def failing(gm: torch.fx.GraphModule, options: Options, example_inputs: Any, **_: Any) -> GraphReport:
    raise ZeroDivisionError("an engine fault")


class Attention(torch.nn.Module):
    """The smallest model with attention in it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.dropout = torch.nn.Dropout(dropout)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, scale: float = 0.25) -> torch.Tensor:
        self.calls.add_(1)
        q, k, v = self.project(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
        attended: torch.Tensor = self.dropout(weights) @ v
        return attended
