"""A program as data: lists of Python lines, which form a module that can be run, read and printed."""

import ast
import inspect
import linecache
import re
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz import harness

INDENT = "    "
SIZES = ("B", "H", "G", "Q", "K", "D", "E")


@dataclass(frozen=True)
class Program:
    """One program and how it is called. Every line is a Python statement."""

    number: int
    seed: int
    sizes: tuple[tuple[int, ...], ...]
    """For each call, the values of `SIZES`."""
    inputs: tuple[str, ...]
    """Lines that make the arguments. They know the sizes, and `turn`, the number of the call."""
    args: tuple[str, ...]
    state: tuple[str, ...]
    """Lines of the module's `__init__`; without any, the program is a plain function."""
    edits: tuple[str, ...]
    """Lines that change the module `self` between two calls."""
    body: tuple[str, ...]
    results: tuple[str, ...]
    mode: str = "grad"
    dynamic: bool | None = None
    kernel: str = "auto"
    inner: str = "aot_eager"

    def __str__(self) -> str:
        return f"program {self.number} of seed {self.seed}"

    @property
    def is_module(self) -> bool:
        return bool(self.state)

    @property
    def options(self) -> dict[str, str]:
        return {"kernel": self.kernel, "inner": self.inner}

    @property
    def text(self) -> str:
        """The program itself: `inputs`, `edit` and `f`, a function or the class of a module."""
        names = ", ".join(f"{name}={name}" for name in self.args)
        sizes = [f"{', '.join(SIZES)} = {list(self.sizes)}[turn]"]
        inputs = _function("def inputs(turn):", [*sizes, *self.inputs, f"return dict({names})"])
        edit = _function("def edit(self):", self.edits or ("pass",))
        body = [*self.body, f"return ({', '.join(self.results)},)"]
        if not self.is_module:
            return "\n\n\n".join([inputs, edit, _function(f"def f({', '.join(self.args)}):", body)]) + "\n"
        start = _function("def __init__(self):", ["super().__init__()", *self.state])
        forward = _function(f"def forward({', '.join(('self', *self.args))}):", body)
        module = _function("class f(torch.nn.Module):", [start, "\n" + forward])
        return "\n\n\n".join([inputs, edit, module]) + "\n"

    @property
    def exact_text(self) -> str:
        """The same in float64, with arguments rounded as before."""
        inputs, rest = self.text.split("def edit(self):")
        exact = re.sub(r"\.(float|half|bfloat16)\(\)", ".double()", rest)
        exact = re.sub(r"torch\.(float32|float16|bfloat16)\b", "torch.float64", exact)
        return f"{inputs.replace('torch.float32', 'torch.float64')}def edit(self):{exact}"

    @property
    def script(self) -> str:
        """A Python file that needs nothing but fusepass, and fails where compiled and eager disagree."""
        start = "f()" if self.is_module else "f"
        rest = f"inputs, edit, {len(self.sizes)}, {self.mode!r}"
        through = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        main = [
            f"want = run({start}, {rest})",
            f'got = run(compiled({start}, "fusepass", {self.dynamic}, {through}), {rest})',
            "for name in want:",
            '    print(f"{name}\\n    eager    {want[name]}\\n    compiled {got[name]}")',
            "torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)",
        ]
        tools = inspect.getsource(harness).split('"""', 2)[2].strip()
        parts = [
            f'"""Drawn by tests.fuzz: {self}."""\n\nimport math',
            tools.replace(
                "from torch import Tensor", "import torch.nn.functional as F\nfrom torch import Tensor"
            ),
            self.text.rstrip(),
            _function('if __name__ == "__main__":', main),
        ]
        return parts[0] + "\n" + "\n\n\n".join(parts[1:]) + "\n"


def _function(head: str, lines: tuple[str, ...] | list[str]) -> str:
    """A block of Python; lines that are blocks themselves are indented as a whole."""
    inner = "\n".join(lines).split("\n")
    return "\n".join([head, *(INDENT + line if line else line for line in inner)])


@dataclass
class Loaded:
    """A program's text, executed. Dynamo reads the source, so it stays known until `forget`."""

    text: str
    name: str
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import math

        import torch

        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.name] = (len(self.text), None, lines, self.name)
        self.space.update(torch=torch, F=torch.nn.functional, math=math, __name__=self.name)
        self.space.update(r=harness.r, whole=harness.whole, inf=harness.inf, nan=harness.nan)
        exec(compile(self.text, self.name, "exec"), self.space)

    def start(self) -> Any:
        """The function, or a new module."""
        f = self.space["f"]
        return f() if isinstance(f, type) else f

    def forget(self) -> None:
        linecache.cache.pop(self.name, None)


def read(line: str) -> set[str]:
    """The names that a line reads or writes."""
    return {node.id for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Name)}


def assigned(line: str) -> str | None:
    """The name that a line gives a value, if that is all it does."""
    match = re.match(r"(\w+) = ", line)
    return match[1] if match else None
