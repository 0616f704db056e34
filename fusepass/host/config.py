"""The user's options: a plain dictionary goes in, a checked, frozen `Options` comes out.

All functions share one set of names. Functions that compile, or say what compiling would do, take all of
them; functions that only run the pass take `PassOptions`, and refuse the others. Every error names the value,
what was expected, the accepted values and the nearest of them, or where the option belongs.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypedDict

from fusepass.host.kernel_names import KERNELS, accepted_kernels
from fusepass.host.requested import Requested

PRECISIONS = ("native", "fp8", "fp8_unrotated")

Compiler = Callable[..., Any]
"""What compiles a rewritten graph: `(GraphModule, example inputs) -> callable`."""


class PassOptions(TypedDict, total=False):
    """The options of the pass itself: keywords of `enable`, `fuse`, `export_pt2` and `compile_aoti`."""

    kernel: str
    precision: str
    validate: bool


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="fusepass", options={...})` accepts: these names in a dictionary, or
    an `Options` object in its place.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: an unknown value, or a `mode` other than "default" with an inner backend other than
            "inductor".
    """

    inner: str | Compiler = "inductor"
    """What compiles the rewritten graph: a backend name, or a callable that takes a `GraphModule` and example
    inputs and returns a callable."""
    kernel: str = "auto"
    """How kernels are chosen. "auto" ranks those that can compute a site by a cost model; "autotune" measures
    them on the site's own shapes. The name of a kernel ("sdpa", "flash3", "flex", "reference", ..., or a
    registered one) requests that kernel alone: a site that it cannot compute stays as written."""
    precision: str = "native"
    """One of "native", "fp8" and "fp8_unrotated" (without the rotation of queries and keys). FP8 is used
    where a site allows it: on Hopper, for inference, with head size 128."""
    validate: bool = False
    """When the graph is compiled, compare every site's original and its replacement with float64; a site
    whose error is more than about twice the original's stays as written. FP8 is not compared."""
    mode: str | None = None
    """TorchInductor's mode. PyTorch does not allow `torch.compile(mode=...)` together with `options=`."""
    requested: Requested = field(default_factory=Requested, init=False, repr=False, compare=False)
    """Not an option: records what became of the requested kernel."""

    def __post_init__(self) -> None:
        _check_choice("kernel", self.kernel, KERNELS if self.kernel in KERNELS else accepted_kernels())
        _check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.validate, bool):
            raise TypeError(f"fusepass option validate={self.validate!r}: expected True or False")
        _check_inner(self.inner)
        _check_mode(self.mode, self.inner)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [option.name for option in fields(cls) if option.init]

    @classmethod
    def from_user(cls, **options: Any) -> "Options":
        """`Options` from what a user wrote; an unknown name is an error."""
        for name in options:
            if name not in cls.names():
                raise ValueError(f"unknown fusepass option {name!r}; {_advice(name, cls.names())}")
        return cls(**options)

    @classmethod
    def of(cls, given: "Mapping[str, Any] | Options | None", **defaults: Any) -> "Options":
        """`Options` as they are, or made from a dictionary, possibly with other `defaults`."""
        return given if isinstance(given, Options) else cls.from_user(**{**defaults, **(given or {})})

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, as a dictionary."""
        plain = {option.name: option.default for option in fields(self) if option.init}
        return {name: value for name in plain if (value := getattr(self, name)) != plain[name]}


def pass_options(function: str, given: Mapping[str, Any]) -> Options:
    """The options of a function that runs the pass and compiles nothing.

    Raises:
        TypeError, ValueError: as for `Options`, and for an option that the function would ignore.
    """
    refuse_others(function, given, tuple(PassOptions.__annotations__))
    return Options(**given)


#: Where an option belongs if a function would ignore it.
_BELONGS = {
    "inner": "a graph is compiled by torch.compile(..., backend='fusepass', options={'inner': ...})",
    "mode": "a graph is compiled by torch.compile(..., backend='fusepass', options={'mode': ...})",
}
_ELSEWHERE = {
    ("enable", "mode"): "the mode is that of each torch.compile call: torch.compile(model, mode=...)",
    ("compile_aoti", "mode"): "TorchInductor's settings are given as inductor_configs={...}",
}
_OF_OPERATORS = {
    "kernel": "an ONNX runtime has its own kernels; target= says which operators it offers",
    "precision": "an ONNX model computes in its own dtypes",
    "validate": "verify=True runs the file that was written and compares",
}


def refuse_others(function: str, given: Mapping[str, Any], taken: tuple[str, ...]) -> None:
    """Refuse options that `function` would ignore.

    Raises:
        ValueError: names the options that the function takes, and where the given one belongs.
    """
    for name, value in given.items():
        if name in taken:
            continue
        where = _ELSEWHERE.get((function, name)) or ({} if "kernel" in taken else _OF_OPERATORS).get(name)
        where = where or _BELONGS.get(name)
        if where is None:
            raise ValueError(f"{function}(): unknown fusepass option {name!r}; {_advice(name, taken)}")
        takes = ", ".join(repr(name) for name in taken) or "none"
        raise ValueError(
            f"{function}({name}={value!r}) would be ignored: this function takes {takes}; {where}"
        )


def _advice(name: str, taken: Iterable[str]) -> str:
    """For a name that is not an option of the pass: where it belongs, or which options there are."""
    import torch

    if name in inspect.signature(torch.compile).parameters and name != "options":
        return f"{name}= is an argument of torch.compile itself; {accepted(name, taken)}"
    from torch._inductor import config

    if name.replace("-", "_") in config.get_config_copy():
        call = f"torch.compile(model, options={{{name!r}: ...}})"
        return f"it is TorchInductor's: with fusepass.enabled(): {call}; {accepted(name, taken)}"
    return accepted(name, taken)


def accepted(value: str, choices: Iterable[str]) -> str:
    """The end of an error message: the accepted values, and the one nearest to `value`."""
    listed = list(choices)
    near = get_close_matches(value, listed, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return "accepted are " + ", ".join(repr(choice) for choice in listed) + hint


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        expected = accepted("", choices)
        raise TypeError(
            f"fusepass option {name}={value!r}: expected a string, got {_type(value)}; {expected}"
        )
    if value not in choices:
        raise ValueError(f"fusepass option {name}={value!r} is unknown; {accepted(value, choices)}")


def _check_inner(inner: object) -> None:
    """Only unusual names are looked up, because the look-up imports every backend."""
    if inner == "fusepass" or getattr(inner, "__module__", None) == "fusepass.compilation.backend":
        raise ValueError(
            "fusepass option inner='fusepass': it cannot be its own inner backend; try 'inductor'"
        )
    if not isinstance(inner, str):
        if not callable(inner):
            expected = "expected a backend name or a callable(graph_module, example_inputs)"
            raise TypeError(f"fusepass option inner={inner!r}: {expected}, got {_type(inner)}")
        return
    if inner in ("inductor", "aot_eager", "eager"):
        return
    names = inner_backends()
    if inner not in names:
        raise ValueError(f"fusepass option inner={inner!r} is unknown; {accepted(inner, names)}")


def inner_backends() -> list[str]:
    """Every backend name that torch knows, debugging backends included, except fusepass itself."""
    import torch._dynamo

    return [name for name in torch._dynamo.list_backends(exclude_tags=()) if name != "fusepass"]


def _check_mode(mode: object, inner: object) -> None:
    if mode is None:
        return
    if not isinstance(mode, str):
        raise TypeError(f"fusepass option mode={mode!r}: expected a string or None, got {_type(mode)}")
    import torch._inductor

    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise ValueError(f"fusepass option mode={mode!r} is unknown; {accepted(mode, modes)}")
    if inner != "inductor" and mode != "default":
        raise ValueError(f"mode={mode!r} is for inner='inductor' only; here inner={inner!r}")


def _type(value: object) -> str:
    return type(value).__name__
