"""What a target offers: its operators in order of preference, and the question each answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from fusepass.exporters.onnx_builder import OnnxBuilder
from fusepass.recognize import Site
from fusepass.spec import Attention


@dataclass(frozen=True)
class Target:
    """The runtime that a model is written for.

    Attributes:
        name: ``"onnx"``, ``"ort"`` or ``"tensorrt"``.
        opset: the version of ``ai.onnx`` that the model imports.
    """

    name: str
    opset: int


@dataclass(frozen=True)
class Operator:
    """A fused operator.

    ``refuse`` answers None or the reason from the specification alone; ``emit`` writes the nodes and returns
    the result in the layout of the one it replaces, or raises
    :class:`fusepass.exporters.onnx_operands.Refused`.
    """

    name: str
    refuse: Callable[[Attention, Target], str | None]
    emit: Callable[[Site, OnnxBuilder, Target], ir.Value]
