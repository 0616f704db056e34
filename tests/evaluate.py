"""A numeric interpreter of expressions and terms, for tests: every rule is checked against it.

Floating tensors are float64 whatever dtype an expression names, so that a cast is the identity and a law
either holds up to rounding or does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from fusepass.expressions.index import Affine, AxisSpace, Size
from fusepass.expressions.ir import Expr, walk
from fusepass.rules.engine import Term

Sizes = Mapping[sympy.Symbol, int]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "not": torch.logical_not,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "tanh": torch.tanh,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "relu": torch.relu,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "max": torch.maximum,
    "min": torch.minimum,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for every floating dtype."""
    return torch.float64 if dtype.is_floating_point else dtype


def number(size: Size, sizes: Sizes) -> int:
    """A size with the symbols replaced."""
    return size if isinstance(size, int) else int(size.subs(list(sizes.items())))


def value(index: Affine, at: Mapping[str, int]) -> int:
    """An index expression at one position of its axes."""
    return int(index.const) + sum(int(c) * at[axis] for axis, c in index.terms)


@dataclass
class Evaluator:
    """Values of expressions, given the tensors of their leaves and the values of symbolic sizes."""

    inputs: Mapping[str, Tensor]
    sizes: Sizes = field(default_factory=dict)
    known: dict[Expr, Tensor] = field(default_factory=dict)

    def __call__(self, root: Expr) -> Tensor:
        """The tensor that ``root`` stands for."""
        for node in walk(root):
            if node not in self.known:
                value = self._compute(node, [self.known[a] for a in node.args])
                assert value.shape == self.shape(node), f"{node!r} came out as {tuple(value.shape)}"
                self.known[node] = value
        return self.known[root]

    def shape(self, node: Expr) -> tuple[int, ...]:
        """The node's shape in integers."""
        return tuple(number(n, self.sizes) for n in node.shape)

    def _compute(self, node: Expr, args: list[Tensor]) -> Tensor:
        a: Any = node.attrs
        if node.op in UNARY:
            return UNARY[node.op](*args)
        if node.op in BINARY:
            return BINARY[node.op](*args)
        if node.op in ("permute", "reshape", "expand", "slice", "select", "flip", "repeat"):
            return self._view(node, args[0])
        match node.op:
            case "input":
                return self.inputs[a[0]].to(wide(node.dtype))
            case "const":
                return torch.tensor(a[0], dtype=wide(node.dtype))
            case "iota":
                count = torch.arange(self.shape(node)[0] if node.shape else 1)
                ramp = number(a[0], self.sizes) + number(a[1], self.sizes) * count
                return ramp if node.shape else ramp[0]
            case "where":
                return torch.where(args[0], args[1], args[2])
            case "cast":
                return args[0].to(wide(a[0]))
            case "nan_to_num":
                return torch.nan_to_num(args[0], nan=a[0], neginf=a[1], posinf=a[2])
        return self._contract(node, args)

    def _view(self, node: Expr, x: Tensor) -> Tensor:
        a: Any = node.attrs
        shape = self.shape(node)
        match node.op:
            case "permute":
                return x.permute(a[0])
            case "reshape":
                return x.reshape(shape)
            case "expand":
                return x.expand(shape)
            case "slice":
                start, step = number(a[1], self.sizes), number(a[2], self.sizes)
                stop = start + shape[a[0]] * step
                return x[(slice(None),) * a[0] + (slice(start, stop, step),)]
            case "select":
                return x.select(a[0], number(a[1], self.sizes))
            case "flip":
                return x.flip(a[0])
        return x.repeat(a[0])

    def _contract(self, node: Expr, args: list[Tensor]) -> Tensor:
        a: Any = node.attrs
        match node.op:
            case "dot":
                return torch.einsum(f"{a[0]},{a[1]}->{a[2]}", args[0], args[1])
            case "sum":
                return args[0].sum(a[0], keepdim=True)
            case "amax":
                return args[0].amax(a[0], keepdim=True)
            case "logsumexp":
                return args[0].logsumexp(a[0], keepdim=True)
            case "softmax":
                return args[0].softmax(a[0])
            case "log_softmax":
                return args[0].log_softmax(a[0])
            case "cumsum":
                return args[0].cumsum(a[0])
            case "cat":
                return torch.cat(args, a[0])
            case "index":
                return args[0][(slice(None),) * a[0] + tuple(args[1:])]
            case "dropout" if a[0] == 0:
                return args[0]
        return self._listed(node, args)

    def _listed(self, node: Expr, args: list[Tensor]) -> Tensor:
        if node.op == "nonzero":
            return args[0].nonzero()
        if node.op == "hit":
            zeros = torch.zeros(self.shape(node), dtype=torch.bool)
            return zeros.index_put(tuple(args), torch.tensor(True))
        a: Any = node.attrs
        raise ValueError(f"no value for the operation {node.op!r} with {a}: it is random, or of scalar level")


@dataclass
class Grid:
    """Values of terms for all values of the finest axes of a space: one dimension per axis."""

    space: AxisSpace
    evaluate: Evaluator

    def __post_init__(self) -> None:
        self.axes = [a for a in self.space.sizes if a not in self.space.splits]
        self.shape = tuple(number(self.space.sizes[a], self.evaluate.sizes) for a in self.axes)

    def dims(self, indices: Sequence[Affine]) -> list[int]:
        """The dimensions that the given indices run over."""
        used = frozenset[str]().union(*(self.space.resolve(i).axes for i in indices))
        return [d for d, a in enumerate(self.axes) if a in used]

    def index(self, index: Affine) -> Tensor:
        """The values of an index expression, at all positions."""
        sizes = self.evaluate.sizes
        total = torch.tensor(number(index.const, sizes))
        for axis, c in index.terms:
            if axis in self.space.splits:
                total = total + number(c, sizes) * self.index(self.space.splits[axis])
                continue
            d = self.axes.index(axis)
            ramp = torch.arange(self.shape[d]).view([-1 if n == d else 1 for n in range(len(self.axes))])
            total = total + number(c, sizes) * ramp
        return total.expand(self.shape)

    def term(self, term: Term) -> Tensor:
        """The values of ``expr[index]``, at all positions."""
        value = self.evaluate(term.expr)
        index = [self.index(i) for i in term.index]
        for at, n in zip(index, value.shape, strict=True):
            assert not at.numel() or 0 <= int(at.min()) <= int(at.max()) < n, (
                f"index of {term.expr!r} out of range"
            )
        return value[tuple(index)].expand(self.shape) if index else value.expand(self.shape)

    def formula(self, node: Expr) -> Tensor:
        """The values of a scalar formula (affine indices and loads), at all positions."""
        if node.op == "affine":
            return self.index(node.attrs[0])
        if node.op == "load":
            return self.term(Term(node.args[0], node.attrs))
        args = [self.formula(a) for a in node.args]
        return self.evaluate._compute(node, args).expand(self.shape)


def random_inputs(root: Expr, seed: int, sizes: Sizes | None = None) -> dict[str, Tensor]:
    """A tensor for every leaf below ``root``: normal numbers, fair bits, small labels."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, Tensor] = {}
    for node in walk(root):
        if node.op != "input":
            continue
        shape = [number(n, sizes or {}) for n in node.shape]
        if node.dtype is torch.bool:
            table[str(node.attrs[0])] = torch.rand(shape, generator=generator) < 0.7
        elif node.is_float:
            table[str(node.attrs[0])] = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            table[str(node.attrs[0])] = torch.randint(0, 3, shape, generator=generator)
    return table
