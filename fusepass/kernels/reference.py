"""``torch.ops.fusepass.attention``: the reference semantics as one opaque operator, with gradients.

With it, recognition can be tested without any library: it computes plain mathematics, forward and backward,
on any device and in any dtype.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from fusepass.kernels.base import Kernel, Target, all_operands, operands
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Attention,
    Cast,
    Dropout,
    Modifier,
    ScoreModifier,
    WeightModifier,
    WeightScale,
    reference,
    rounds_softmax,
)
from fusepass.specification.derivative import gradients
from fusepass.specification.program import decode, encode, slots
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder


def compute(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str) -> Tensor:
    """Run a program on tensors ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``."""
    code = decode(program)
    return reference(code.spec(q, k, v, len(tensors)), q, k, v, tensors).contiguous()


def compute_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str
) -> list[Tensor]:
    """The gradients of :func:`compute` for q, k, v and every operand."""
    code = decode(program)
    grads = gradients(code.spec(q, k, v, len(tensors)), grad, q, k, v, tensors)
    return [g.to(t.dtype).contiguous() for g, t in zip(grads, (q, k, v, *tensors), strict=True)]


def _operator(name: str) -> tuple[Any, Any]:
    """Two operators: :func:`.attention.reference` as ``fusepass::name``, and its gradients.

    The arguments of the operator; its backward takes the gradient of the result first, then the same ones:
        q: ``[B, H, Q, D]``; k: ``[B, G, K, D]``; v: ``[B, G, K, Dv]``.
        tensors: operands of the program, broadcastable to ``[B, H, Q, K]``.
        program: modifiers as written by :func:`fusepass.specification.program.encode`.
    """
    forward = torch.library.custom_op(f"fusepass::{name}", compute, mutates_args=())
    backward = torch.library.custom_op(f"fusepass::{name}_backward", compute_gradients, mutates_args=())

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
        return q.new_empty(shape, dtype=decode(program).out_dtype)

    @backward.register_fake
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v, *tensors)]

    def setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        q, k, v, tensors, ctx.program = inputs
        ctx.save_for_backward(q, k, v, *tensors)

    def differentiate(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, *tensors = ctx.saved_tensors
        grads = backward(grad, q, k, v, tensors, ctx.program)
        given = [g if t.is_floating_point() else None for g, t in zip(grads[3:], tensors, strict=True)]
        return grads[0], grads[1], grads[2], given, None

    forward.register_autograd(differentiate, setup_context=setup)
    return forward, backward


attention, attention_backward = _operator("attention")
#: The same, kept as it is by compilers: if TorchInductor expanded it, it would omit the roundings.
rounded, rounded_backward = _operator("attention_rounded")


def let_inductor_inline() -> None:
    """Make TorchInductor expand both operators, and fuse their steps like those of the model itself."""
    from torch._inductor import decomposition

    table = decomposition.decompositions
    if attention._opoverload not in table:
        table[attention._opoverload] = compute
        table[attention_backward._opoverload] = compute_gradients
        decomposition.fast_random_decomps.cache_clear()  # it copies the table at first use


#: Up to these numbers of queries and keys, plain mathematics is no slower than SDPA on a CPU (docs/cpu.md).
#: The first holds in inference and the second in training, both in bfloat16 if the processor multiplies it
#: natively; the third holds in float32, in training with a mask.
SHORT, SHORT_IN_TRAINING, SHORT_WITH_MASK = 128, 256, 32


def refuse(spec: Attention, target: Target) -> str | None:
    """Why plain mathematics is not worth writing, although it computes every specification.

    It is no faster than the original graph.  So unless it was requested, it serves only training, where it
    keeps no weights; short sequences on a CPU; and compiled sites that round scores or weights: it rounds as
    the program says, where the compiler would keep wider numbers.
    """
    if target.requested or target.training or beats_sdpa(spec, target):
        return None
    if target.compiled and rounds(spec):
        return None
    return "plain mathematics is what the graph has already"


def rounds(spec: Attention) -> bool:
    """Does the original round scores or weights to less precision than its operands have?"""
    casts = any(isinstance(m, Cast) for m in spec.scores)
    return casts or rounds_softmax(spec.softmax_dtype, spec.dtype)


def beats_sdpa(spec: Attention, target: Target) -> bool:
    """Was compiled plain mathematics measured no slower than SDPA?  A length that may grow counts as long.

    That is the case for short sequences on a CPU: processors with bfloat16 products multiply faster in
    bfloat16 than in float32, but SDPA's kernel does not gain from that, and its backward is slower still.
    """
    if target.device != "cpu" or not target.compiled:
        return False
    limit = 0
    if spec.dtype is torch.bfloat16 and multiplies_bfloat16():
        limit = SHORT_IN_TRAINING if target.training else SHORT
    elif spec.dtype is torch.float32 and target.training and spec.added and not spec.is_causal():
        limit = SHORT_WITH_MASK
    return all(isinstance(n, int) and n <= limit for n in (spec.queries, spec.keys))


@cache
def multiplies_bfloat16() -> bool:
    """Does this CPU have instructions for bfloat16 products (AVX512-BF16 or AMX)?"""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(ask is not None and ask() for ask in asked)


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the operator; the mask of a dropout is drawn outside the operator, and is one more operand."""
    x = operands(site, build, gated=False)
    spec = site.spec
    tensors = all_operands(site, build)
    if spec.dropout:
        spec, drawn = _drawn(site, build, spec)
        tensors = [*tensors, drawn]
    operator = (rounded if rounds(spec) else attention)._opoverload
    return build.call(operator, x.q, x.k, x.v, tensors, encode(spec))


def _drawn(site: Site, build: Builder, spec: Attention) -> tuple[Attention, fx.Node]:
    """Replace dropout by a multiplication with a random tensor."""
    sizes = [build.size(s) for s in (spec.batch, spec.heads, spec.queries, spec.keys)]
    device = build.value(build.anchor).device
    ones = build.op("full", sizes, 1.0, dtype=spec.softmax_dtype, device=device)
    drawn = build.op("dropout", ones, spec.dropout, True)
    slot = max([*slots(spec), site.spec.operands]) + 1
    weights = tuple(w for w in spec.weights if not isinstance(w, Dropout))
    return replace(spec, weights=(*weights, WeightScale(1.0, slot, "bhij"))), drawn


TAKES = Takes(
    ((ScoreModifier,),), (WeightModifier,), sink=True, learned=(Modifier,), factors="pairs", fills="written",
    rows="written", hiding_biases=True, no_keys=True,
)  # fmt: skip
REFERENCE = Kernel("reference", TAKES, emit, refuse)
