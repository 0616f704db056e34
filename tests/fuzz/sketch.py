"""A program while it is being drawn: its lines so far, and the tensors that can be read and written."""

import random
from dataclasses import dataclass, field

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Live:
    """A tensor that the lines so far have a name for."""

    name: str
    kind: str = "float"
    """"float", "bool", or "whole"."""
    leaf: bool = False
    """Does it learn, so that autograd forbids plain writes?"""
    scores: bool = False
    """Does it have the shape of the scores?"""


@dataclass
class Sketch:
    """Lines are only ever added, and each gives a value to a new name."""

    rng: random.Random
    writes: float
    """How likely a write follows a line."""
    learns: float
    """How likely an argument learns."""
    spoiled: float
    """How likely a mask or bias holds something that is not finite."""
    module: bool
    lead: Shape = ("B", "H")
    dtype: str = "torch.float32"
    inputs: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    dims: dict[str, str] = field(default_factory=dict)
    """For each size that lines may need, an expression of it."""
    live: list[Live] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    """Names of boolean masks, true where a key is seen."""
    count: int = 0

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def number(self) -> int:
        """A number that was not used before."""
        self.count += 1
        return self.count

    def name(self, prefix: str) -> str:
        return f"{prefix}{self.number()}"

    def line(self, text: str) -> None:
        """Adds a line, sometimes followed by a write."""
        from tests.fuzz.writes import write

        self.body.append(text)
        if self.live and self.chance(self.writes):
            self.body.extend(write(self))

    def new(self, prefix: str, value: str, kind: str = "float", scores: bool = False) -> str:
        """A line that names a value."""
        name = self.name(prefix)
        self.live.append(Live(name, kind, scores=scores))
        self.line(f"{name} = {value}")
        return name

    def argument(self, prefix: str, value: str, kind: str = "float") -> str:
        """An argument that the inputs make of `value`."""
        name = self.name(prefix)
        self.inputs.append(f"{name} = {value}")
        return self.given(name, kind, "requires_grad" in value)

    def given(self, name: str, kind: str = "float", leaf: bool = False) -> str:
        """Make an argument of a name that the inputs define."""
        self.args.append(name)
        self.live.append(Live(name, kind, leaf))
        return name

    def normal(self, *shape: str, dtype: str | None = None, learn: bool | None = None) -> str:
        """Normal numbers in the inputs; they may learn."""
        dtype = self.dtype if dtype is None else dtype
        learn = self.chance(self.learns) if learn is None else learn
        typed = "" if dtype == "torch.float32" else f", dtype={dtype}"
        sizes = "".join(f"{size}, " for size in shape)
        return f"r({sizes}seed={self.number()}{typed}){'.requires_grad_()' if learn else ''}"

    def learned(self, prefix: str, *shape: str, dtype: str | None = None) -> str:
        """An argument of normal numbers."""
        value = self.normal(*shape, dtype=dtype)
        return self.argument(prefix, value)

    def whole(self, *shape: str, below: int = 2, dtype: str = "torch.int64") -> str:
        """Integers in the inputs."""
        sizes = "".join(f"{size}, " for size in shape)
        return f"whole({sizes}seed={self.number()}, below={below}, dtype={dtype})"

    def broadcast(self) -> Shape:
        """A shape that broadcasts to the scores'."""
        lead = self.lead
        batch = (lead[0], *("1" for _ in lead[1:]), "1", "K")
        heads = (*lead[1:], "1", "1")
        shapes = [("Q", "K")] * 4 + [("Q", "1")] * 3 + [("K",)] * 3
        return self.rng.choice([*shapes, ("1", "K"), batch, batch, (*lead, "Q", "K"), heads, ()])
