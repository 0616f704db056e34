"""Numbers as PyTorch computes with them: the value of a number in a dtype, and the results of operations.

Everything that looks at a constant (folding, masks, scales, bounds) sees the value that its dtype holds:
three as a bool is True, 2.9 as an integer is 2, 258 as a byte is 2, and 1e9 in half precision is infinite.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusepass.host.surroundings import clean_context

Number = bool | int | float | complex
#: Constants, each with its dtype.
Constants = tuple[tuple[Any, torch.dtype], ...]

COMPARISONS = frozenset("lt le gt ge eq ne".split())
LOGIC = frozenset("and or xor not".split())
_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1,
    "log": torch.log, "log1p": torch.log1p, "tanh": torch.tanh, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "erf": torch.erf, "relu": torch.relu,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul,
    "div": torch.div, "floordiv": torch.floor_divide, "mod": torch.remainder, "pow": torch.pow,
    "max": torch.maximum, "min": torch.minimum, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne, "and": torch.logical_and,
    "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not, "isnan": torch.isnan,
    "isinf": torch.isinf,
}  # fmt: skip


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype that PyTorch computes in; Python numbers next to a tensor are converted to it."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


@functools.cache
def clamps_pass_bounds() -> bool:
    """Does ``clamp`` pass the gradient of a number that equals a bound?  It does not from torch 2.15 on."""
    with clean_context(draws=False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(x.clamp(min=0.0), x)
        return bool(slope)


def is_integer(dtype: torch.dtype) -> bool:
    """Is it an integer dtype?  Bool is not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def converted(value: Number, dtype: torch.dtype) -> Number | None:
    """``value`` as an element of ``dtype``; None where PyTorch does not define it.

    Integers wrap, and floats are truncated to integers.  None for NaN, infinities and floats out of range in
    an integer dtype, and for complex numbers in an integer or floating dtype.
    """
    if dtype is torch.bool:
        return bool(value)
    try:
        if dtype.is_complex:
            return _complex(complex(value), dtype)
        if isinstance(value, complex):
            return None
        return _rounded(value, dtype) if dtype.is_floating_point else _integer(value, dtype)
    except (OverflowError, RuntimeError, TypeError):
        return None


def rounded_to(value: float, dtype: torch.dtype) -> float:
    """A number rounded to a floating dtype."""
    return _rounded(value, dtype) if dtype.is_floating_point else value


def _complex(value: complex, dtype: torch.dtype) -> complex:
    part = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, torch.float16)
    return complex(_rounded(value.real, part), _rounded(value.imag, part))


def _integer(value: bool | int | float, dtype: torch.dtype) -> int | None:
    limits = torch.iinfo(dtype)
    if isinstance(value, float):
        inside = math.isfinite(value) and limits.min <= math.trunc(value) <= limits.max
        return math.trunc(value) if inside else None
    return (int(value) - limits.min) % (1 << limits.bits) + limits.min


def _rounded(value: bool | int | float, dtype: torch.dtype) -> float:
    if dtype is torch.float64:
        return float(value)
    single = _single(value)
    if dtype is torch.float32 or not math.isfinite(single):
        return single if dtype.itemsize > 1 else _by_torch(single, dtype)
    if dtype is torch.float16:
        try:
            (half,) = struct.unpack("<e", struct.pack("<e", single))
        except OverflowError:
            half = math.copysign(math.inf, single)
        return float(half)
    if dtype is torch.bfloat16:
        (bits,) = struct.unpack("<I", struct.pack("<f", single))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    return _by_torch(single, dtype)


def _single(value: bool | int | float) -> float:
    """The nearest float32; for an integer, found without rounding to a double first."""
    if not isinstance(value, float) and (extra := int(value).bit_length() - 24) > 0:
        quotient, rest = divmod(abs(int(value)), 1 << extra)
        half = 1 << (extra - 1)
        quotient += rest > half or (rest == half and quotient % 2)
        value = math.copysign(quotient << extra, value)
    return ctypes.c_float(float(value)).value


def _by_torch(value: float, dtype: torch.dtype) -> float:
    with clean_context(draws=False):
        return float(torch.tensor(value, dtype=torch.float32, device="cpu").to(dtype).item())


def folded(op: str, args: Constants, dtype: torch.dtype, attrs: tuple[Any, ...] = ()) -> Number | None:
    """What PyTorch computes from constants ``(value, dtype)``, as an element of ``dtype``.

    None where there is no result (a division by the integer zero), where it depends on the device, and for
    what is not folded: complex numbers, integers made from floats, operations not in ``_OPERATIONS``.
    """
    kinds = {d for _, d in args} | {dtype}
    known = op in _OPERATIONS or op == "nan_to_num"
    if not known or any(d.is_complex for d in kinds):
        return None
    if is_integer(dtype) and any(d.is_floating_point for d in kinds):
        return None
    readings = [_computed(op, given, within, dtype, attrs) for given, within in _readings(op, args, dtype)]
    return readings[0] if len(set(map(repr, readings))) == 1 else None


def _readings(op: str, args: Constants, dtype: torch.dtype) -> list[tuple[Constants, torch.dtype]]:
    """The operands and the dtype of the computation, once for each way in which devices differ.

    Some devices first round a number that is combined with a tensor of a narrow dtype to that dtype; no
    device does so with a factor or a divisor.
    """
    if op in LOGIC:
        return [(args, torch.bool)]
    if op in COMPARISONS or op in ("isnan", "isinf"):
        common = functools.reduce(torch.promote_types, (d for _, d in args))
        floats = [d for _, d in args if d.is_floating_point]
        return [(args, d) for d in dict.fromkeys([opmath(common), *floats])]
    wide = opmath(dtype)
    if wide is dtype or op in ("mul", "div", "floordiv"):
        return [(args, wide)]
    return [(args, wide), (tuple((rounded_to(v, dtype), dtype) for v, _ in args), wide)]


def _computed(
    op: str,
    args: Constants,
    within: torch.dtype,
    dtype: torch.dtype,
    attrs: tuple[Any, ...],
) -> Number | None:
    try:
        with clean_context(draws=False):
            given = [torch.tensor(v, dtype=opmath(d), device="cpu").to(within) for v, d in args]
            if op == "nan_to_num":
                out = torch.nan_to_num(given[0], nan=attrs[0], neginf=attrs[1], posinf=attrs[2])
            else:
                out = _OPERATIONS[op](*given)
            number: Number = out.item()
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        return None
    return converted(number, dtype)


__all__ = [
    "COMPARISONS", "LOGIC", "Number", "clamps_pass_bounds", "converted", "folded", "rounded_to", "is_integer",
    "opmath",
]  # fmt: skip
