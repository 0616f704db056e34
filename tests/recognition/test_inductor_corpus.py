"""TorchInductor's own attention patterns, taken from the installed torch, as programs to be recognised."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.fx_passes import fuse_attention

from tests import checking

P_DROP = 0.113377


def patterns(exact: bool = False) -> dict[str, Callable[..., Any]]:
    """The functions by number, from their source, so that Dynamo does not take them for torch's own.

    `exact`: every precision they name is float64.
    """
    scope = dict(vars(fuse_attention))
    names = [name for name in scope if re.fullmatch(r"_sfdp_pattern_\d+", name)]
    for name in names:
        source = inspect.getsource(scope[name])
        if exact:
            source = re.sub(r"torch\.float(16|32)", "torch.float64", source)
        exec(compile(source, f"<{name}>", "exec"), scope)
    return {name.removeprefix("_sfdp_pattern_"): scope[name] for name in names}


PATTERNS, EXACT = patterns(), patterns(exact=True)
DTYPES = (torch.float32, torch.float16)


@functools.cache
def registered() -> dict[tuple[str, torch.dtype], tuple[tuple[Tensor, ...], dict[str, float]]]:
    """Example inputs and scalars of every pattern, as that module registers them."""
    examples: dict[tuple[str, torch.dtype], tuple[tuple[Tensor, ...], dict[str, float]]] = {}
    for key, entry in fuse_attention._get_sfdp_patterns(torch.device("cpu")):
        match = re.match(r"_sfdp_pattern_(\d+)", key)
        if match is None or not key.endswith("_inference"):
            continue
        given = tuple(entry["example_inputs"])
        examples.setdefault((match[1], given[0].dtype), (given, entry["scalar_workaround"]))
    return examples


def example(number: str, dtype: torch.dtype, batch: int) -> dict[str, Tensor]:
    """Random inputs like the registered ones; two-dimensional masks hold zeros and ones."""
    g = torch.Generator().manual_seed(int(number))
    names = list(inspect.signature(PATTERNS[number]).parameters)
    out = {}
    for name, like in zip(names, registered()[number, dtype][0], strict=False):
        out[name] = random_like(like.detach(), g, batch)
    return out


def random_like(like: Tensor, g: torch.Generator, batch: int) -> Tensor:
    """Random numbers with a tensor's layout; a batch of two is cut to ``batch``; none is large."""
    if like.dim() == 0:
        return like.clone()
    if like.numel() > 1 << 20:
        like = like.new_empty(6, 16, 8)
    drawn = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32)
    drawn.copy_(torch.rand(like.shape, generator=g) * 2 - 1)
    if like.dtype is torch.bool or like.dim() == 2:
        drawn = (drawn > -0.3).float()
        drawn[..., 0] = 1
    cut = drawn[:batch] if drawn.shape[0] == 2 else drawn
    return cut.to(like.dtype)


def program(number: str, dtype: torch.dtype, dropout: float, exact: bool = False) -> Callable[..., Any]:
    """The pattern with its scalars filled in."""
    pattern = (EXACT if exact else PATTERNS)[number]
    scalars = dict(registered()[number, dtype][1])
    scalars.pop("dropout_p", None)
    if "dropout_p" in inspect.signature(pattern).parameters:
        scalars["dropout_p"] = dropout
    if "inv_scale" in inspect.signature(pattern).parameters and "inv_scale" not in example(number, dtype, 1):
        scalars.setdefault("inv_scale", 0.66666)

    def attention(**tensors: Tensor) -> Any:
        result = pattern(**tensors, **scalars)
        return result[0] if isinstance(result, tuple) else result

    return attention


def test_all_patterns_of_this_torch_are_here() -> None:
    assert len(PATTERNS) >= 30
    assert {number for number, _ in registered()} == set(PATTERNS)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", PATTERNS)
def test_recognised_and_right(number: str, dtype: torch.dtype, batch: int) -> None:
    fn, given = program(number, dtype, 0.0), example(number, dtype, batch)
    eager = checking.call(fn, given).out
    exact = checking.call(program(number, dtype, 0.0, exact=True), given, torch.float64).out
    for kernel in ("reference", "auto"):
        torch.compiler.reset()
        run = checking.call(checking.compiled(fn, kernel), given)
        assert run.site.fused, f"{kernel}: {run.site.reason}"
        checking.assert_as_accurate(run.out, eager, exact, kernel)


@pytest.mark.parametrize("number", PATTERNS)
def test_gradients(number: str) -> None:
    fn, given = program(number, torch.float32, 0.0), example(number, torch.float32, 2)
    eager = checking.call(fn, given, grads=True)
    exact = checking.call(program(number, torch.float32, 0.0, exact=True), given, torch.float64, True)
    got = checking.call(checking.compiled(fn, "reference"), given, grads=True)
    checking.assert_same_accuracy(got, eager, exact)


WITH_DROPOUT = [n for n, f in PATTERNS.items() if "dropout_p" in inspect.signature(f).parameters]


@pytest.mark.parametrize("number", WITH_DROPOUT)
def test_dropout_is_recognised_and_its_mean_is_right(number: str) -> None:
    """The average of many draws is the result without dropout."""
    given = example(number, torch.float32, 2)
    plain = checking.call(program(number, torch.float32, 0.0), given).out
    fn = checking.compiled(program(number, torch.float32, P_DROP), "reference")
    run = checking.call(fn, given)
    assert run.site.fused, run.site.reason
    assert f"dropout {P_DROP:.6g}" in run.site.spec
    draws = torch.stack([checking.call(fn, given).out for _ in range(200)])
    bound = 6 * draws.std(0) / len(draws) ** 0.5 + 1e-6
    assert ((draws.mean(0) - plain).abs() <= bound).all()
    assert draws.std(0).max() > 0
