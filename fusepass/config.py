"""The user's options, in: a plain dictionary; out: a checked, frozen `Options`.

Every error names the value, what was expected, the accepted ones and the nearest of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

KERNELS = (
    "auto",
    "autotune",
    "sdpa",
    "cudnn",
    "flash2",
    "flash3",
    "flash4",
    "flex",
    "flex_flash",
    "reference",
)
PRECISIONS = ("native", "fp8", "fp8_unrotated")

Compiler = Callable[..., Any]
"""What compiles a rewritten graph: `(GraphModule, example inputs) -> callable`."""


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="fusepass", options={...})` accepts."""

    inner: str | Compiler = "inductor"
    """A backend name or a callable: what compiles the rewritten graph."""
    kernel: str = "auto"
    """One of `KERNELS`. "auto" ranks them by a cost model, "autotune" measures them for a site's own shapes;
    another name: that kernel where it can, else the site stays."""
    precision: str = "native"
    """One of `PRECISIONS`. In FP8 where a site can be (Hopper, inference), in its own dtype elsewhere."""
    validate: bool = False
    """Run every site's original and its replacement against float64 when the graph is compiled."""

    def __post_init__(self) -> None:
        _check_choice("kernel", self.kernel, KERNELS)
        _check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.validate, bool):
            raise TypeError(f"fusepass option validate={self.validate!r}: expected True or False")
        _check_inner(self.inner)

    @classmethod
    def from_user(cls, **options: Any) -> "Options":
        """`Options` from what a user wrote; a name that is no option is an error."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"unknown fusepass option {name!r}; {accepted(name, names)}")
        return cls(**options)


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
    """Names are looked up only when they are not the usual ones: the look-up imports every backend."""
    if inner == "fusepass" or getattr(inner, "__module__", None) == "fusepass.backend":
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
    """Every backend name that torch knows here, debugging ones included, without fusepass itself."""
    import torch._dynamo

    return [name for name in torch._dynamo.list_backends(exclude_tags=()) if name != "fusepass"]


def _type(value: object) -> str:
    return type(value).__name__
