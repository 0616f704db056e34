"""Draws programs: a seed and a number always give the same program."""

import random
import re
from dataclasses import dataclass

from tests.fuzz import layers
from tests.fuzz.operands import Operands, operands
from tests.fuzz.programs import SIZES, Program, assigned, read
from tests.fuzz.sketch import Sketch

KERNELS = ("auto", "reference", "flex", "sdpa")
INNERS = ("eager", "aot_eager")


@dataclass(frozen=True)
class Choices:
    """The settings that the user can choose."""

    kernel: str = "all"
    """One of `KERNELS`, or "all" to have each program draw one."""
    inner: str = "all"
    """One of `INNERS`, "inductor", or "all" to have each program draw one of `INNERS`."""
    operands_not_finite: bool = False


def draw(seed: int, number: int, choices: Choices) -> Program:
    """The program with this number."""
    rng = random.Random(f"{seed}/{number}")
    writes = rng.choice([0.0, 0.0, 0.0, 0.08, 0.15, 0.3])
    learns = rng.choice([0.0, 0.0, 0.0, 0.3] if writes else [0.0, 0.0, 0.3, 0.6, 1.0])
    sk = Sketch(rng, writes, learns, spoiled=rng.choice([0.0, 0.0, 0.5]), module=rng.random() < 0.1)
    sk.lead = ("B",) if rng.random() < 0.2 else ("B", "H")
    if sk.module:
        sk.state.append("self.scale = 0.5")
        sk.edits.append(rng.choice(["pass", "self.scale = 2.0"]))
    sizes, equal = _sizes(rng)
    calls = rng.choice([2, 2, 3]) if sk.module or rng.random() < 0.15 else 1
    dynamic = rng.choice([None, None, True]) if calls > 1 or rng.random() < 0.05 else None
    sk.dtype = rng.choice(
        ["torch.float32"] * 8
        + ["torch.float64"] * (4 if dynamic else 1)
        + ["torch.bfloat16", "torch.float16"]
    )
    ops = operands(sk, equal)
    if choices.operands_not_finite:
        _spoil(sk)
    results = [_attention(sk, ops)]
    while rng.random() < 0.3:
        results.append(_other_result(sk))
    kernel = rng.choice(KERNELS) if choices.kernel == "all" else choices.kernel
    inner = rng.choice(["eager", "eager", "aot_eager"]) if choices.inner == "all" else choices.inner
    mode = rng.choice(["grad"] * (8 if learns else 2) + ["no_grad", "inference"])
    if learns and rng.random() < 0.15:
        _without_gradients(sk)
    varied = (sizes, *(_varied(rng, sizes, equal) for _ in range(calls - 1)))
    same = dynamic is None and rng.random() < 0.5
    return Program(
        number, seed, (sizes,) * calls if same else varied, tuple(sk.inputs), tuple(sk.args), tuple(sk.state),
        tuple(sk.edits), (*_headers(sk, results, sizes if calls == 1 else None), *sk.body),
        tuple(results), mode, dynamic, kernel, inner,
    )  # fmt: skip


def _sizes(rng: random.Random) -> tuple[tuple[int, ...], str]:
    """Values for `SIZES`, and which of them are deliberately equal."""
    edge = rng.random() < 0.06

    def one(*usual: int) -> int:
        return rng.choice([0, 1]) if edge and rng.random() < 0.35 else rng.choice(usual)

    b, g, d = one(1, 2, 2, 3), one(1, 2, 2, 3), rng.choice([8, 8, 4, 3, 1, 16])
    equal = rng.choice(["LGE", "LGE", "LE", "GE", "E", "L", "G", ""])
    h = g if "G" in equal else g * rng.choice([2, 3])
    q = one(4, 4, 5, 1, 7)
    k = q if "L" in equal else one(4, 5, 1, 2, 7)
    e = d if "E" in equal else rng.choice([8, 4, 2, 5])
    return (b, h, g, q, k, d, e), equal


def _varied(rng: random.Random, sizes: tuple[int, ...], equal: str) -> tuple[int, ...]:
    """Sizes for a later call: other batches and lengths."""
    b, h, g, q, k, d, e = sizes
    b, q = rng.choice([b, b + 1]), rng.choice([q, q + 1, q + 2])
    k = q if "L" in equal else rng.choice([k, k + 1, k + 3])
    return (b, h, g, q, k, d, e)


def _attention(sk: Sketch, ops: Operands) -> str:
    """The name of its result."""
    if sk.chance(0.1):
        o = layers.composite(sk, ops)
    else:
        s, ops = layers.scores(sk, ops)
        if sk.module and sk.chance(0.5):
            s = sk.new("s", f"{s} * self.scale", scores=True)
        for _ in range(sk.rng.choice([0, 1, 1, 1, 1, 2, 2, 3])):
            s = layers.modified(sk, s, ops)
        o = layers.product(sk, layers.weights(sk, s, ops), ops.v)
    while sk.chance(0.3):
        o = layers.after(sk, o, ops)
    return o


def _other_result(sk: Sketch) -> str:
    """Something else to return: scores, weights, operands, or what was written to."""
    usual = [one for one in sk.live if not one.scores] or sk.live
    one = sk.rng.choice(usual if sk.chance(0.9) else sk.live)
    return sk.pick(
        one.name, f"{one.name} + 1", f"{one.name}.sum()", f"{one.name}[..., :1]", f"{one.name}.clone()"
    )


def _spoil(sk: Sketch) -> None:
    """Puts a non-finite number into an argument."""
    index = sk.rng.randrange(len(sk.inputs))
    line = sk.inputs[index]
    if match := re.search(r"r\(([^()]*?), seed=\d+[^()]*\)", line):
        bad = sk.pick("nan", "inf", "-inf")
        hit = sk.whole(match[1], below=9)
        sk.inputs[index] = line.replace(match[0], f"{match[0]}.masked_fill({hit} == 0, {bad})")


def _without_gradients(sk: Sketch) -> None:
    """Wraps one of the steps in a region without gradients."""
    place = sk.rng.randrange(len(sk.body))
    if assigned(sk.body[place]) is not None:
        sk.body[place] = f"with torch.no_grad():\n    {sk.body[place]}"


def _headers(sk: Sketch, results: list[str], sizes: tuple[int, ...] | None) -> list[str]:
    """Lines that define the sizes that the body reads, from a tensor's shape or as numbers."""
    needed = set().union(*(read(line) for line in (*sk.body, *results)))
    literal = sizes is not None and sk.chance(0.3)
    lines = []
    for place, name in enumerate(SIZES):
        if name in needed:
            lines.append(f"{name} = {sizes[place] if literal and sizes is not None else sk.dims[name]}")
    return lines
