"""Every example runs, and every Python block of the README and the guides prints what the page shows."""

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
    """The demo switches off warnings that later tests check."""
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


WRITTEN = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *(page for page in WRITTEN if page.startswith("docs/guides/"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(?!\$)(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the output that is shown below it, if any."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def comparable(output: str) -> str:
    """Output without what differs from run to run: seconds, and trailing blanks."""
    return re.sub(r" *$", "", re.sub(r"\d+\.\d\d s\b", "0.00 s", output), flags=re.MULTILINE).strip()


@pytest.mark.usefixtures("instant_inductor")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = blocks(page)
    assert examples
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # Dynamo looks a function's module up by its name
    for number, (source, shown) in enumerate(examples):
        # One namespace: later blocks use what earlier ones define.
        path = tmp_path / (f"example{number + 1}.py" if number else "example.py")
        path.write_text(source, encoding="utf-8")
        exec(compile(source, str(path), "exec"), vars(module))
        printed = capsys.readouterr().out
        assert not shown or comparable(printed) == comparable(shown), printed


def test_the_numbers_of_the_readme_are_those_of_the_result_files() -> None:
    readme = importlib.import_module("benchmarks.readme")
    text = readme.README.read_text(encoding="utf-8")
    assert readme.written(text) == text, "run: python -m benchmarks.readme"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", *WRITTEN])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:fusepass|patterns|exporters|tests|examples|benchmarks|docs)/[\w./]+\.\w+)`", text)
    )
    missing = {name for name in named if not (ROOT / name).exists()}
    linked = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text))
    missing |= {name for name in linked if not ((ROOT / page).parent / name).exists()}
    assert not missing
