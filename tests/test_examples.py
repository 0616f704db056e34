"""Every example runs, and so does every Python block of the README and of the page about kernels."""

import importlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RUNS: dict[str, tuple[list[str], str]] = {  # example -> (short settings, something that it must print)
    "backend": ([], "1 of 1 attention site fused (sdpa)"),
    "demo": (["--models", "vit", "--json"], '"ok": true'),
    "enable": ([], "without the pass: 0 graphs seen"),
    "explain": ([], "1 of 3 attention sites fused (sdpa), 2 left as it was"),
    "export_onnx": ([], "1 of 1 attention sites fused (1 Attention), 0 softmaxes left"),
    "own_kernel": ([], "kernel='auto': 1 of 1 attention site fused (blocked)"),
    "exported": ([], "scaled_dot_product_attention"),
    "train_char_gpt": (["--steps", "6", "--seeds", "1"], "2 of 2 attention sites fused (reference)"),
}


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """The demo switches warnings off, which later tests listen to."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


def test_no_example_is_forgotten() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("instant_inductor", "logging_as_it_was")
def test_an_example_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, printed = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert not importlib.import_module(f"examples.{name}").main()
    assert printed in " ".join(capsys.readouterr().out.split())


def blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


@pytest.mark.usefixtures("instant_inductor")
@pytest.mark.parametrize(("page", "least"), [("README.md", 3), ("docs/kernels.md", 1)])
def test_the_code_of_a_page_runs(
    page: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(ROOT / page)
    assert len(found) >= least
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # Dynamo looks a function's module up by its name
    for line, source in found:  # in order, in one namespace: later blocks use what earlier ones define
        exec(compile("\n" * (line - 1) + source, str(ROOT / page), "exec"), vars(module))


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:fusepass|patterns|exporters|tests|examples|benchmarks|docs)/[\w./]+\.\w+)`", text)
    )
    named |= set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing
