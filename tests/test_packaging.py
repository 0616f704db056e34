"""What users install: the wheel holds the same files as the tree, and importing it is quick."""

import configparser
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusepass

ROOT = Path(__file__).parent.parent
LINKS = ("patterns", "exporters")
HEAVY = ("torch._inductor", "onnx", "onnxruntime", "onnxscript", "flash_attn", "transformers")
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.md")


def copy_checkout(target: Path, links_work: bool) -> Path:
    """Copy what a build reads. Where links do not work, git writes each one as a file with its target."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    for folder in ("fusepass", *LINKS):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=NOT_SHIPPED)
    # Folders that must not be shipped, whether or not this checkout has them.
    for folder in ("tests", "examples", "benchmarks"):
        (target / folder).mkdir()
        (target / folder / "__init__.py").touch()
    if not links_work:
        for name in LINKS:
            (target / "fusepass" / name).unlink()
            (target / "fusepass" / name).write_text(f"../{name}")
    return target


def expected_files() -> set[str]:
    """Every file of the three root folders under its installed name."""
    names = set()
    for folder, prefix in {"fusepass": "", "patterns": "fusepass/", "exporters": "fusepass/"}.items():
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            behind_link = folder == "fusepass" and relative.parts[1] in LINKS
            shipped = path.suffix != ".md" and "__pycache__" not in path.parts
            if path.is_file() and shipped and not behind_link:
                names.add(prefix + relative.as_posix())
    return names


@pytest.fixture(scope="module", params=[True, False], ids=["links", "no_links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without a network from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_checkout(folder / "checkout", links_work=request.param)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_what_the_tree_holds(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = expected_files()
    assert {"fusepass/py.typed", "fusepass/exporters/__init__.py"} <= expected
    missing, extra = sorted(expected - shipped), sorted(shipped - expected)
    assert not missing, "add the package to `packages`, or the file to `package-data`"
    assert not extra, "the wheel holds files that the tree does not"


def test_wheel_declares_the_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert entries["torch_dynamo_backends"]["fusepass"] == "fusepass.backend:fusepass"
    assert entries["console_scripts"]["fusepass"] == "fusepass.__main__:main"
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in wheel.namelist())


def test_wheel_and_package_name_one_version(wheel: zipfile.ZipFile) -> None:
    assert f"fusepass-{fusepass.__version__}.dist-info/METADATA" in wheel.namelist()


@pytest.mark.parametrize("name", LINKS)
def test_checkout_links_are_relative(name: str) -> None:
    link = ROOT / "fusepass" / name
    if not link.is_symlink():
        pytest.skip("this checkout was made without links")
    assert link.readlink() == Path("..") / name


def python(program: str, cwd: Path) -> str:
    """Run a program in a new interpreter and return what it prints."""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_import_loads_nothing_heavy() -> None:
    program = """
import json, sys
import torch
before = set(sys.modules)
import fusepass
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(python(program, ROOT))
    assert "fusepass" in loaded
    assert not [m for m in loaded if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY)]


def test_mapped_folders_are_one_package() -> None:
    program = """
import fusepass.patterns, fusepass.exporters, pathlib
for package in (fusepass.patterns, fusepass.exporters):
    print(pathlib.Path(package.__file__).resolve().parent)
"""
    assert python(program, ROOT).split() == [str((ROOT / name).resolve()) for name in LINKS]
