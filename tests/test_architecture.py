"""ARCHITECTURE.md is a map: it names every file, its rooms are the checked ones, its walk is what happens."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fusepass.reports.collector import collect
from tests.import_rules import PACKAGE, ROOMS, ROOT, python_files

TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
WALK = re.findall(r"^\d+\. \[([^\]]+)\]", TEXT.split("### The walk of one site")[1].split("\n## ")[0], re.M)


def test_every_link_leads_somewhere() -> None:
    assert not [link for link in LINKS if not link.startswith("http") and not (ROOT / link).exists()]


def test_every_module_is_on_the_map() -> None:
    """Rooms are named by their folder, and what they hold is in them."""
    files = {str(path.relative_to(ROOT)) for folder in PACKAGE for path in python_files(folder)}
    rooms = {file for file in files if file.endswith("/__init__.py") and file != "fusepass/__init__.py"}
    assert not files - rooms - set(LINKS)


def test_the_table_of_rooms_is_the_one_that_is_checked() -> None:
    rows = re.findall(r"^\| \[(?:fusepass/)?(\w+)\]\([^)]*\) \|[^|]*\| ([^|]*) \|$", TEXT, re.M)
    table = {room: () if uses == "–" else tuple(uses.split(", ")) for room, uses in rows}
    assert table == ROOMS and list(table) == list(ROOMS)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(q.shape[2])
    scores = (q @ k.mT / 8).masked_fill(n[None, :] > n[:, None], float("-inf"))
    return scores.softmax(-1) @ v


def test_the_walk_of_one_site_is_what_happens() -> None:
    """At most 25 files, none twice, in the order in which Python first enters them."""
    q = torch.randn(2, 4, 6, 64)
    causal(q, q, q)
    fused = torch.compile(causal, backend="fusepass", options={"inner": "eager"})
    with collect() as seen, entered() as files:
        fused(q, q, q)
    assert [site.kernel for site in seen.sites] == ["sdpa"]
    assert len(WALK) == len(set(WALK)) and 20 <= len(WALK) <= 25
    assert not set(WALK) - set(files)
    assert [file for file in files if file in WALK] == WALK


@contextmanager
def entered() -> Iterator[list[str]]:
    """The files of the package, in the order in which a function of each is called for the first time."""
    files: dict[str, None] = {}
    names: dict[str, str | None] = {}

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or frame.f_code.co_name == "<module>":
            return
        file = frame.f_code.co_filename
        if file not in names:
            path = Path(file).resolve()
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGE
            names[file] = str(path.relative_to(ROOT)) if inside else None
        if (name := names[file]) is not None:
            files.setdefault(name)

    order: list[str] = []
    sys.setprofile(called)
    try:
        yield order
    finally:
        sys.setprofile(None)
        order.extend(files)


def test_tests_mirror_the_rooms() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "fuzz", "golden", "recipes"} <= set(ROOMS)


def test_no_helper_of_the_tests_is_written_twice() -> None:
    """Functions of several lines with the same body, whatever they are called."""
    homes: dict[str, list[str]] = {}
    for path in python_files("tests"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = "\n".join(map(ast.unparse, [node.args, *body]))
                homes.setdefault(text, []).append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not [places for places in homes.values() if len(places) > 1]
