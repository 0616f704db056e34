"""Who may import whom. The rules keep knowledge in one place, so they are checked and not hoped for.

Every import statement counts, also one inside a function or under `TYPE_CHECKING`, and also
`importlib.import_module` with a literal name.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {  # folder -> the name its modules are imported by
    "fusepass": "fusepass",
    "patterns": "fusepass.patterns",
    "exporters": "fusepass.exporters",
    "tests": "tests",
    "examples": "examples",
    "benchmarks": "benchmarks",
}


def python_files(folder: str) -> list[Path]:
    """The Python files of a root folder, without those that lie behind a link."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [f for f in files if not any(p.is_symlink() for p in f.parents if p != ROOT and ROOT in p.parents)]


def package_of(path: Path) -> str:
    """The package whose relative imports a file would use."""
    folder, *inner = path.relative_to(ROOT).parent.parts or ("",)
    return ".".join([FOLDERS.get(folder, folder), *inner])


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything a source imports; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = package.split(".")
                base = parts[: len(parts) - level + 1] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def within(name: str, *modules: str) -> bool:
    """Whether a dotted name is one of the modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def allowed_in_patterns(name: str) -> bool:
    """Rules speak about expressions: no graphs, no ONNX, no kernels, and of torch only its dtypes."""
    core = ("expressions", "specification", "rules", "patterns")
    known = name == "torch" or within(name, *(f"fusepass.{c}" for c in core), "sympy")
    return known or name.split(".")[0] in sys.stdlib_module_names


def allowed_in_exporters(name: str) -> bool:
    """Exporters run the engine's front door on graphs of their own and write what the spec says.

    Libraries of the target format are theirs to choose; spellings and kernels are none of their business.
    """
    data = ("expressions", "specification", "rules", "dialects")
    engine = (
        "fusepass.recognition.recognize",
        "fusepass.recognition.resemblance",
        "fusepass.compilation.rewrite",
        "fusepass.compilation.fusing",
        "fusepass.writing.layouts",
    )
    reports = ("fusepass.host.config", "fusepass.reports")
    return within(
        name, *(f"fusepass.{d}" for d in data), *engine, *reports, "fusepass.exporters"
    ) or not within(name, *FOLDERS)


def allowed_in_fusepass(name: str) -> bool:
    """The engine knows nothing of the folders that use it."""
    return not within(name, "patterns", "exporters", "tests", "examples", "benchmarks")


def allowed_anywhere(name: str) -> bool:
    """The two mapped folders have one name each: `fusepass.patterns` and `fusepass.exporters`."""
    return not within(name, "patterns", "exporters")


RULES: dict[str, Callable[[str], bool]] = {
    "patterns": allowed_in_patterns,
    "exporters": allowed_in_exporters,
    "fusepass": allowed_in_fusepass,
    "tests": allowed_anywhere,
    "examples": allowed_anywhere,
    "benchmarks": allowed_anywhere,
}


@pytest.mark.parametrize("folder", RULES)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(folder)
        for name in imports(path.read_text(encoding="utf-8"), package_of(path))
        if not RULES[folder](name)
    ]
    assert not found, "\n".join(found)


def test_links_are_not_followed() -> None:
    names = {path.relative_to(ROOT).parts[1] for path in python_files("fusepass")}
    assert not names & {"patterns", "exporters"}
    assert ROOT / "exporters" / "__init__.py" in python_files("exporters")


@pytest.mark.parametrize(
    ("folder", "source", "refused"),
    [
        ("patterns", "import math, sympy\nfrom fusepass.expressions.ir import Expr", []),
        ("patterns", "from . import masks\nfrom .heads import group\nfrom ..specification import Scale", []),
        ("patterns", "from fusepass import expressions, kernels", ["fusepass.kernels"]),
        ("patterns", "import torch\nf32 = torch.float32", []),
        ("patterns", "def f():\n    from torch import fx", ["torch.fx"]),
        ("patterns", "import torch.nn.functional", ["torch.nn.functional"]),
        ("patterns", "from ..kernels import sdpa", ["fusepass.kernels.sdpa"]),
        ("patterns", "from fusepass.irregular import x", ["fusepass.irregular.x"]),
        ("patterns", "import importlib\nimportlib.import_module('onnx')", ["onnx"]),
        ("patterns", "import fusepass", ["fusepass"]),
        ("exporters", "import onnx, torch\nfrom fusepass.dialects.onnx import read", []),
        ("exporters", "from fusepass.kernels import sdpa", ["fusepass.kernels.sdpa"]),
        ("exporters", "from fusepass.patterns import masks", ["fusepass.patterns.masks"]),
        ("fusepass", "from .patterns import masks\nimport torch", []),
        ("fusepass", "import patterns.masks\nfrom tests import zoo", ["patterns.masks", "tests.zoo"]),
        ("tests", "from exporters import onnx", ["exporters.onnx"]),
    ],
)
def test_the_rules_themselves(folder: str, source: str, refused: list[str]) -> None:
    names = imports(source, FOLDERS[folder])
    assert [name for name in names if not RULES[folder](name)] == refused
