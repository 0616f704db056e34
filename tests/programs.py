"""Attention programs from axes: every program is one choice on each axis, written out as source text.

A program looks like hand-written code: plain torch, no helper functions, so a failing test can print it and
anyone can run it. Legend as in the engine: `B` batch, `H` query heads, `G` key/value heads, `Q` query length,
`K` key length, `D`, `E` head sizes of keys and values; in source `n` and `m` are Q and K.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, CAP, WINDOW, CHUNK, PREFIX, P_DROP = 0.35, 5.0, 3, 2, 2, 0.3
TRANSPOSED = "transposed"


@dataclass(frozen=True)
class Sizes:
    """Sizes of one program's inputs; `G` is given where heads are grouped."""

    B: int = 2
    H: int = 4
    G: int = 2
    Q: int = 6
    K: int = 6
    D: int = 8
    E: int = 8


SQUARE, CROSS, NARROW = Sizes(), Sizes(Q=5, K=7), Sizes(E=4)


@dataclass(frozen=True)
class Program:
    """One choice on every axis."""

    layout: str = "4d"
    heads: str = "equal"
    product: str = "matmul"
    scale: str = "mul"
    bias: str = "none"
    function: str = "none"
    mask: str = "none"
    build: str = "arange"
    join: str = "and"
    apply: str = "masked_fill"
    fill: str = "-inf"
    softmax: str = "function"
    after: str = "none"
    dropout: str = "none"
    inplace: str = "no"
    dtype: str = "float32"
    sizes: Sizes = field(default_factory=Sizes)

    def __str__(self) -> str:
        """The choices that differ from the default ones."""
        default = Program()
        chosen = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name != "sizes" and getattr(self, f.name) != getattr(default, f.name)
        ]
        s = self.sizes
        return ",".join(chosen + [f"B{s.B}H{s.H}G{s.G}Q{s.Q}K{s.K}D{s.D}E{s.E}"] * (s != SQUARE)) or "plain"

    @property
    def masks(self) -> tuple[str, ...]:
        """The meanings whose conjunction is the mask."""
        return () if self.mask == "none" else tuple(self.mask.split("+"))

    @property
    def kv_heads(self) -> int:
        """Key/value heads as given."""
        return {"equal": self.sizes.H, "single": 1}.get(self.heads, self.sizes.G)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of q, k and v."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------- axes

#: Lines that bring the given q, k, v into the program's layout.
_GIVEN = {
    "bshd": "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",
    "packed": "q, k, v = (x.view(*x.shape[:2], -1, x.shape[2] // {H}).transpose(1, 2) for x in (q, k, v))",
}
_REPEATED = {
    "interleave": "{x} = {x}.repeat_interleave({g}, dim={d})",
    "expand": "{x} = {x}.unsqueeze({d1}).expand({minus}, {g}, -1, -1).flatten({d}, {d1})",
    "reshape": "{x} = {x}.unsqueeze({d1}).expand({minus}, {g}, -1, -1).reshape({ones}, {H}, *{x}.shape[-2:])",
    "repeat": "{x} = {x}.repeat({repeats})",
}
_SCORES = {
    "matmul": "torch.matmul(q, k.transpose(-2, -1))",
    "@": "q @ k.mT",
    "einsum": 'torch.einsum("...qd,...kd->...qk", q, k)',
    "bmm": "torch.bmm({q3}, {k3}.transpose(1, 2)){back}",
    "baddbmm": "torch.baddbmm(q.new_empty(1, 1, 1), {q3}, {k3}.mT, beta=0, alpha={alpha}){back}",
    "mul-sum": "(q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)",
}
_RESULTS = {
    "matmul": "torch.matmul(w, v)",
    "@": "w @ v",
    "einsum": 'torch.einsum("...qk,...kd->...qd", w, v)',
    "bmm": "torch.bmm({w3}, {v3}){back}",
    "baddbmm": "torch.bmm({w3}, {v3}){back}",
    "mul-sum": "torch.matmul(w, v)",
}
#: (line before the product, line after the product)
_SCALES = {
    "none": ("", ""),
    "mul": ("", "s = s * {c}"),
    "div": ("", "s = s / {inverse}"),
    "sqrt": ("", "s = s / math.sqrt(q.shape[-1])"),
    "q": ("q = q * {c}", ""),
    "k": ("k = {c} * k", ""),
    "both": ("q, k = q * {root}, k / {inverse_root}", ""),
    "negative": ("", "s = s * -{c}"),
    "tensor": ("", "s = s * temperature"),
    "on q by tensor": ("q = q * temperature", ""),
    "0-d": ("", "s = s / divisor"),
    "constant tensor": ("", "s = s / torch.sqrt(torch.tensor(8.0, dtype=s.dtype))"),
    "twice": ("q = q * 0.5", "s = s / 2.0"),
}
_SOFTMAXES = {
    "function": "w = F.softmax(s, dim={dim})",
    "method": "w = s.softmax({dim})",
    "torch": "w = torch.softmax(s, {dim})",
    "module": "w = torch.nn.Softmax(dim={dim})(s)",
    "float32": "w = F.softmax(s, dim={dim}, dtype=torch.float32).to(q.dtype)",
    "upcast": "w = torch.softmax(s.float(), dim={dim}).type_as(q)",
    "log": "w = F.log_softmax(s, dim={dim}).exp()",
    "exp": "e = torch.exp(s); w = e / e.sum({dim}, keepdim=True)",
    "safe": "e = torch.exp(s - s.max({dim}, keepdim=True).values); w = e / e.sum(dim={dim}, keepdim=True)",
    "amax": "e = (s - s.amax({dim}, keepdim=True)).exp(); w = e * e.sum({dim}, keepdim=True).reciprocal()",
    "clamped": "e = (s - s.amax({dim}, keepdim=True)).exp(); w = e / e.sum({dim}, keepdim=True).clamp(1e-6)",
    "logsumexp": "w = torch.exp(s - torch.logsumexp(s, {dim}, keepdim=True))",
}
_FILLS = {"-inf": 'float("-inf")', "min": "torch.finfo(s.dtype).min", "-1e9": "-1e9", "-1e4": "-1e4"}
_APPLIED = {
    "masked_fill": "s = s.masked_fill(~{m}, {fill})",
    "masked_fill_": "s.masked_fill_(~{m}, {fill})",
    "where": "s = torch.where({m}, s, {fill})",
    "where tensor": "s = torch.where({m}, s, torch.full([], {fill}, dtype=s.dtype))",
    "additive": "s = s + torch.zeros({m}.shape, dtype=s.dtype).masked_fill(~{m}, {fill})",
    "additive where": "s = s + torch.where({m}, torch.zeros_like(s), {fill})",
    "iadd": "s += torch.zeros({m}.shape, dtype=s.dtype).masked_fill_({m}.logical_not(), {fill})",
    "setitem": "s[(~{m}).expand_as(s)] = {fill}",
    "index_put": "s = s.index_put(((~{m}).expand_as(s),), torch.tensor({fill}, dtype=s.dtype))",
    "index_put_": "s.index_put_(((~{m}).expand_as(s),), s.new_full((), {fill}))",
    "inverted": "s = s + (1.0 - {m}.to(s.dtype)) * {fill}",
    "subtracted": "s = s - (~{m}).to(s.dtype) * -{fill}",
    "multiplied": "s = s * {m} + (1.0 - {m}.to(s.dtype)) * {fill}",
}
#: these layouts write their products themselves
_OWN_PRODUCT = frozenset({"einsum", "einsum out", TRANSPOSED, "vpt"})
_WRITTEN_OUT = frozenset({"exp", "log", "logsumexp", "safe", "amax", "clamped"})
_ADDITIVE = frozenset({"additive", "additive where", "iadd", "inverted", "subtracted", "multiplied"})
_FINITE_ONLY = frozenset({"inverted", "subtracted", "multiplied"})
_AFTER = {"none": "", "masked": "w = w.masked_fill(~{m}, 0.0)", "times": "w = w * {m}"}
_DROPOUTS = {
    "none": "",
    "p=0": "w = F.dropout(w, 0.0, training=True)",
    "eval": "w = F.dropout(w, {p}, training=False)",
    "training": "w = F.dropout(w, {p}, training=True)",
}
_I, _J = "torch.arange(n)[:, None]", "torch.arange(m)[None, :]"
_ONES = "torch.ones(n, m, dtype=torch.bool)"
#: meaning -> construction -> boolean tensor, True where it attends, broadcastable to [B, H, Q, K]
_MASKS: dict[str, dict[str, str]] = {
    "causal": {
        "arange": f"({_J} <= {_I})",
        "tril": f"{_ONES}.tril()",
        "triu": f"(~{_ONES}.triu(1))",
        "buffer": "tril[:, :, :n, :m]",
        "difference": f"(({_I} - {_J}) >= 0)",
        "indices": f"{_ONES}.index_put(tuple(torch.triu_indices(n, m, 1)), torch.tensor(False))",
    },
    "offset": {
        "arange": f"({_J} <= {_I} + (m - n))",
        "tril": f"{_ONES}.tril(m - n)",
        "triu": f"(~torch.triu({_ONES}, diagonal=m - n + 1))",
        "difference": f"({_I} >= {_J} - (m - n))",
        "indices": f"(~{_ONES}).index_put(tuple(torch.tril_indices(n, m, m - n)), torch.tensor(True))",
    },
    "window": {
        "arange": f"(({_J} <= {_I}) & ({_J} > {_I} - {WINDOW}))",
        "tril": f"{_ONES}.tril().triu({1 - WINDOW})",
        "triu": f"(~({_ONES}.triu(1) | {_ONES}.tril({-WINDOW})))",
        "difference": f"(({_I} - {_J} >= 0) & ({_I} - {_J} < {WINDOW}))",
        "indices": (
            f"{_ONES}.tril().index_put(tuple(torch.tril_indices(n, m, {-WINDOW})), torch.tensor(False))"
        ),
    },
    "band": {
        "arange": f"(({_J} <= {_I} + 1) & ({_J} >= {_I} - {WINDOW}))",
        "tril": f"torch.tril({_ONES}, 1).triu({-WINDOW})",
    },
    "symmetric": {
        "arange": f"(({_I} - {_J}).abs() <= {WINDOW})",
        "tril": f"{_ONES}.tril({WINDOW}).logical_and({_ONES}.triu({-WINDOW}))",
    },
    "padding": {
        "arange": "pad[:, None, None, :]",
        "tril": "(torch.arange(m) < lengths[:, None, None, None])",
    },
    "prefix": {
        "arange": f"(({_J} <= {_I}) | ({_J} < {PREFIX}))",
        "tril": f"{_ONES}.tril() | ({_J} < prefix[:, None, None, None])",
    },
    "document": {"arange": "(labels[:, None, :n, None] == labels[:, None, None, :m])"},
    "chunk": {"arange": f"({_I} // {CHUNK} == {_J} // {CHUNK})"},
    "dense": {"arange": "dense", "tril": "(dense_float > 0)"},
    "all": {"arange": f"({_J} >= 0)", "tril": _ONES},
}
#: conjunctions of two masks
_JOINED = {
    "and": "{} & {}",
    "product": "{} * {}",
    "product of floats": "({}.float() * {}.float() != 0)",
    "minimum": "torch.minimum({}, {})",
    "where": "torch.where({}, {}, False)",
    "integers": "({}.int() & {}.int()).bool()",
    "sum": "({}.long() + {}.long() == 2)",
    "no disjunction": "(~(~{} | ~{}))",
}
#: what the recognised specification says about a mask
_WORDS: dict[str, Callable[[Sizes], str]] = {
    "causal": lambda s: "causal",
    "offset": lambda s: f"causal+{s.K - s.Q}" if s.K != s.Q else "causal",
    "window": lambda s: f"window({WINDOW - 1})",
    "band": lambda s: f"window({WINDOW}, 1)",
    "symmetric": lambda s: f"window({WINDOW}, {WINDOW})",
    "padding": lambda s: "key padding",
    "prefix": lambda s: "prefix",
    "document": lambda s: "document",
    "chunk": lambda s: f"chunk({CHUNK})",
    "dense": lambda s: "mask[bij]",
    "all": lambda s: "",
}
#: name -> (source, letters it varies over)
_BIASES = {
    "none": ("", ""),
    "head": ("bias_h", "hij"),
    "batch": ("bias_b", "bij"),
    "broadcast": ("bias_ij", "ij"),
    "key": ("bias_b[:, :, :1]", "bj"),
    "alibi": (f"slopes[:, None, None] * ({_J} - {_I})", "hij"),
    "alibi key": ("slopes[:, None, None] * torch.arange(m)", "hj"),
    "t5": (f"table[({_J} - {_I}).clamp(-3, 3) + 3].permute(2, 0, 1)", "hij"),
    "embedding": (f"F.embedding(({_J} - {_I}).clamp(-3, 3) + 3, table).permute(2, 0, 1)[None]", "hij"),
    "sum": ("(bias_h + bias_ij)", "hij"),
    "product": ("pos_q @ pos_k.mT", "bij"),
}
#: the features of that product
FEATURES = 3

#: Functions of the scores, and the words of the specification.
_FUNCTIONS: dict[str, tuple[str, str]] = {
    "none": ("", ""),
    "tanh": (f"s = torch.tanh(s / {CAP}) * {CAP}", f"softcap {CAP:g}"),
    "relu": ("s = 1.0 * F.relu(s)", "relu"),
    "leaky": ("s = F.leaky_relu(s, 0.1)", "leaky relu 0.1"),
    "abs": ("s = s.abs()", "abs"),
    "silu": ("s = F.silu(s)", "function mul(s, sigmoid(s))"),
    "clamp": ("s = s.clamp(-0.5, 0.5)", "clamp -0.5 to inf, clamp -inf to 0.5"),
}

AXES: dict[str, tuple[str, ...]] = {
    "layout": ("4d", "bshd", "packed", "kt", "3d", "5d", "einsum", "einsum out", "vpt", TRANSPOSED),
    "heads": ("equal", "interleave", "expand", "reshape", "repeat", "single", "grouped view"),
    "product": tuple(_SCORES),
    "scale": tuple(_SCALES),
    "bias": tuple(_BIASES),
    "function": tuple(_FUNCTIONS),
    "mask": (*("none", *_MASKS), "causal+padding", "window+padding", "causal+document", "causal+chunk"),
    "build": ("arange", "tril", "triu", "buffer", "difference", "indices"),
    "join": tuple(_JOINED),
    "apply": tuple(_APPLIED),
    "fill": tuple(_FILLS),
    "softmax": tuple(_SOFTMAXES),
    "after": tuple(_AFTER),
    "dropout": ("none", "p=0", "eval"),
    "inplace": ("no", "yes"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def valid(p: Program) -> bool:
    """Does the program run, and does every row see a key?"""
    return _fits(p) and (_mask_fits(p) if p.masks else p == _unmasked(p))


def _fits(p: Program) -> bool:
    """Do layout, heads, product, scale, softmax and bias go together?"""
    bmm = p.product in ("bmm", "baddbmm")
    if (p.layout in _OWN_PRODUCT and p.product != "matmul") or (p.layout == "3d") != bmm:
        return False
    if p.heads == "single" and (bmm or p.layout == "packed"):
        return False
    if p.softmax == "exp" and p.dtype == "float16" and "tensor" in p.scale:
        return False  # exp() of scores that are not small, in a dtype that ends at 65504: eager has NaN
    per_head = "h" in _letters(p) or "tensor" in p.scale
    return p.heads != "grouped view" or (p.layout in ("4d", "bshd", "kt") and not per_head)


def _mask_fits(p: Program) -> bool:
    """Do meaning, construction, application and fill go together, in this dtype?"""
    overflows = p.dtype == "float16" and p.fill == "-1e9" and p.apply not in _FINITE_ONLY
    alone = len(p.masks) < 2 and p.join != "and"
    lost = p.softmax in _WRITTEN_OUT and p.fill == "min" and p.apply in _ADDITIVE
    return not (
        p.build not in set().union(*(_MASKS[x] for x in p.masks))
        or (p.fill == "-inf" and p.apply in _FINITE_ONLY)
        or ("offset" in p.masks and p.sizes.K < p.sizes.Q)
        or overflows
        or lost
        or alone
    )


def _unmasked(p: Program) -> Program:
    return replace(p, build="arange", join="and", apply="masked_fill", after="none", fill="-inf")


def _letters(p: Program) -> str:
    return _BIASES[p.bias][1]


# ---------------------------------------------------------------------------------------- source


def source(p: Program) -> str:
    """The program as the text of a function `attention(q, k, v, ...)`."""
    lines = [*_prepared(p), *_products(p), *_modified(p), *_output(p)]
    body = "\n".join(f"    {line}" for line in lines if line)
    return f"def attention({', '.join(inputs(p))}):\n{body}\n"


def _prepared(p: Program) -> Iterator[str]:
    """Layout, repeated heads, scales of the operands, heads folded into the batch."""
    yield _GIVEN.get(p.layout, "").format(H="(x.shape[2] // 8)")
    axis = {"einsum": 2, "einsum out": 2, "5d": 2}.get(p.layout, 1)
    rank = 5 if p.layout == "5d" else 4
    if p.heads == "grouped view":
        yield f"q = q.unflatten(1, (k.shape[1], {p.sizes.H // p.sizes.G}))"
        yield "k, v = k.unsqueeze(2), v.unsqueeze(2)"
    for x in "kv":
        yield _repeated(p, x, axis, rank)
    line = _SCALES[p.scale][0].format(**_numbers())
    yield line.replace("temperature", "temperature[:, 0]") if p.layout in ("einsum", "einsum out") else line
    if p.layout == "3d":
        yield "b, h = q.shape[:2]"
        yield "q, k, v = q.flatten(0, 1), k.reshape(-1, *k.shape[2:]), v.flatten(0, 1)"


def _repeated(p: Program, x: str, axis: int, rank: int) -> str:
    counts = ["1"] * rank
    counts[axis] = str(p.sizes.H // p.sizes.G)
    text = _REPEATED.get(p.heads, "")
    if axis == 2 and rank == 4 and p.heads in ("expand", "reshape"):
        text = "{x} = {x}.unsqueeze(3).expand(-1, -1, -1, {g}, -1).flatten(2, 3)"
    lead = ", ".join(f"{x}.shape[{d}]" for d in range(axis))
    minus = ", ".join(["-1"] * (axis + 1))
    return text.format(
        x=x,
        g=counts[axis],
        d=axis,
        d1=axis + 1,
        H=p.sizes.H,
        repeats=", ".join(counts),
        minus=minus,
        ones=lead,
    )


def _numbers() -> dict[str, float]:
    root = math.sqrt(SCALE)
    return {"c": SCALE, "inverse": 1 / SCALE, "root": root, "inverse_root": 1 / root}


def _products(p: Program) -> Iterator[str]:
    """The scores, and their sizes."""
    text = _SCORES[p.product].format(q3="q", k3="k", back="", alpha=1.5)
    if p.layout == "kt":
        text = text.replace("k.transpose(-2, -1)", "k").replace("k.mT", "k").replace("...kd", "...dk")
        text = text.replace("k.unsqueeze(-3)", "k.mT.unsqueeze(-3)")
    if p.layout in ("einsum", "einsum out"):
        text = 'torch.einsum("bqhd,bkhd->bhqk", q, k)'
    if p.layout == TRANSPOSED:
        text = "k @ q.transpose(-2, -1)"
    yield f"s = {text}"
    yield "m, n = s.shape[-2:]" if p.layout == TRANSPOSED else "n, m = s.shape[-2], s.shape[-1]"


def _modified(p: Program) -> Iterator[str]:
    """Score modifiers, softmax, weight modifiers."""
    dim = -2 if p.layout == TRANSPOSED else -1
    wide = p.layout == "3d"
    if wide:
        yield "s = s.view(b, h, n, m)"
    yield from _scores(p)
    if wide and p.after == "none":
        yield "s = s.view(b * h, n, m)"
    yield _SOFTMAXES[p.softmax].format(dim=dim)
    if p.after != "none":
        yield _AFTER[p.after].format(m="visible")
        if wide:
            yield "w = w.flatten(0, 1)"
    yield _DROPOUTS[p.dropout].format(p=P_DROP)


def _scores(p: Program) -> Iterator[str]:
    yield _in_place(p, _SCALES[p.scale][1].format(**_numbers()))
    if p.function != "none":
        yield _FUNCTIONS[p.function][0]
    if p.bias != "none":
        yield f"bias = {_fitted(p, _BIASES[p.bias][0], len(_letters(p)) > 2)}"
        yield _in_place(p, "s = s + bias.to(s.dtype)")
    if p.masks:
        parts = [_MASKS[x].get(p.build, _MASKS[x]["arange"]) for x in p.masks]
        both = parts[0] if len(parts) == 1 else _JOINED[p.join].format(*parts)
        yield f"visible = {_fitted(p, both, True)}"
        yield _APPLIED[p.apply].format(m="visible", fill=_FILLS[p.fill])


def _fitted(p: Program, text: str, whole: bool) -> str:
    """A tensor over [B, H, Q, K] brought to the layout of the scores."""
    if p.layout == TRANSPOSED:
        return (
            f"({text}).transpose(-2, -1)" if whole or "bias_b" in text or "pos_q" in text else f"({text}).mT"
        )
    if (p.layout == "5d" or p.heads == "grouped view") and any(x in text for x in _PER_BATCH):
        return f"({text}).unsqueeze(1)"
    return text


_PER_BATCH = ("pad[", "lengths[", "prefix[", "labels[", "dense", "bias_b", "tril[", "pos_q")


def _in_place(p: Program, line: str) -> str:
    """`s = s * c` as `s *= c`."""
    for op in "*/+":
        if p.inplace == "yes" and line.startswith(f"s = s {op} "):
            return line.replace(f"s = s {op} ", f"s {op}= ", 1)
    return line


def _output(p: Program) -> Iterator[str]:
    text = _RESULTS[p.product].format(w3="w", v3="v", back="")
    if p.layout in ("einsum", "einsum out"):
        text = f'torch.einsum("bhqk,bkhd->{"bqhd" if p.layout == "einsum" else "bhqd"}", w, v)'
    if p.layout == "vpt":
        text = "(v.mT @ w.transpose(-2, -1)).transpose(-2, -1)"
    if p.layout == TRANSPOSED:
        text = "v.transpose(-2, -1) @ w"
    yield f"out = {text}"
    if p.layout == "3d":
        yield "out = out.view(b, h, *out.shape[1:])"
    if p.heads == "grouped view":
        yield "out = out.flatten(1, 2)"
    merged = "out.transpose(1, 2).contiguous().view(out.shape[0], -1, out.shape[1] * out.shape[3])"
    yield f"return {merged if p.layout in ('bshd', 'packed') else 'out'}"


# ---------------------------------------------------------------------------------------- inputs


def _shapes(p: Program) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    s, g = p.sizes, p.kv_heads
    if p.layout in ("bshd", "einsum", "einsum out"):
        return (s.B, s.Q, s.H, s.D), (s.B, s.K, g, s.D), (s.B, s.K, g, s.E)
    if p.layout == "packed":
        return (s.B, s.Q, s.H * 8), (s.B, s.K, g * 8), (s.B, s.K, g * 8)
    if p.layout == "5d":
        return (s.B, 2, s.H, s.Q, s.D), (s.B, 2, g, s.K, s.D), (s.B, 2, g, s.K, s.E)
    k = (s.B, g, s.D, s.K) if p.layout == "kt" else (s.B, g, s.K, s.D)
    return (s.B, s.H, s.Q, s.D), k, (s.B, g, s.K, s.E)


def _extras(p: Program, g: torch.Generator) -> dict[str, Tensor]:
    """Every tensor that some program may read beside q, k and v."""
    s = p.sizes
    lengths = torch.tensor([max(1, s.K - 2 * (b % 2)) for b in range(s.B)])
    dense = torch.rand(s.B, 1, s.Q, s.K, generator=g) > 0.4
    dense[..., 0] = True
    return {
        "temperature": torch.rand(s.H, 1, 1, generator=g) + 0.5,
        "divisor": torch.tensor(2.5),
        "bias_h": torch.randn(s.H, s.Q, s.K, generator=g),
        "bias_b": torch.randn(s.B, 1, s.Q, s.K, generator=g),
        "bias_ij": torch.randn(s.Q, s.K, generator=g),
        "pos_q": torch.randn(s.B, 1, s.Q, FEATURES, generator=g),
        "pos_k": torch.randn(s.B, 1, s.K, FEATURES, generator=g),
        "slopes": torch.rand(s.H, generator=g),
        "table": torch.randn(7, s.H, generator=g),
        "pad": torch.arange(s.K) < lengths[:, None],
        "lengths": lengths,
        "prefix": torch.arange(s.B) % 3 + 1,
        "labels": (torch.arange(max(s.Q, s.K)) // 3).expand(s.B, -1).contiguous(),
        "dense_float": dense.float(),
        "dense": dense,
        "tril": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(),
    }


def inputs(p: Program, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the program by name: only those that its source reads."""
    g = torch.Generator().manual_seed(seed)
    given = {n: torch.randn(shape, generator=g) for n, shape in zip("qkv", _shapes(p), strict=True)}
    text = "".join((*_scores(p), *_SCALES[p.scale]))
    for name, tensor in _extras(p, g).items():
        if name in text and not (name == "dense" and "dense" not in text.replace("dense_float", "")):
            given[name] = tensor
    return {n: t.to(p.torch_dtype) if t.is_floating_point() else t for n, t in given.items()}


# ---------------------------------------------------------------------------------------- functions


def function(p: Program, exact: bool = False) -> Callable[..., Tensor]:
    """The program as a function; `exact`: every precision it names is float64."""
    text = source(p)
    if exact:
        text = text.replace("float32", "float64").replace(".float()", ".double()")
    return _compiled(text)


@functools.cache
def _compiled(text: str) -> Callable[..., Tensor]:
    name = f"<program {abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(compile(text, name, "exec"), scope)
    return scope["attention"]  # type: ignore[no-any-return]


def words(p: Program) -> list[str]:
    """What the recognised specification must say, by the axes alone."""
    said = [f"Q={p.sizes.Q}", f"K={p.sizes.K}"]
    reached = p.fill != "-1e4" or p.apply not in _ADDITIVE
    said += [_WORDS[x](p.sizes) for x in p.masks if reached and (p.build != "buffer" or x != "causal")]
    said += [_FUNCTIONS[p.function][1]]
    if p.bias == "product":
        said += [f"D={p.sizes.D + FEATURES}"] if _joins(p) else []
    elif p.bias != "none":
        said.append(f"bias[{_letters(p)}]")
    said += [f"H={p.sizes.H} G={p.kv_heads}"] if p.layout != "5d" and p.heads != "equal" else []
    said += [f"dropout {P_DROP:g}"] if p.dropout == "training" else []
    return [word for word in said if word]


def _joins(p: Program) -> bool:
    """Is a second product certain to be joined to the first? Factors must be numbers that the dtype keeps."""
    return p.function == "none" and p.dtype == "float32" and p.scale not in ("tensor", "0-d")


# ---------------------------------------------------------------------------------------- covers


def pairwise(
    axes: Mapping[str, Sequence[str]], seed: int = 0, sizes: Sequence[Sizes] = (SQUARE,)
) -> list[Program]:
    """Programs that together contain every possible pair of choices, found greedily."""
    rng = random.Random(seed)
    names = list(axes)
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    out: list[Program] = []
    failures = 0
    while wanted and failures < 400:
        base = min(rng.sample(sorted(wanted), min(3, len(wanted))))
        tries = [q for _ in range(40) if valid(q := _drawn(rng, axes, dict(base), sizes))]
        best = max(tries, key=lambda q: len(wanted & _pairs(q, names)), default=None)
        gained = wanted & _pairs(best, names) if best is not None else set()
        if best is None or not gained:
            failures += 1
            wanted.discard(base)  # no program has both, as far as drawing shows
            continue
        out.append(best)
        wanted -= gained
    return out


def _drawn(
    rng: random.Random, axes: Mapping[str, Sequence[str]], fixed: dict[str, str], sizes: Sequence[Sizes]
) -> Program:
    chosen = {name: rng.choice(axes[name]) for name in axes} | fixed
    return repaired(Program(**chosen, sizes=rng.choice(sizes)), frozenset(fixed))


def _pairs(p: Program, names: Sequence[str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    chosen = [(name, getattr(p, name)) for name in names]
    return set(itertools.combinations(chosen, 2))


def repaired(p: Program, fixed: frozenset[str] = frozenset()) -> Program:
    """The nearest program without choices that exclude each other; `fixed` axes stay."""

    def put(program: Program, **changes: str) -> Program:
        return replace(program, **{k: v for k, v in changes.items() if k not in fixed})  # type: ignore[arg-type]

    if p.layout in _OWN_PRODUCT:
        p = put(p, product="matmul")
    if p.product in ("bmm", "baddbmm"):
        p = put(p, layout="3d")
    if p.layout == "3d" and p.product not in ("bmm", "baddbmm"):
        p = put(p, product="bmm")
    if not p.masks:
        p = put(p, build="arange", join="and", apply="masked_fill", after="none", fill="-inf")
    elif p.build not in set().union(*(_MASKS[x] for x in p.masks)):
        p = put(p, build="arange")
    if len(p.masks) < 2:
        p = put(p, join="and")
    if p.fill == "-inf" and p.apply in _FINITE_ONLY:
        p = put(p, fill="-1e9")
    if p.heads == "grouped view":
        p = put(p, layout="4d", product="matmul", bias="broadcast" if "h" in _letters(p) else p.bias)
    return p
