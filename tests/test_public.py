"""The public names: exported, typed, documented, and sufficient for the examples."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import fusepass

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
FUNCTIONS = [n for n in fusepass.__all__ if inspect.isfunction(getattr(fusepass, n))]
CLASSES = [n for n in fusepass.__all__ if inspect.isclass(getattr(fusepass, n))]


def test_every_name_is_documented_and_no_other() -> None:
    """The site puts each name's signature and docstring where the page names it."""
    documented = re.findall(r"^::: fusepass\.(\w+)$", PAGE, re.MULTILINE)
    assert len(documented) == len(set(documented)) and set(documented) == set(fusepass.__all__)
    assert len(fusepass.__all__) == len(set(fusepass.__all__))
    assert set(fusepass.__all__) <= set(dir(fusepass))
    assert {*FUNCTIONS, *CLASSES, "__version__"} == set(fusepass.__all__)


@pytest.mark.parametrize("name", fusepass.__all__)
def test_every_name_is_its_modules_own(name: str) -> None:
    """Type checkers and the interpreter find the same object."""
    tree = ast.parse((ROOT / "fusepass/__init__.py").read_text(encoding="utf-8"))
    typed = {a.name: n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    if name == "__version__":
        return
    assert typed[name] == fusepass._HOME[name], "what a type checker sees"
    assert getattr(importlib.import_module(fusepass._HOME[name]), name) is getattr(fusepass, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_typed_and_documented(name: str) -> None:
    function = inspect.unwrap(getattr(fusepass, name))
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    text = inspect.getdoc(function) or ""
    assert len(text) > 40
    if "Args:" in text:
        missing = [n for n in signature.parameters if not re.search(rf"^ +{n}: ", text, re.MULTILINE)]
        assert not missing, "each argument is described"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_typed_and_documented(name: str) -> None:
    cls = getattr(fusepass, name)
    assert dataclasses.is_dataclass(cls)
    assert not (cls.__doc__ or "").startswith(f"{name}("), "a docstring of its own"
    typing.get_type_hints(cls, vars(importlib.import_module(cls.__module__)) | {"torch": Any})


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'nothing'; it has fuse, explain"):
        _ = fusepass.nothing


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_need_public_names_alone(path: Path) -> None:
    public = {"fusepass": set(fusepass.__all__), "fusepass.kernels": set(kernels_all())}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "fusepass":
                assert {alias.name for alias in names} <= public.get(module, set()), ast.unparse(node)
            case ast.Import(names=names):
                assert not [a.name for a in names if a.name.startswith("fusepass.")], ast.unparse(node)
            case ast.Attribute(value=ast.Name(id="fusepass"), attr=name):
                assert name in public["fusepass"], ast.unparse(node)


def kernels_all() -> list[str]:
    from fusepass import kernels

    assert all(hasattr(kernels, name) for name in kernels.__all__)
    return list(kernels.__all__)


def test_the_import_is_light() -> None:
    """It loads no library, and neither does a check of options."""
    used = "import fusepass, sys; fusepass.Options(kernel='flash3', precision='fp8')"
    code = f"{used}; sys.exit(any(m in sys.modules for m in ('torch', 'rich', 'sympy', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
