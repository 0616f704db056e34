"""Marks in the programs that TorchInductor generates: lines before and after the kernels of a fused site.

Two operators stand in Inductor's last graph where a site begins and ends. They are lowered to nothing: what
was lowered between them are the site's own operations, and the calls among these write the lines. So fusions,
layouts, memory and order are those of the program without marks.

Imported where Inductor is about to be called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator
from torch.utils._ordered_set import OrderedSet

from fusepass.compilation.profiler_ranges import extents


def write_marks(graph: fx.Graph) -> None:
    """Put a mark before and after the nodes of every site."""
    for label, first, last in extents(graph):
        device = _device(first) if isinstance(first.target, HigherOrderOperator) else ""
        with graph.inserting_before(first):
            graph.call_function(_enter(), (label, device)).meta["val"] = None
        with graph.inserting_after(last):
            graph.call_function(_leave(), (label, device)).meta["val"] = None


def _device(node: fx.Node) -> str:
    """The device of a node's result, with its number."""
    value = node.meta.get("val")
    parts: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
    return next((str(part.device) for part in parts if isinstance(part, torch.Tensor)), "cpu")


@functools.cache
def _library() -> Any:
    """Two operators that do nothing but stand in a graph."""
    library = torch.library.Library("fusepass", "FRAGMENT")
    for name in ("range_enter", "range_leave"):
        library.define(f"{name}(str label, str template_on) -> ()")
        library.impl(name, lambda label, template_on: None, "CompositeExplicitAutograd")
        fx.node.has_side_effect(getattr(torch.ops.fusepass, name).default)
    return library


def _enter() -> Any:
    _library()
    return torch.ops.fusepass.range_enter.default


def _leave() -> Any:
    _library()
    return torch.ops.fusepass.range_leave.default


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


class Mark(ir.ExternKernel):
    """Lines of their own, where a template writes the call: an operation without operands or results.

    The scheduler is asked for an order that forbids nothing: a mark comes before a template, or after one.
    """

    def __init__(self, device: str, lines: tuple[str, ...]) -> None:
        super().__init__(None, ir.NoneLayout(device=torch.device(device)), [])
        self.lines = lines
        self.buffer = V.graph.register_buffer(self)
        self.name = self.buffer
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        """Write the lines."""
        _codegen(lambda _: None, self.lines, (), wrapper)

    def should_allocate(self) -> bool:
        """There is no result."""
        return False

    def has_side_effects(self) -> bool:
        """It is kept, though nothing reads it."""
        return True

    def get_unbacked_symbol_defs(self) -> Any:
        """No sizes are made."""
        return OrderedSet()


def _must_follow(operation: Any, buffer: str) -> None:
    """Have the scheduler put an operation behind what writes a buffer, which lives no longer for it."""
    V.graph.additional_buffer_deps[operation.operation_name].add(buffer)


class Opened(NamedTuple):
    """A site whose last node was not lowered yet."""

    operations: int
    """How many there were before it."""
    mark: Mark | None
    """Where its record is opened, if a template comes first."""


#: By graph and label.
_opened: dict[tuple[int, str], Opened] = {}


def enter(label: str, template_on: str) -> None:
    """Note that the next operations are of a site, which begins with a template on a device, or with none."""
    mark = Mark(template_on, _opening(label)) if template_on else None
    _opened[id(V.graph), label] = Opened(len(V.graph.operations), mark)


def leave(label: str, template_on: str) -> None:
    """Open a record before the first call that a site was lowered to, and close it after the last."""
    operations, mark = _opened.pop((id(V.graph), label), (len(V.graph.operations), None))
    calls = [op for op in V.graph.operations[operations:] if _is_call(op)]
    if not calls:
        return
    # Where Inductor cuts the program in parts, the record was closed with the part that opened it.
    closing = f"try: {variable(label)}.__exit__(None, None, None)", "except NameError: pass"
    if mark is not None:
        _must_follow(calls[0], mark.buffer)
    else:
        _around(calls[0], _opening(label), ())
    if isinstance(calls[-1], ir.TemplateBuffer):
        _must_follow(Mark(str(calls[-1].get_device()), closing), calls[-1].get_name())
    else:
        _around(calls[-1], (), closing)


def _opening(label: str) -> tuple[str, str]:
    record = variable(label)
    return f"{record} = torch._C._profiler._RecordFunctionFast({label!r})", f"{record}.__enter__()"


def _is_call(operation: Any) -> bool:
    """Is an operation a call of a kernel, and neither a part of a result nor a buffer that others fill?"""
    silent = (ir.MultiOutput, ir.NopKernel, Mark)
    return isinstance(operation, (ir.ExternKernel, ir.TemplateBuffer)) and not isinstance(operation, silent)


def _around(call: Any, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Write lines with a call."""
    if isinstance(call, ir.ExternKernel):
        call.codegen = partial(_codegen, call.codegen, before, after)  # type: ignore[method-assign]


def _codegen(
    codegen: Callable[[Any], None], before: tuple[str, ...], after: tuple[str, ...], wrapper: Any
) -> None:
    """The code of a call, between lines; without them where the program is in C++."""
    for line in () if V.graph.cpp_wrapper else before:
        wrapper.writeline(line)
    codegen(wrapper)
    for line in () if V.graph.cpp_wrapper else after:
        wrapper.writeline(line)


def variable(label: str) -> str:
    """`fusepass 3: causal, sdpa, ...` is in `_fusepass_3`, its backward pass in `_fusepass_3_backward`."""
    number = label.split(":", 1)[0].rpartition(" ")[2]
    return f"_fusepass_{number}" + "_backward" * label.endswith(", backward")


def register() -> None:
    """Teach Inductor the two operators that stand for marks in a graph."""
    register_lowering(_enter(), type_promotion_kind=None)(enter)
    register_lowering(_leave(), type_promotion_kind=None)(leave)


__all__ = ["Mark", "Marking", "enter", "leave", "register", "variable", "write_marks"]
