"""Marks in the programs that TorchInductor generates: lines before and after the kernels of a fused site.

Two operators stand in Inductor's last graph where a site begins and ends. They are lowered to nothing: what
was lowered between them are the site's own operations, and the calls among these write the lines. So fusions, layouts, memory and order are those of the program without marks.

Imported where Inductor is about to be called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from fusepass.ranges import write_marks


class Marking(CustomGraphPass):
    """The custom pass that writes marks into Inductor's last graph, after the passes of the user."""

    def __init__(self, labels: tuple[str, ...], before: tuple[Callable[[fx.Graph], None], ...]) -> None:
        self.labels, self.before = labels, before

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.before:
            one(graph)
        write_marks(graph)

    def uuid(self) -> Any:
        """What the code depends on; None (it is not cached) where a pass of the user says so."""
        theirs = [getattr(one, "uuid", lambda: None)() for one in self.before]
        return None if None in theirs else (get_hash_for_files((__file__,)), self.labels, *theirs)


#: How many operations there were when a site's first node was lowered, by graph and label.
_opened: dict[tuple[int, str], int] = {}


def enter(label: str) -> None:
    """Note that the next operations are of a site."""
    _opened[id(V.graph), label] = len(V.graph.operations)


def leave(label: str) -> None:
    """Open a record before the first call that a site was lowered to, and close it after the last."""
    start = _opened.pop((id(V.graph), label), len(V.graph.operations))
    calls = [op for op in V.graph.operations[start:] if isinstance(op, (ir.ExternKernel, ir.TemplateBuffer))]
    calls = [op for op in calls if not isinstance(op, ir.MultiOutput)]
    if V.graph.cpp_wrapper or not calls:
        return
    record = variable(label)
    opening = f"{record} = torch._C._profiler._RecordFunctionFast({label!r})", f"{record}.__enter__()"
    # Where Inductor cuts the program in parts, the record was closed with the part that opened it.
    closing = f"try: {record}.__exit__(None, None, None)", "except NameError: pass"
    _write(calls[0], opening, ())
    _write(calls[-1], (), closing)


def _write(call: Any, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Write lines with a call; where a template writes the call, in operations of their own."""
    if isinstance(call, ir.ExternKernel):
        call.codegen = partial(_codegen, call.codegen, before, after)  # type: ignore[method-assign]
    elif before:
        mark = Mark(call.get_device(), before)
        known = {buffer.get_name() for buffer in V.graph.buffers[: V.graph.buffers.index(call)]}
        mark.follow(call.get_read_names() & known)
        must_follow(call, [mark.buffer])
    else:
        Mark(call.get_device(), after).follow([call.get_name()])


def _codegen(
    codegen: Callable[[Any], None], before: tuple[str, ...], after: tuple[str, ...], wrapper: Any
) -> None:
    """The code of a call, between lines."""
    for line in before:
        wrapper.writeline(line)
    codegen(wrapper)
    for line in after:
        wrapper.writeline(line)


class Mark(ir.ExternKernel):
    """Lines between kernels: an operation without operands or results.

    The scheduler is asked for an order that forbids nothing: a mark comes before a template, into which
    nothing is fused, and after what that reads; or it comes after a template, and nothing need come after it.
    """

    def __init__(self, device: torch.device, lines: tuple[str, ...]) -> None:
        super().__init__(None, ir.NoneLayout(device=device), [])
        self.lines = lines
        self.buffer = V.graph.register_buffer(self)
        self.name = self.buffer
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        """Write the lines."""
        for line in self.lines:
            wrapper.writeline(line)

    def follow(self, names: Iterable[str]) -> None:
        """Stand behind what writes these buffers, which live no longer for it."""
        must_follow(self, names)

    def should_allocate(self) -> bool:
        """There is no result."""
        return False

    def has_side_effects(self) -> bool:
        """It is kept, though nothing reads it."""
        return True

    def get_unbacked_symbol_defs(self) -> Any:
        """No sizes are made."""
        return OrderedSet()


def must_follow(operation: Any, names: Iterable[str]) -> None:
    """Have the scheduler put an operation behind what writes these buffers."""
    V.graph.additional_buffer_deps[operation.operation_name].update(names)


def variable(label: str) -> str:
    """`fusepass 3: causal, sdpa, ...` is in `_fusepass_3`, its backward pass in `_fusepass_3_backward`."""
    number = label.split(":", 1)[0].rpartition(" ")[2]
    return f"_fusepass_{number}" + "_backward" * label.endswith(", backward")


def register(entering: Any, leaving: Any) -> None:
    """Teach Inductor the two operators that stand for marks in a graph."""
    register_lowering(entering, type_promotion_kind=None)(enter)
    register_lowering(leaving, type_promotion_kind=None)(leave)


__all__ = ["Mark", "Marking", "enter", "leave", "register", "variable"]
