"""What a target can do; and what an operator takes, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import onnx_ir as ir

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Modifier
from fusepass.specification.takes import Takes


@dataclass(frozen=True)
class Target:
    """A runtime that models are written for: one row of the table in :mod:`.targets`.

    By default a target reads everything that the specification of its operators allows.

    Attributes:
        name: what ``target=`` calls it.
        reader: who reads its files, as named in reasons.
        operators: what it is offered, in order of preference.
        opset: the version of ``ai.onnx`` that the model imports; in the table, the default.
        lacks: the kinds of modifiers that it does not read in any operator.
        caches: does it read the past keys and values of Attention, and write the present ones?
        lengths: does it read the lengths of the keys, ``nonpad_kv_seqlen``?
        causal_with_mask: does it read ``is_causal`` beside a mask?
        mild_fills: are masks faster with fills just above the lowest number of their dtype?
        rotary: does it have RotaryEmbedding?
    """

    name: str
    reader: str
    operators: tuple[Operator, ...]
    _: KW_ONLY
    opset: int = 24
    lacks: tuple[type[Modifier], ...] = ()
    caches: bool = True
    lengths: bool = True
    causal_with_mask: bool = True
    mild_fills: bool = True
    rotary: bool = True

    @property
    def since(self) -> int:
        """The oldest version of ``ai.onnx`` in which it has an operator; 0 for any."""
        return min(operator.since for operator in self.operators)

    @property
    def takes_lengths(self) -> bool:
        """Does Attention, in the model's version, have an input for the lengths of the keys?"""
        return self.lengths and self.opset >= 24

    def refuse(self, spec: Attention) -> str | None:
        """A reason that names the first modifier it does not read; None if it reads them all."""
        missing = (m for m in spec.modifiers if isinstance(m, self.lacks))
        return next((f"{self.reader} reads no {type(m).__name__.lower()}" for m in missing), None)


def nothing_more(spec: Attention, target: Target) -> str | None:
    """The default of ``Operator.more``: the operator takes everything that it declares."""
    return None


@dataclass(frozen=True)
class Operator:
    """A fused operator.

    Attributes:
        name: what ONNX calls it.
        takes: the specifications that it computes; all others are refused.
        emit: writes the nodes and returns the result in the layout of the one it replaces, or raises
            :class:`fusepass.exporters.onnx.operands.Refused`.
        more: further reasons to refuse a specification that it takes.
        since: the first version of ``ai.onnx`` that has it; 0 for an operator of another domain.
    """

    name: str
    takes: Takes
    emit: Callable[[Site, OnnxBuilder, Target], ir.Value]
    more: Callable[[Attention, Target], str | None] = nothing_more
    since: int = 0

    def refuse(self, spec: Attention, target: Target) -> str | None:
        """Why it does not compute ``spec``, judged by the specification alone; None if it does."""
        if spec.dropout:
            return "the weights have dropout: export the model in eval mode"
        return next(filter(None, self._reasons(spec, target)), None)

    def _reasons(self, spec: Attention, target: Target) -> Iterator[str | None]:
        yield self.takes.refuse(spec)
        if target.opset < self.since:
            yield f"{self.name} needs opset {self.since}, and the model has {target.opset}"
        yield self.more(spec, target)
        yield target.refuse(spec)
