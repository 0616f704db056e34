"""Expressions and formulas evaluated in the dtypes that they name, rounding and wrapping as PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusepass.expressions.arithmetic import COMPARISONS, LOGIC, opmath
from fusepass.expressions.ir import Expr
from tests.evaluate import BINARY, UNARY, Evaluator

OPERATIONS: dict[str, Callable[..., Tensor]] = {**UNARY, **BINARY}


@dataclass
class Exact(Evaluator):
    """Values of expressions in their own dtypes."""

    def _compute(self, node: Expr, args: list[Tensor]) -> Tensor:
        if node.op == "input":
            return self.inputs[node.attrs[0]]
        if node.op == "const":
            return torch.tensor(node.attrs[0], dtype=node.dtype)
        if node.op == "cast":
            return args[0].to(node.dtype)
        if node.op == "where":
            yes, no = (a.to(node.dtype) for a in args[1:])
            return torch.where(args[0], yes, no)
        if node.op in COMPARISONS:
            return BINARY[node.op](*args)
        if node.op in LOGIC or node.op in ("isnan", "isinf"):
            return OPERATIONS[node.op](*args)
        if node.op in UNARY or node.op in BINARY:
            given = [a if x.op == "const" else a.to(node.dtype) for x, a in zip(node.args, args, strict=True)]
            wide = [a.to(opmath(node.dtype)) for a in given]
            return OPERATIONS[node.op](*wide).to(node.dtype)
        return super()._compute(node, args).to(node.dtype)


@dataclass
class Loose(Exact):
    """Values as kernels compute them from a formula's text: without a cast, the operands' dtype is kept."""

    def _compute(self, node: Expr, args: list[Tensor]) -> Tensor:
        if node.op == "const":
            kind = {bool: torch.bool, int: torch.int64}.get(type(node.attrs[0]), torch.float32)
            return torch.tensor(node.attrs[0], dtype=kind)
        if node.op == "where":
            return torch.where(args[0], args[1], args[2])
        if node.op in OPERATIONS:
            return OPERATIONS[node.op](*args)
        return super()._compute(node, args)
