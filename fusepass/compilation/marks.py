"""Marks in the programs that TorchInductor generates: lines before and after the kernels of a fused site.

In Inductor's final graph, two operators stand where a site begins and ends. They are lowered to nothing: the
operations that are lowered between them are the site's own, and the calls among these write the lines. So
fusions, layouts, memory and order are the same as without marks.

This module is imported only when Inductor is about to be called.
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
    """Two operators that do nothing; they only stand in a graph."""
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
    """The custom pass that writes marks into Inductor's final graph, after the user's own passes."""

    def __init__(self, labels: tuple[str, ...], before: tuple[Callable[[fx.Graph], None], ...]) -> None:
        self.labels, self.before = labels, before

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.before:
            one(graph)
        write_marks(graph)

    def uuid(self) -> Any:
        """The cache key of the code; None (no caching) if one of the user's passes has no key."""
        theirs = [getattr(one, "uuid", lambda: None)() for one in self.before]
        return None if None in theirs else (get_hash_for_files((__file__,)), self.labels, *theirs)


class Mark(ir.ExternKernel):
    """Lines before or after a call that a template writes: an operation without operands or results.

    The order that a mark imposes on the scheduler prevents no fusion: it comes before or after a template.
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
        """False: there is no result."""
        return False

    def has_side_effects(self) -> bool:
        """True: it must be kept although nothing reads it."""
        return True

    def get_unbacked_symbol_defs(self) -> Any:
        """None: it creates no sizes."""
        return OrderedSet()


def _must_follow(operation: Any, buffer: str) -> None:
    """Make the scheduler put an operation after a buffer's writer, without extending the buffer's life."""
    V.graph.additional_buffer_deps[operation.operation_name].add(buffer)


class Opened(NamedTuple):
    """A site whose last node has not been lowered yet."""

    operations: int
    """How many operations there were before it."""
    mark: Mark | None
    """The mark that opens its record, if a template comes first."""


#: By graph and label.
_opened: dict[tuple[int, str], Opened] = {}


def enter(label: str, template_on: str) -> None:
    """Note that a site begins here; ``template_on`` is the device of a template that comes first, if any."""
    mark = Mark(template_on, _opening(label)) if template_on else None
    _opened[id(V.graph), label] = Opened(len(V.graph.operations), mark)


def leave(label: str, template_on: str) -> None:
    """Open a record before the first call of a lowered site, and close it after the last."""
    operations, mark = _opened.pop((id(V.graph), label), (len(V.graph.operations), None))
    calls = [op for op in V.graph.operations[operations:] if _is_call(op)]
    if not calls:
        return
    # If Inductor splits the program into parts, the record was already closed with the part that opened it.
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
    """Is an operation the call of a kernel, and not a part of a result or a buffer that others fill?"""
    silent = (ir.MultiOutput, ir.NopKernel, Mark)
    return isinstance(operation, (ir.ExternKernel, ir.TemplateBuffer)) and not isinstance(operation, silent)


def _around(call: Any, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Make a call write lines before and after itself."""
    if isinstance(call, ir.ExternKernel):
        call.codegen = partial(_codegen, call.codegen, before, after)  # type: ignore[method-assign]


def _codegen(
    codegen: Callable[[Any], None], before: tuple[str, ...], after: tuple[str, ...], wrapper: Any
) -> None:
    """The code of a call between its lines; a program in C++ gets no lines."""
    for line in () if V.graph.cpp_wrapper else before:
        wrapper.writeline(line)
    codegen(wrapper)
    for line in () if V.graph.cpp_wrapper else after:
        wrapper.writeline(line)


def variable(label: str) -> str:
    """`_fusepass_3` for `fusepass 3: causal, sdpa, ...`, and `_fusepass_3_backward` for its backward pass."""
    number = label.split(":", 1)[0].rpartition(" ")[2]
    return f"_fusepass_{number}" + "_backward" * label.endswith(", backward")


def register() -> None:
    """Teach Inductor the two operators that stand for marks in a graph."""
    register_lowering(_enter(), type_promotion_kind=None)(enter)
    register_lowering(_leave(), type_promotion_kind=None)(leave)


__all__ = ["Mark", "Marking", "enter", "leave", "register", "variable", "write_marks"]
