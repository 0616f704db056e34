"""Golden texts: the expression read from a program and its specification, word for word.

``UPDATE_GOLDEN=1 pytest tests/recognition/test_golden.py`` rewrites the files; read the difference before you
commit it.  The texts come from ``torch.export`` before decomposition and hold nothing that depends on the
version of PyTorch.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.dialects.torch.graph import Reader
from fusepass.expressions.index import Facts
from fusepass.expressions.ir import Expr, leaf, parse, to_text, walk
from fusepass.expressions.ir import expr as make
from fusepass.recognition.recognize import Miss, recognise
from fusepass.rules.site import Site
from tests.capture import Wrapped

FOLDER = Path(__file__).parents[1] / "golden"
INF = math.inf
B, H, G, T, D = 2, 4, 2, 6, 8
Q, K, V = (torch.zeros(B, H, T, D) for _ in range(3))  # three objects: export takes one tensor for one input
HALF = tuple(torch.zeros(B, n, T, D, dtype=torch.bfloat16) for n in (H, G, G))
LABELS = tuple(torch.zeros(B, T, dtype=torch.long) for _ in range(2))
PADDING = torch.ones(B, T, dtype=torch.bool)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1) @ v


def gpt2(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
    w = torch.matmul(q, k.transpose(-1, -2)) / 2.0
    w = torch.where(buffer[:, :, :T, :T], w, torch.full([], torch.finfo(w.dtype).min))
    return torch.matmul(nn.functional.softmax(w, dim=-1), v).transpose(1, 2)


def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(B, G, H // G, T, D).reshape(B, H, T, D) for t in (k, v))
    mask = torch.full((T, T), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)
    w = q @ k.transpose(2, 3) * D**-0.5 + mask[None, None]
    return nn.functional.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def gemma(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(q @ k.mT * 0.0625 / 50.0) * 50.0
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return s.masked_fill(~((j <= i) & (j > i - 4)), -INF).softmax(-1) @ v


def bert(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    hidden = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(torch.float32).min
    return nn.functional.dropout((q @ k.mT * 0.5 + hidden).softmax(-1), 0.1, False) @ v


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    gap = (torch.arange(T) - torch.arange(T)[:, None]).clamp(-3, 3) + 3
    bias = table[gap].permute(2, 0, 1)[None]
    return (q @ k.mT + bias).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = torch.arange(T)[:, None], torch.arange(T)
    s = q @ k.mT * 0.5 + slopes[:, None, None] * (j - i)
    return s.masked_fill(j > i, -INF).softmax(-1) @ v


def packed(x: Tensor) -> Tensor:
    q, k, v = x.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhij,bhjd->bhid", e / e.sum(-1, keepdim=True), v)


def cross(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
    same = labels[:, None, :, None] == keys[:, None, None, :]
    return (q @ k.mT).masked_fill(~same, -1e4).softmax(-1) @ v


def wrong_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


PROGRAMS: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (plain, (Q, K, V)),
    (gpt2, (Q, K, V, torch.ones(1, 1, 16, 16, dtype=torch.bool))),
    (llama, HALF),
    (gemma, (Q, K, V)),
    (bert, (Q, K, V, PADDING)),
    (t5, (Q, K, V, torch.zeros(7, H))),
    (alibi, (Q, K, V, torch.zeros(H))),
    (packed, (torch.zeros(B, T, 3 * H * D),)),
    (written, (Q, K, V)),
    (cross, (Q, K, V, *LABELS)),
    (wrong_axis, (Q, K, V)),
]


def renamed(root: Expr) -> Expr:
    """The expression with its leaves numbered in the order of their use."""
    new: dict[Expr, Expr] = {}
    names: dict[str, str] = {}
    for node in walk(root):
        if node.op == "input":
            name = names.setdefault(str(node.attrs[0]), f"x{len(names)}")
            new[node] = leaf(name, node.shape, node.dtype)
        else:
            new[node] = make(node.op, tuple(new[a] for a in node.args), unnamed(node), node.shape, node.dtype)
    return new[root]


def unnamed(node: Expr) -> Any:
    return (node.attrs[0], "drawn") if node.op == "dropout" else node.attrs


def described(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> str:
    """The expression of every site, and the specification or the reason."""
    program = torch.export.export(Wrapped(function), args)
    reader = Reader(program.graph_module.graph, program.graph_module)
    parts = []
    for anchor in [m for m in reader.holders if m.op == "dot"]:
        reading = recognise(anchor, Facts())
        if isinstance(reading, Site):
            parts += [to_text(renamed(anchor)), "", f"=> {reading.spec}", f"   {reading.spec.kind()}"]
        elif isinstance(reading, Miss):
            parts += [to_text(renamed(anchor)), "", f"=> stays: {reading.reason}"]
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize(("function", "args"), PROGRAMS, ids=[f.__name__ for f, _ in PROGRAMS])
def test_the_text_is_the_golden_one(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    file = FOLDER / f"{function.__name__}.txt"
    got = described(function, args)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.write_text(got)
    wanted = file.read_text() if file.exists() else ""
    lines = difflib.unified_diff(wanted.splitlines(), got.splitlines(), str(file), "now", lineterm="")
    assert got == wanted, "\n".join(["UPDATE_GOLDEN=1 writes it anew:", *lines])


def test_every_golden_text_has_its_program_and_reads_back() -> None:
    files = sorted(FOLDER.glob("*.txt"))
    assert [f.stem for f in files] == sorted(f.__name__ for f, _ in PROGRAMS)
    for file in files:
        text = file.read_text().partition("\n\n=>")[0]
        assert to_text(parse(text)) == text, file.name
