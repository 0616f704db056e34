"""What the pass may rely on beyond Dynamo's guards: the elements of buffers, as long as they do not change.

A buffer that has changed once is not a constant.  The tensor and its place in the model are both remembered:
later compilations rely on neither.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import CompileContext
from torch.utils.weak import WeakIdKeyDictionary

Place = tuple[int, str]
"""Where a graph finds a tensor: the number of the compiled function, and Dynamo's name for the tensor."""


def static_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], among: Container[Tensor] | None = None
) -> dict[str, Tensor]:
    """The placeholders of ``gm`` that stand for buffers: tensors that a module holds and does not learn.

    Dynamo marks the tensors that a module holds, so that CUDA graphs need not copy them.  That mark is read
    here, unless ``among`` says which tensors count.
    """
    static = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, example_inputs, strict=False):
        if type(value) is not Tensor or value.requires_grad or value.layout is not torch.strided:
            continue
        if value.is_inference() and value.device.type != "cpu":
            continue  # an inference tensor has no version counter, which guards on a GPU compare
        held = getattr(value, "_dynamo_static_input_type", None) is not None
        if (held if among is None else value in among) and not _changes(value, place_of(node)):
            static[node.name] = value
    return static


# -- what was learned ------------------------------------------------------------------------

#: Tensors that have been seen to change.
_tensors: WeakIdKeyDictionary = WeakIdKeyDictionary()
#: Places whose tensors have been seen to change.
_places: set[Place] = set()


def note_changing(tensors: Iterable[Tensor]) -> None:
    """From now on, do not rely on the elements of these tensors."""
    for tensor in tensors:
        _tensors[tensor] = True


def note_place(place: Place) -> None:
    """From now on, do not rely on any tensor found at this place."""
    _places.add(place)


def forget_places() -> None:
    """Forget all places, because ``torch._dynamo.reset`` numbers functions from the beginning."""
    _places.clear()


def _changes(tensor: Tensor, place: Place | None) -> bool:
    return tensor in _tensors or place in _places


def place_of(node: fx.Node) -> Place | None:
    """The place of a placeholder's tensor; None if Dynamo does not tell it."""
    frame = getattr(CompileContext.current_compile_id(), "frame_id", None)
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name  # older versions of torch have a method, newer ones a property
    return None if frame is None or not isinstance(name, str) else (frame, name)


# -- the graph before the pass ---------------------------------------------------------------


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
        """The original as a separate module, whose nodes keep only their source lines."""
        root: fx.GraphModule | None = None
        for name, module, graph in self._saved:
            bare = copy.deepcopy(graph)
            for node in bare.nodes:
                node.meta = {k: v for k, v in node.meta.items() if k == "stack_trace"}
            part = fx.GraphModule(module, bare)
            if root is None:
                root = part
            else:
                parent, _, last = name.rpartition(".")
                setattr(root.get_submodule(parent), last, part)
        assert root is not None
        return root


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps what Dynamo attached to the nodes."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        for name, value in vars(old).items():
            vars(new).setdefault(name, value)
    return copied


__all__ = ["Original", "Place", "forget_places", "note_changing", "note_place", "place_of", "static_inputs"]
