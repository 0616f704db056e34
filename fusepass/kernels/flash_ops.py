"""flash-attn 2, 3 and 4 as operators of ``torch.ops.fusepass``, with fake kernels and gradients.

The three libraries share one signature, so that compilers, ``torch.export`` and DTensor see opaque operators
and none of the libraries' own autograd functions::

    flashN(q, k, v, extra?, scale, left?, right?, softcap, dropout) -> (out, lse, rng)

``q`` is ``[B, Q, H, D]``, ``k`` and ``v`` are ``[B, K, G, D]`` and ``[B, K, G, Dv]``, float16 or bfloat16,
in any strides with a contiguous last dimension; ``out`` is ``[B, Q, H, Dv]``, ``lse`` is float32
``[B, H, Q]``, and ``rng`` is what the backward pass needs to draw the dropout again.  Query ``i`` sees the
keys ``i + K - Q - left <= j <= i + K - Q + right``; None means unbounded.  ``extra`` is a float32 ``[H]``:
the sink for flash 4, the ALiBi slopes for flash 2.

Sources: Dao (arXiv 2307.08691), Shah et al. (arXiv 2407.08608), and the interfaces of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

NAMES = ("flash2", "flash3", "flash4")
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? extra, float scale, int? left, int? right, "
    "float softcap, float dropout"
)
_BACKWARD = f"Tensor grad, {_FORWARD}, Tensor out, Tensor lse, Tensor rng"

Window = tuple[int | None, int | None]
Results = tuple[Tensor, ...]


class Library(Protocol):
    """The forward and backward functions of a library, in this module's terms."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float, window: Window,
        softcap: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...  # fmt: skip

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float,
        window: Window, softcap: float, dropout: float, out: Tensor, lse: Tensor, rng: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...  # fmt: skip


def is_causal(window: Window) -> bool:
    """Is it the window for which the libraries have a flag?"""
    return window == (None, 0)


def minus_one(window: Window) -> tuple[int, int]:
    """A window as flash 2 and 3 write it: -1 is unbounded."""
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


class Flash2:
    """``flash_attn`` 2: the operators of its compiled extension."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self.interface = flash_attn_interface

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float, window: Window,
        softcap: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        left, right = minus_one(window)
        out, lse, _, rng = self.interface._flash_attn_forward(
            q, k, v, dropout, scale, is_causal(window), left, right, softcap, extra, False
        )
        return out, lse, rng

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float,
        window: Window, softcap: float, dropout: float, out: Tensor, lse: Tensor, rng: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        left, right = minus_one(window)
        self.interface._flash_attn_backward(
            grad, q, k, v, out, lse, dq, dk, dv, dropout, scale, is_causal(window), left, right, softcap,
            extra, torch.are_deterministic_algorithms_enabled(), rng_state=rng,
        )  # fmt: skip
        return dq, dk, dv, None


class Flash3:
    """``flash_attn_interface``: Hopper only.  The schema of its operators is the same in all releases."""

    def __init__(self) -> None:
        import flash_attn_interface  # noqa: F401  (it registers them)

        self.interface = torch.ops.flash_attn_3

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float, window: Window,
        softcap: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        out, lse, *_ = self.interface.fwd(
            *(_dense(t) for t in (q, k, v)), softcap=softcap, num_splits=1, **_flash3_settings(scale, window)
        )
        return out, lse, None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float,
        window: Window, softcap: float, dropout: float, out: Tensor, lse: Tensor, rng: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        self.interface.bwd(
            grad, *(_dense(t) for t in (q, k, v)), out, lse, dq, dk, dv, softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_flash3_settings(scale, window),
        )  # fmt: skip
        return dq, dk, dv, None

    def rounded(
        self, q: Tensor, k: Tensor, v: Tensor, descales: tuple[Tensor, Tensor, Tensor], scale: float,
        causal: bool,
    ) -> Tensor:  # fmt: skip
        """Attention of e4m3 tensors; each has a scale ``[B, G]`` per batch and key/value head."""
        of_q, of_k, of_v = descales
        window: Window = (None, 0 if causal else None)
        out: Tensor = self.interface.fwd(
            q, k, v, q_descale=of_q, k_descale=of_k, v_descale=of_v, num_splits=1,
            **_flash3_settings(scale, window),
        )[0]  # fmt: skip
        return out


def _flash3_settings(scale: float, window: Window) -> dict[str, Any]:
    left, right = minus_one(window)
    return {
        "softmax_scale": scale, "is_causal": is_causal(window), "window_size_left": left,
        "window_size_right": right,
    }  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """The tensor, copied if the elements of a head are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Flash4:
    """``flash_attn.cute``: kernels are compiled at first use, and the library caches them on disk."""

    def __init__(self) -> None:
        from flash_attn.cute import interface

        self.interface = interface

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float, window: Window,
        softcap: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        out, lse, *_ = self.interface._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=is_causal(window),
            window_size_left=window[0], window_size_right=None if is_causal(window) else window[1],
            softcap=softcap or None, learnable_sink=extra, return_lse=True,
        )  # fmt: skip
        return out, lse, None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float,
        window: Window, softcap: float, dropout: float, out: Tensor, lse: Tensor, rng: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        more = {} if extra is None else {"learnable_sink": extra}
        gradients = self.interface._flash_attn_bwd(
            q, k, v, out, grad, lse, scale, is_causal(window), softcap,
            window_size_left=window[0], window_size_right=None if is_causal(window) else window[1],
            deterministic=torch.are_deterministic_algorithms_enabled(), dq=dq, dk=dk, dv=dv, **more,
        )  # fmt: skip
        return gradients[0], gradients[1], gradients[2], None if extra is None else gradients[3]


_LIBRARIES: dict[str, Callable[[], Library]] = {"flash2": Flash2, "flash3": Flash3, "flash4": Flash4}


@cache
def library(name: str) -> Library:
    """The library behind an operator, imported at first use."""
    return _LIBRARIES[name]()


# ---------------------------------------------------------------------------------------- operators


def _forward(name: str) -> Callable[..., Results]:
    def run(q, k, v, extra, scale, left, right, softcap, dropout):  # type: ignore[no-untyped-def]
        out, lse, rng = library(name).forward(q, k, v, extra, scale, (left, right), softcap, dropout)
        return out, lse, q.new_empty(0, dtype=torch.int64) if rng is None else rng

    return run


def _forward_fake(name: str) -> Callable[..., Results]:
    def shapes(q, k, v, extra, scale, left, right, softcap, dropout):  # type: ignore[no-untyped-def]
        batch, queries, heads, _ = q.shape
        # flash 2 lays its result out like the queries; the others make it contiguous.
        out = torch.empty_like(q) if name == "flash2" else q.new_empty((batch, queries, heads, v.shape[3]))
        lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
        return out, lse, q.new_empty(2 if name == "flash2" else 0, dtype=torch.int64)

    return shapes


def _backward(name: str) -> Callable[..., Results]:
    def run(grad, q, k, v, extra, scale, left, right, softcap, dropout, out, lse, rng):  # type: ignore[no-untyped-def]
        gradients = library(name).backward(
            grad.contiguous(), q, k, v, extra, scale, (left, right), softcap, dropout, out, lse, rng
        )
        more = gradients[3]
        return (*gradients[:3], q.new_empty(0, dtype=torch.float32) if more is None else more)

    return run


def _backward_fake(grad, q, k, v, extra, scale, left, right, softcap, dropout, out, lse, rng):  # type: ignore[no-untyped-def]
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    more = q.new_empty(0, dtype=torch.float32) if extra is None else torch.empty_like(extra)
    return (*grads, more)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, extra, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, extra, *output)
    ctx.set_materialize_grads(False)


def _gradient(name: str) -> Callable[..., tuple[Any, ...]]:
    operator = getattr(torch.ops.fusepass, f"{name}_backward")

    def backward(ctx, grad, grad_lse, grad_rng):  # type: ignore[no-untyped-def]
        q, k, v, extra, out, lse, rng = ctx.saved_tensors
        if grad is None:
            return (None,) * 9
        dq, dk, dv, more = operator(grad, q, k, v, extra, *ctx.settings, out, lse, rng)
        learned = more if name == "flash4" and extra is not None else None
        return dq, dk, dv, learned, None, None, None, None, None

    return backward


_definitions = torch.library.Library("fusepass", "FRAGMENT")


def _define(name: str) -> None:
    tags = [torch.Tag.pt2_compliant_tag]
    seeded = [torch.Tag.nondeterministic_seeded] if name == "flash2" else []
    _definitions.define(f"{name}({_FORWARD}) -> (Tensor, Tensor, Tensor)", tags=(*tags, *seeded))
    _definitions.define(f"{name}_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)", tags=tags)
    _definitions.impl(name, _forward(name), "CUDA")
    _definitions.impl(f"{name}_backward", _backward(name), "CUDA")
    torch.library.register_fake(f"fusepass::{name}", _forward_fake(name), lib=_definitions)
    torch.library.register_fake(f"fusepass::{name}_backward", _backward_fake, lib=_definitions)
    torch.library.register_autograd(
        f"fusepass::{name}", _gradient(name), setup_context=_save, lib=_definitions
    )


for _name in NAMES:
    _define(_name)


def shard_heads() -> None:
    """Tell DTensor that these operators shard by batch and by heads, without communication.

    With grouped heads, sharding by heads is possible if the mesh divides the key/value heads; DTensor
    decides.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def forward(q, k, v, extra, *settings):  # type: ignore[no-untyped-def]
        none = [None] * len(settings)
        keep = None if extra is None else Replicate()
        heads = None if extra is None else Shard(0)
        return [
            ([Replicate()] * 3, [Replicate()] * 3 + [keep, *none]),
            ([Shard(0), Shard(0), Replicate()], [Shard(0)] * 3 + [keep, *none]),
            ([Shard(2), Shard(1), Replicate()], [Shard(2)] * 3 + [heads, *none]),
        ]

    def backward(grad, q, k, v, extra, *settings):  # type: ignore[no-untyped-def]
        none = [None] * (len(settings) - 3)
        keep = None if extra is None else Replicate()
        heads = None if extra is None else Shard(0)
        summed = Replicate() if extra is None else Partial()
        per_head = Replicate() if extra is None else Shard(0)
        return [
            ([Replicate()] * 4, [*[Replicate()] * 4, keep, *none, *[Replicate()] * 3]),
            ([*[Shard(0)] * 3, summed], [*[Shard(0)] * 4, keep, *none, Shard(0), Shard(0), Replicate()]),
            ([*[Shard(2)] * 3, per_head], [*[Shard(2)] * 4, heads, *none, Shard(2), Shard(1), Replicate()]),
        ]

    for name in NAMES:
        register_sharding(getattr(torch.ops.fusepass, name).default)(forward)
        register_sharding(getattr(torch.ops.fusepass, f"{name}_backward").default)(backward)


__all__ = ["NAMES", "Library", "is_causal", "library", "minus_one", "shard_heads"]
