"""What a compiled graph relies on beyond Dynamo's guards, and what happens when it does not hold.

Buffers are compared at every call, and arguments that must not overlap are asked for their storages.
While all of it holds, the graph that was fused with that knowledge runs; otherwise the original graph runs,
compiled anew with nothing assumed of buffers, and with the arguments as they overlap now.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fusepass.contents import Snapshot
from fusepass.report import GraphReport
from fusepass.surroundings import clean_context

log = logging.getLogger("fusepass")

Compiled = Callable[..., Any]


def static_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The placeholders of ``gm`` that stand for tensors held by a module and not learned: its buffers.

    Dynamo marks what a module holds, so that CUDA graphs need not copy it; that mark is read here.
    """
    found = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, example_inputs, strict=False):
        if (
            isinstance(value, Tensor)
            and getattr(value, "_dynamo_static_input_type", None) is not None
            and not isinstance(value, (FakeTensor, torch.nn.Parameter))
            and not value.requires_grad
            and value.layout is torch.strided
            and not (value.is_inference() and value.device.type != "cpu")  # no version to guard
        ):
            found[node.name] = value
    return found


class Original:
    """A graph module, and those inside it, as they were before the pass."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._root = gm
        self._saved = [
            (name, m, _copied(m.graph)) for name, m in gm.named_modules() if isinstance(m, fx.GraphModule)
        ]

    def restore(self) -> None:
        """Undo the pass in place."""
        for _, module, graph in self._saved:
            module.graph = graph
            module.recompile()

    def module(self) -> fx.GraphModule:
        """The original as a module of its own."""
        root: fx.GraphModule | None = None
        for name, module, graph in self._saved:
            made = fx.GraphModule(module, _copied(graph))
            if root is None:
                root = made
            else:
                parent, _, last = name.rpartition(".")
                setattr(root.get_submodule(parent), last, made)
        assert root is not None
        return root

    def has_regions(self) -> bool:
        """Does the graph call higher-order operators, whose bodies are graph modules of their own?"""
        return len(self._saved) > 1


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps what Dynamo attached to the nodes."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        for name, value in vars(old).items():
            vars(new).setdefault(name, value)
    return copied


def guarded(
    compiled: Compiled,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    report: GraphReport,
    original: Original,
    backend: Compiled,
) -> Compiled:
    """``compiled`` as long as what the report says it relies on holds, the original graph otherwise.

    Args:
        compiled: the fused graph; gm: the module it was compiled from; example_inputs: its inputs.
        report: names the placeholders whose elements are ``assumed``, and those that must lie ``apart``.
        original: the graph before the pass.
        backend: compiles the original, when it is needed.
    """
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    with clean_context():
        snapshots = [(names.index(n), Snapshot(example_inputs[names.index(n)])) for n in report.assumed]
    apart = [(names.index(n), group) for group, listed in enumerate(report.apart) for n in listed]
    otherwise: list[Compiled] = []

    def run(*args: Any) -> Any:
        with clean_context(draws=False):
            changed = not all(snapshot.holds(args[at]) for at, snapshot in snapshots)
        if not changed and not _overlap(args, apart):
            return compiled(*args)
        if not otherwise:
            if changed:
                log.warning("fusepass: a buffer changed that a fused graph relied on; compiling without it")
            module = original.module()
            otherwise.append(module if original.has_regions() else torch.compile(module, backend=backend))
        return otherwise[0](*args)

    return run


def _overlap(args: Sequence[Any], apart: Sequence[tuple[int, int]]) -> bool:
    """Do tensors of different groups share a storage?  Tensors without memory of their own do not."""
    groups: dict[int, int] = {}
    for at, group in apart:
        value = args[at]
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.layout is torch.strided:
            address = value.untyped_storage().data_ptr()
            if address and groups.setdefault(address, group) != group:
                return True
    return False


__all__ = ["Original", "guarded", "static_inputs"]
