"""Functions of several steps that are one node in a graph: the steps are written next to the node.

Dynamo records ``torch.nn.functional.multi_head_attention_forward`` as a single call.  Its steps are written
in front of it so that the pass can read them.  If nothing in them is fused, they are removed again and the
call stays.  A call that cannot be written out stays too, with the reason.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusepass.dialects.torch.expansion import Expansion
from fusepass.dialects.torch.kept import written_out
from fusepass.dialects.torch.nodes import is_pytorchs, replaced_function, size_of, value_of
from fusepass.host.faults import first_line, strict
from fusepass.host.surroundings import graph_context

log = logging.getLogger("fusepass")


def expand_all(graph: fx.Graph) -> tuple[list[Expansion], list[tuple[fx.Node, str]]]:
    """Write out every composite call; the second list has the calls that stay, with their reasons."""
    expansions = list(written_out(graph))
    stay: list[tuple[fx.Node, str]] = []
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target in COMPOSITES]
    calls = [n for n in calls if is_pytorchs(n.target)]
    live = _reaching_output(graph) if calls else set()
    for call in calls:
        expansion = _expand(call, COMPOSITES[call.target], live)
        if isinstance(expansion, Expansion):
            expansion.engage()
            expansions.append(expansion)
        else:
            stay.append((call, expansion))
    return expansions, stay


def _reaching_output(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(u in live for u in node.users):
            live.add(node)
    return live


def _expand(call: fx.Node, steps: Callable[..., Any], live: set[fx.Node]) -> Expansion | str:
    if not all(u.target is operator.getitem and isinstance(u.args[1], int) for u in call.users):
        return "its results are passed on as a tuple"
    if name := replaced_function(call.target, steps.__code__.co_names):  # type: ignore[arg-type]
        return f"it calls '{name}', which somebody has replaced by another function"
    before = set(call.graph.nodes)
    try:
        results = _written(call, steps, before, any(u in live and int(u.args[1]) != 0 for u in call.users))  # type: ignore[arg-type]
    except Exception as error:
        _erase_new(call.graph, before)
        if strict():
            raise
        reason = f"writing it out failed: {first_line(error)}"
        log.warning("fusepass: '%s' stays: %s", call.name, reason, exc_info=True)
        return reason
    if isinstance(results, str):
        _erase_new(call.graph, before)
        return results
    new_nodes = [n for n in call.graph.nodes if n not in before]
    return Expansion(call, new_nodes, tuple(r.node if isinstance(r, fx.Proxy) else None for r in results))


def _written(
    call: fx.Node, steps: Callable[..., Any], before: set[fx.Node], others_read: bool
) -> tuple[Any, ...] | str:
    """The results of the steps, which are written in front of the call with fake values; or why they are not.

    The steps get the arguments by the names of the function's parameters, with defaults filled in.
    """
    mode = next((m for n in call.all_input_nodes if (m := getattr(value_of(n), "fake_mode", None))), None)
    if mode is None:
        return "the types of its arguments are not recorded"
    given = inspect.signature(call.target).bind(*call.args, **call.kwargs)  # type: ignore[arg-type]
    given.apply_defaults()
    with call.graph.inserting_before(call):
        tracer = fx.proxy.GraphAppendingTracer(call.graph)
        arguments = {
            k: fx.node.map_aggregate(v, lambda a: _argument(a, tracer)) for k, v in given.arguments.items()
        }
        results: tuple[Any, ...] | str = steps(others_read, **arguments)
    if not isinstance(results, str):
        _give_values(call, [n for n in call.graph.nodes if n not in before], mode)
    return results


def _erase_new(graph: fx.Graph, before: set[fx.Node]) -> None:
    for node in reversed([n for n in graph.nodes if n not in before]):
        graph.erase_node(node)


def _argument(value: Any, tracer: Any) -> Any:
    """A node as a proxy, except a float whose value is known: that is passed as a number."""
    if not isinstance(value, fx.Node):
        return value
    known = value_of(value)
    if isinstance(known, torch.SymFloat) and known.node.expr.is_number:
        return float(known.node.expr)
    return fx.Proxy(value, tracer)


def _give_values(call: fx.Node, steps: list[fx.Node], mode: Any) -> None:
    """Compute the fake values of new nodes."""
    key = "example_value" if "example_value" in call.meta else "val"
    with graph_context(), mode:
        for node in steps:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            if node.op == "call_method":
                node.meta[key] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta[key] = node.target(*args, **kwargs)  # type: ignore[operator]
            for name in ("stack_trace", "nn_module_stack"):
                if name in call.meta:
                    node.meta[name] = call.meta[name]


def multi_head_attention(
    weights_read: bool, query: Any, key: Any, value: Any, embed_dim_to_check: Any, num_heads: Any,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Any, out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None, k_proj_weight: Any = None, v_proj_weight: Any = None, static_k: Any = None,
    static_v: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Any, Any] | str:  # fmt: skip
    """The steps of ``multi_head_attention_forward`` (documentation of ``torch.nn.MultiheadAttention``).

    query: ``[Q, B, E]`` or ``[Q, E]``; key and value: ``[K, B, ...]`` or ``[K, ...]``.  A call whose
    ``embed_dim_to_check`` is not ``E`` raises an error by itself.
    """
    if not training:
        dropout_p = 0.0
    if weights_read:
        return "its attention weights are read"
    if isinstance(dropout_p, fx.Proxy):
        return "its dropout probability is not known"
    if static_k is not None or static_v is not None:
        return "its keys or values are passed already projected"
    embed_dim, heads = size_of(value_of(query.node).shape[-1]), num_heads
    if not isinstance(embed_dim, int) or not isinstance(heads, int):
        return "its width or the number of its heads is not known when it is compiled"
    dtype, alone = value_of(query.node).dtype, value_of(query.node).dim() == 2
    if alone:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    if use_separate_proj_weight:
        projections = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        projections = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, projections[n], None if in_proj_bias is None else biases[n])
        for n, x in enumerate((query, key, value))
    )
    length, batch, width = query.size(0), query.size(1), embed_dim // heads
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, more.repeat(1, batch, 1)]) for x, more in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.reshape(x.size(0), batch, heads, width).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (k, v))
    mask = _joint_mask(attn_mask, key_padding_mask, batch, heads, dtype)
    own = (bias_k is not None and bias_v is not None) + bool(add_zero_attn)
    if own and mask is not None:
        mask = F.pad(mask, (0, own))  # every query sees the module's own keys
    if need_weights:
        scores = torch.matmul(q * math.sqrt(1.0 / width), k.transpose(-2, -1))
        scores = scores if mask is None else scores + mask
        weights = F.softmax(scores, dim=-1)
        weights = F.dropout(weights, p=dropout_p) if dropout_p > 0 else weights
        out = torch.matmul(weights, v)
    else:
        causal = is_causal and key_padding_mask is None
        out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout_p, causal)
    out = out.permute(2, 0, 1, 3).reshape(length, batch, embed_dim)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    return (out.squeeze(1) if alone else out), None


def _joint_mask(attn_mask: Any, key_padding_mask: Any, batch: Any, heads: int, dtype: torch.dtype) -> Any:
    """Both masks as one tensor to add, ``[B | 1, H | 1, Q | 1, K]``."""
    total = None
    for mask, place in ((attn_mask, _attn_mask), (key_padding_mask, _padding)):
        if mask is None:
            continue
        shaped = place(mask, batch, heads)
        if value_of(mask.node).dtype is torch.bool:
            shaped = torch.zeros_like(shaped, dtype=dtype).masked_fill(shaped, -math.inf)
        total = shaped if total is None else total + shaped
    return total


def _attn_mask(mask: Any, batch: Any, heads: int) -> Any:
    if value_of(mask.node).dim() == 2:
        return mask
    return mask.reshape(batch, heads, mask.size(1), mask.size(2))


def _padding(mask: Any, batch: Any, heads: int) -> Any:
    if value_of(mask.node).dim() == 1:
        return mask.reshape(1, 1, 1, -1)
    return mask.reshape(batch, 1, 1, mask.size(1))


COMPOSITES: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention}
