"""Functions that Dynamo was told not to trace (``allow_in_graph``): their steps are written next to the call.

AOTAutograd traces such a function later in any case, with the same fake tensors.  Here it is traced before
the pass, into the operators that it calls before autograd.  A function stays one call where tracing could
change what it does: under autocast or a transform, with a gradient of its own, or where its result is not a
new tensor.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusepass.dialects.torch.expansion import Expansion
from fusepass.dialects.torch.nodes import is_pytorchs, value_of
from fusepass.host.surroundings import graph_context

log = logging.getLogger("fusepass")

#: The metadata that a call's steps copy from the call.
_SOURCE = ("stack_trace", "nn_module_stack")


def written_out(graph: fx.Graph) -> Iterator[Expansion]:
    """Write out the calls of functions that are not PyTorch's, and use the steps' results."""
    calls = [n for n in graph.nodes if n.op == "call_function" and _is_kept(n.target)]
    if not calls or _is_surrounded(graph):
        return
    for call in calls:
        try:
            traced = _trace(call)
        except Exception:  # what cannot be traced stays one call; where it matters, the report names it
            log.debug("fusepass: '%s' is not written out", call.name, exc_info=True)
            continue
        if traced is not None and (expansion := _copied(call, *traced)) is not None:
            expansion.engage()
            yield expansion


def _is_kept(target: Any) -> bool:
    return isinstance(target, types.FunctionType) and not is_pytorchs(target)


def _is_surrounded(graph: fx.Graph) -> bool:
    """Is a part of the graph, or all of it, under autocast or a transform of ``torch.func``?"""
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return True
    names = (str(getattr(n.target, "__name__", n.target)) for n in graph.nodes)
    return any("autocast" in n or "_increment_nesting" in n for n in names)


def _trace(call: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The function as a graph, and the nodes that its placeholders stand for."""
    flat, structure = tree_flatten((call.args, dict(call.kwargs)))
    nodes = list(dict.fromkeys(a for a in flat if isinstance(a, fx.Node)))
    values = [value_of(n) for n in nodes]
    if not nodes or not all(isinstance(v, torch._subclasses.FakeTensor) for v in values):
        return None

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(zip(nodes, tensors, strict=True))
        args, kwargs = tree_unflatten([given.get(a, a) for a in flat], structure)
        out = call.target(*args, **kwargs)  # type: ignore[operator]
        return out if isinstance(out, torch.Tensor) else None

    with graph_context(), values[0].fake_mode:
        learning = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
        with torch.enable_grad():
            out = run(*learning)
        if not isinstance(out, torch.Tensor) or _has_own_gradient(out):
            return None
        return make_fx(run, tracing_mode="real", pre_dispatch=True)(*values), nodes


def _has_own_gradient(out: torch.Tensor) -> bool:
    """Does a ``torch.autograd.Function`` take part in computing a tensor?"""
    todo, seen = [out.grad_fn], {None, out.grad_fn}
    while todo:
        step = todo.pop()
        if isinstance(step, torch.autograd.function.BackwardCFunction):
            return True
        unseen = [] if step is None else [n for n, _ in step.next_functions if n not in seen]
        seen.update(unseen)
        todo.extend(unseen)
    return False


def _copied(call: fx.Node, traced: fx.GraphModule, given: list[fx.Node]) -> Expansion | None:
    """The steps, written in front of the call; None if the result is not a new tensor, or a step writes."""
    place = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    steps, result = [], traced.graph.output_node().args[0]
    others = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    if result not in others or not all(map(_is_pure, others)):
        return None
    key = "example_value" if "example_value" in call.meta else "val"
    with call.graph.inserting_before(call):
        for node in others:
            step = place[node] = call.graph.node_copy(node, place.__getitem__)
            step.meta = {name: call.meta[name] for name in _SOURCE if name in call.meta}
            step.meta[key] = node.meta["val"]
            steps.append(step)
    return Expansion(call, steps, place[result])


def _is_pure(node: fx.Node) -> bool:
    """Does the node compute a size, or call an operator that writes to no argument and is not random?"""
    target = node.target
    if "val" not in node.meta:
        return False
    if isinstance(node.meta["val"], torch.types.py_sym_types):
        return node.op == "call_function"
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


__all__ = ["written_out"]
