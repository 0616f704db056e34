"""The recipes themselves: short, with code that parses, and each walked by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.import_rules import ROOT

PAGES = sorted((ROOT / "docs/recipes").glob("*.md"))


def test_there_are_four() -> None:
    assert [page.stem for page in PAGES] == ["dialect", "kernel", "modifier", "onnx-target"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_is_a_page_that_a_test_walks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    test = f"tests/recipes/test_{page.stem.replace('-', '_')}.py"
    assert f"(../../{test})" in text and (ROOT / test).is_file()
    assert f"docs/recipes/{page.name}" in (ROOT / test).read_text(encoding="utf-8")
    assert f"(docs/recipes/{page.name})" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        ast.parse(f"({block.strip().rstrip(',')})" if block.startswith("Target(") else block)
