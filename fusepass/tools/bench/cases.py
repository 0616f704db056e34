"""What `fusepass bench` measures: attention as people write it, and equivalent library calls by hand.

Tensors are ``[B, S, H, D]``, as projections make them; a program returns ``[B, S, H * D]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Program = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of one measurement."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int


@dataclass(frozen=True)
class Variant:
    """One kind of attention.

    kind: what the cost model calls it (:func:`fusepass.selection.work.kind_of`).
    kernels: the names of the kernels that take it, separated by spaces.
    hand: the same computation as calls of one library, by name.  "hand" calls ignore that a row may see no
        key; "repaired" calls return there what the program returns, although the data here has no such rows.
        "prepared" calls are given ready-made what depends on data, such as the block table of a padding,
        which a model makes once per step.
    pairs: the number of visible query-key pairs of one head, from which TFLOP/s are computed.
    extra: makes the inputs besides queries, keys and values.
    group: how many query heads share a key/value head.
    cross: are there half as many keys as queries?
    decode: is there a single query?
    learns: the inputs besides queries, keys and values that need a gradient.
    forward, backward: is this pass measured?
    """

    name: str
    kind: str
    kernels: str
    program: Program
    pairs: Callable[[Shape], float]
    hand: dict[str, Callable[..., Any]] = field(default_factory=dict)
    extra: Callable[[Shape, torch.device], Inputs] = lambda shape, device: {}
    group: int = 1
    cross: bool = False
    decode: bool = False
    learns: tuple[str, ...] = ()
    forward: bool = True
    backward: bool = True

    def shape(self, length: int, head_dim: int, tokens: int = 16384, width: int = 2048) -> Shape:
        """The sizes for a length: ``tokens`` in total and ``width`` features, as in models."""
        heads = max(1, width // head_dim)
        batch = max(1, tokens // length)
        queries = 1 if self.decode else length
        keys = length // 2 if self.cross else length
        return Shape(batch, heads, max(1, heads // self.group), queries, keys, head_dim)

    def inputs(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random tensors."""
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((shape.queries, shape.heads), (shape.keys, shape.kv_heads), (shape.keys, shape.kv_heads))
        tensors = {
            name: torch.randn(
                shape.batch, n, h, shape.head_dim, device=device, dtype=dtype, generator=generator
            )
            for name, (n, h) in zip("qkv", sizes, strict=True)
        }
        return tensors | {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in self.extra(shape, device).items()
        }


# ---------------------------------------------------------------------------------------- as people write it


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _merged(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def _gap(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1], device=s.device) - torch.arange(s.shape[-2], device=s.device)[:, None]


def _weights(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1, dtype=torch.float32).to(v.dtype)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    return _merged(_weights(_scores(q, k), v) @ v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = _scores(q, k)
    return _merged(_weights(s.masked_fill(_gap(s) > 0, -math.inf), v) @ v)


WINDOW = 1024


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = _scores(q, k)
    gap = _gap(s)
    return _merged(_weights(s.masked_fill((gap > 0) | (gap <= -WINDOW), -math.inf), v) @ v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = 50.0 * torch.tanh(_scores(q, k) / 50.0)
    return _merged(_weights(s.masked_fill(_gap(s) > 0, -math.inf), v) @ v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = _scores(q, k)
    gap = _gap(s)
    s = s + slopes[:, None, None] * gap
    return _merged(_weights(s.masked_fill(gap > 0, -math.inf), v) @ v)


def bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    return _merged(_weights(_scores(q, k) + table, v) @ v)


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = _scores(q, k)
    seen = (_gap(s) <= 0) & keep[:, None, None, :]
    return _merged(_weights(s.masked_fill(~seen, torch.finfo(s.dtype).min), v) @ v)


def sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    s = _scores(q, k)
    s = s.masked_fill(_gap(s) > 0, -math.inf)
    column = sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)
    return _merged(_weights(torch.cat([s, column], -1), v)[..., :-1] @ v)


def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    return _merged(F.dropout(_weights(_scores(q, k), v), 0.1) @ v)


# ---------------------------------------------------------------------------------------- by hand


def _sdpa(**options: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, **extra: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return _merged(
            F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        )

    return call


def _sdpa_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _merged(F.scaled_dot_product_attention(q, k, v, attn_mask=table))


def _sdpa_bias_repaired(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Keep the bias above half the lowest number of its dtype.

    It hides just as much, and does not overflow in kernels that compute powers of two.
    """
    return _sdpa_bias(q, k, v, table.clamp(min=torch.finfo(table.dtype).min / 2))


def _sdpa_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = (
        torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() & keep[:, None, None, :]
    )
    return _merged(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


_FLASH = {
    "flash2": "flash_attn.flash_attn_interface",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
}
"""The module in which each release of flash-attn has its ``flash_attn_func``."""


def _flash(name: str, **options: Any) -> Callable[..., Any]:
    """A call of flash-attn 2, 3 or 4. Slopes and sinks are passed only if there are any."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        more: dict[str, Tensor] = {}
        if slopes is not None:
            more["alibi_slopes"] = slopes.float()
        if sinks is not None:
            more["learnable_sink"] = sinks
        result = import_module(_FLASH[name]).flash_attn_func(q, k, v, **options, **more)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.flatten(2)

    return call


def _flashes(*names: str, **options: Any) -> dict[str, Callable[..., Any]]:
    return {f"hand {name}": _flash(name, **options) for name in names}


def _flex_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Apply the sink to the result: the log-sum-exp tells what share of the weights it leaves to the keys."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    global _compiled_flex
    _compiled_flex = _compiled_flex or torch.compile(flex_attention, dynamic=False)
    run = _compiled_flex if q.is_cuda else flex_attention  # on a CPU the compiled call returns no log-sum-exp
    key = (q.shape[1], k.shape[1], q.device)
    if key not in _sink_masks:
        _sink_masks[key] = create_block_mask(_below({}), None, None, key[0], key[1], device=q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, aux = run(
        q, k, v, block_mask=_sink_masks[key], enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return _merged((out * torch.sigmoid(aux.lse - sinks[:, None]).unsqueeze(-1)).to(v.dtype))


_sink_masks: dict[Any, Any] = {}
_compiled_flex: Any = None
_compiled_repair: Any = None


def _flex(
    score: Any = None, mask: Any = None, backend: str = "AUTO", prepared: bool = True, repaired: bool = False
) -> Callable[..., Any]:
    """FlexAttention as in its documentation, compiled once.

    Args:
        prepared: is the block mask made once, in advance, as it can be if it depends on no data?
        repaired: do rows that see no key return the mean of all values, as in :func:`padding`, and not zero?
    """
    masks: dict[Any, Any] = {}
    mods: dict[Any, Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor, **extra: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        global _compiled_flex, _compiled_repair
        _compiled_flex = _compiled_flex or torch.compile(flex_attention, dynamic=False)
        _compiled_repair = _compiled_repair or torch.compile(_repair, dynamic=False)
        key = (q.shape, k.shape, id(extra.get("keep")))
        if mask is not None and (key not in masks or not prepared):
            batch = q.shape[0] if "keep" in extra else None
            mods.setdefault(key, mask(extra))
            masks[key] = create_block_mask(
                mods[key], batch, None, q.shape[1], k.shape[1], device=q.device,
                _compile=q.is_cuda and not prepared,
            )  # fmt: skip
        out = _compiled_flex(
            *(t.transpose(1, 2) for t in (q, k, v)),
            score_mod=None if score is None else score(extra), block_mask=masks.get(key),
            enable_gqa=q.shape[2] != k.shape[2],
            kernel_options=None if backend == "AUTO" else {"BACKEND": backend},
        )  # fmt: skip
        return _merged(_compiled_repair(out, v, extra["keep"]) if repaired else out)

    return call


def _repair(out: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    seen = keep.cumsum(1) > 0
    mean = v.mean(1, keepdim=True).transpose(1, 2).repeat_interleave(out.shape[1] // v.shape[2], 1)
    return torch.where(seen[:, None, :, None], out, mean)


def _below(extra: Inputs) -> Any:
    return lambda b, h, i, j: j <= i


def _near(extra: Inputs) -> Any:
    return lambda b, h, i, j: (j <= i) & (i - j < WINDOW)


def _valid(extra: Inputs) -> Any:
    keep = extra["keep"]
    return lambda b, h, i, j: (j <= i) & keep[b, j]


def _capped(extra: Inputs) -> Any:
    return lambda s, b, h, i, j: 50.0 * torch.tanh(s / 50.0)


def _sloped(extra: Inputs) -> Any:
    slopes = extra["slopes"].detach()
    return lambda s, b, h, i, j: s + slopes[h] * (j - i)


# ---------------------------------------------------------------------------------------- the list


def _all(shape: Shape) -> float:
    return float(shape.queries * shape.keys)


def _half(shape: Shape) -> float:
    return shape.queries * (shape.queries + 1) / 2


def _band(shape: Shape) -> float:
    n, w = shape.queries, min(WINDOW, shape.queries)
    return w * (w + 1) / 2 + (n - w) * w


def _keep(shape: Shape, device: torch.device) -> Inputs:
    """Key masks with lengths from half of the keys to all of them."""
    lengths = torch.linspace(shape.keys / 2, shape.keys, shape.batch, device=device)
    return {"keep": torch.arange(shape.keys, device=device) < lengths[:, None]}


def _slopes(shape: Shape, device: torch.device) -> Inputs:
    return {"slopes": 2.0 ** (-8.0 * torch.arange(1, shape.heads + 1, device=device) / shape.heads)}


def _sinks(shape: Shape, device: torch.device) -> Inputs:
    return {"sinks": torch.randn(shape.heads, device=device)}


def _table(shape: Shape, device: torch.device) -> Inputs:
    return {"table": torch.randn(1, shape.heads, shape.queries, shape.keys, device=device)}


_ANY = "sdpa cudnn flash2 flash3 flash4 flex"
_PLAIN = {"hand sdpa": _sdpa(), **_flashes("flash4", "flash3", "flash2")}
_CAUSAL = {"hand sdpa": _sdpa(is_causal=True), **_flashes("flash4", "flash3", "flash2", causal=True)}
_WINDOW = (WINDOW - 1, 0)

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("full", "full", _ANY, full, _all, _PLAIN),
        Variant("causal", "causal", _ANY, causal, _half, _CAUSAL),
        Variant("gqa", "causal", _ANY, causal, _half, _CAUSAL, group=4),
        Variant("mqa", "causal", _ANY, causal, _half, _CAUSAL, group=1 << 20),
        Variant(
            "window", "window", "sdpa flash2 flash3 flash4 flex flex_flash", window, _band,
            {**_flashes("flash4", "flash3", "flash2", window_size=_WINDOW), "hand flex": _flex(mask=_near)},
            group=4,
        ),
        Variant(
            "softcap", "causal+softcap", "flash2 flash3 flash4 flex flex_flash", softcap, _half,
            {**_flashes("flash4", "flash3", "flash2", causal=True, softcap=50.0),
             "hand flex": _flex(_capped, _below)},
        ),
        Variant(
            "alibi", "causal+thin bias", "sdpa flash2 flash4 flex flex_flash", alibi, _half,
            {**_flashes("flash2", causal=True), "hand flex": _flex(_sloped, _below),
             "hand flex_flash": _flex(_sloped, _below, "FLASH")},
            _slopes,
        ),
        Variant(
            "sink", "causal+sink", "sdpa flash4 flex", sink, _half,
            {**_flashes("flash4", causal=True), "hand flex": _flex_sink}, _sinks, group=4,
        ),
        Variant(
            "bias", "full+bias", "sdpa cudnn flex", bias, _all,
            {"hand sdpa": _sdpa_bias, "repaired sdpa": _sdpa_bias_repaired}, _table,
        ),
        Variant(
            "learned", "full+learned bias", "sdpa flex", bias, _all,
            {"hand sdpa": _sdpa_bias, "repaired sdpa": _sdpa_bias_repaired}, _table, learns=("table",),
            forward=False,
        ),
        Variant(
            "padding", "padding", "sdpa flash4 flex flex_flash", padding, _half,
            {"hand sdpa": _sdpa_padding, "hand flex": _flex(mask=_valid, prepared=False),
             "hand flex_flash": _flex(mask=_valid, backend="FLASH", prepared=False),
             "repaired flex": _flex(mask=_valid, prepared=False, repaired=True),
             "repaired flex_flash": _flex(mask=_valid, backend="FLASH", prepared=False, repaired=True),
             "prepared flex": _flex(mask=_valid), "prepared flex_flash": _flex(mask=_valid, backend="FLASH")},
            _keep,
        ),
        Variant(
            "dropout", "full+dropout", "sdpa cudnn flash2", dropout, _all,
            {"hand sdpa": _sdpa(dropout_p=0.1), **_flashes("flash2", dropout_p=0.1)},
        ),
        Variant("cross", "full", _ANY, full, _all, _PLAIN, cross=True),
        Variant("decode", "one query", _ANY, full, _all, _PLAIN, group=4, decode=True, backward=False),
    )
}  # fmt: skip

__all__ = ["VARIANTS", "WINDOW", "Inputs", "Shape", "Variant"]
