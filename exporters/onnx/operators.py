"""What a target offers: its operators in order of preference, and the question each answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention
from fusepass.specification.takes import Takes


@dataclass(frozen=True)
class Target:
    """The runtime that a model is written for.

    Attributes:
        name: ``"onnx"``, ``"ort"`` or ``"tensorrt"``.
        opset: the version of ``ai.onnx`` that the model imports.
    """

    name: str
    opset: int


def nothing_more(spec: Attention, target: Target) -> str | None:
    """What an operator refuses that takes all it declares."""
    return None


@dataclass(frozen=True)
class Operator:
    """A fused operator.

    Attributes:
        name: what ONNX calls it.
        takes: the specifications that it computes; all others are refused.
        emit: writes the nodes and returns the result in the layout of the one it replaces, or raises
            :class:`fusepass.exporters.onnx.operands.Refused`.
        more: the reason for which it refuses one that it takes.
    """

    name: str
    takes: Takes
    emit: Callable[[Site, OnnxBuilder, Target], ir.Value]
    more: Callable[[Attention, Target], str | None] = nothing_more

    def refuse(self, spec: Attention, target: Target) -> str | None:
        """None, or why it does not compute ``spec``, from the specification alone."""
        if spec.dropout:
            return "the weights are dropped out: export the model in eval mode"
        return self.takes.refuse(spec) or self.more(spec, target)
