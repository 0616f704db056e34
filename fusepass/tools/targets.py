"""The model that a command line names: from "file.py:factory" to a model and its arguments."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusepass.host.config import accepted
from fusepass.tools.sandbox import copied

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

FORM = "path/to/file.py:factory or package.module:factory"
RETURNS = "a factory returns (model, args) or (model, args, kwargs); args may also be a dict of keywords"


class UsageError(ValueError):
    """An error on the command line, shown without a traceback."""


@dataclass(frozen=True)
class Target:
    """A model and what to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype | None, device: str | None) -> "Target":
        """The same target in another floating dtype and on another device, where these are given."""
        if dtype is None and device is None:
            return self
        if isinstance(self.model, torch.nn.Module):
            self.model.to(dtype=dtype, device=device)
        args, kwargs = copied((self.args, self.kwargs), dtype, device)
        return replace(self, args=args, kwargs=kwargs)


def load(name: str, dtype: str | None = None, device: str | None = None) -> Target:
    """The model that a factory returns, ready to be called."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; {accepted(dtype, DTYPES)}")
    where, colon, factory_name = name.rpartition(":")
    if not colon or not where or not factory_name:
        raise UsageError(f"model {name!r}: expected {FORM}")
    module = _from_file(where) if where.endswith(".py") else _from_module(where)
    factory = getattr(module, factory_name, None)
    if factory is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"model {name!r}: {where} has no {factory_name!r}{_near(factory_name, names)}")
    if not callable(factory):
        raise UsageError(f"model {name!r}: {factory_name!r} is a {type(factory).__name__}; {RETURNS}")
    return _target(name, factory()).to(DTYPES[dtype] if dtype else None, device)


def _target(name: str, built: object) -> Target:
    match built:
        case (model, tuple() | list() as args, dict() as kwargs) if callable(model):
            return Target(model, tuple(args), kwargs)
        case (model, dict() as kwargs) if callable(model):
            return Target(model, (), dict(kwargs))
        case (model, tuple() | list() as args) if callable(model):
            return Target(model, tuple(args), {})
        case (model, torch.Tensor() as only) if callable(model):
            return Target(model, (only,), {})
    raise UsageError(f"model {name!r}: the factory returned {_shape(built)}; {RETURNS}")


def _shape(built: object) -> str:
    if isinstance(built, tuple):
        return "(" + ", ".join(type(part).__name__ for part in built) + ")"
    return f"a {type(built).__name__}"


def _from_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"cannot read {path!r}: there is no such file; a model is named {FORM}")
    try:
        code = compile(file.read_bytes(), path, "exec")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"cannot read {path!r}: {type(error).__name__}: {error}") from error
    module = ModuleType(file.stem)
    module.__file__ = path
    sys.modules.setdefault(file.stem, module)
    sys.path.insert(0, str(file.resolve().parent))
    exec(code, vars(module))
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"cannot import {name!r}: {error}; a model is named {FORM}") from error
    except SyntaxError as error:
        raise UsageError(f"cannot import {name!r}: SyntaxError: {error}") from error


def _near(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f"; it has {', '.join(names)}" if names else "; it defines no function"
