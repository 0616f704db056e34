"""Which modules may import which. The rules keep knowledge in one place, so they are checked.

Every import statement counts, also one inside a function. Each rule is broken on purpose below, by small
sources of a package that does not exist.
"""

from __future__ import annotations

import ast

import pytest

from tests.import_rules import (
    FOLDERS,
    PACKAGE,
    ROOMS,
    ROOT,
    imports,
    module_of,
    python_files,
    room_of,
    sources,
    violations,
    within,
)


def test_the_package_keeps_the_rules() -> None:
    broken = violations(sources())
    assert not broken, "\n".join(broken)


def test_every_file_is_in_one_room() -> None:
    rooms = {room_of(name) for name in sources()}
    assert rooms == {None, *ROOMS}


def test_the_table_has_one_direction() -> None:
    """A room uses those above it."""
    above: list[str] = []
    for room, uses in ROOMS.items():
        assert {one.split(".")[0] for one in uses} <= set(above), room
        above.append(room)


def test_every_room_says_in_a_sentence_what_it_is() -> None:
    texts = sources()
    for room in ROOMS:
        sentence = ast.get_docstring(ast.parse(texts[f"fusepass.{room}"]))
        assert sentence and sentence.split("\n")[0].endswith("."), room


def test_there_are_at_most_a_dozen_rooms_inside_fusepass() -> None:
    inside = {path.name for path in (ROOT / "fusepass").iterdir() if path.is_dir() and not path.is_symlink()}
    assert inside - {"__pycache__"} == set(ROOMS) - {"patterns", "exporters"} and len(ROOMS) - 2 <= 12


@pytest.mark.parametrize("folder", sorted(set(FOLDERS) - set(PACKAGE)))
def test_users_of_the_package_know_its_folders_by_one_name(folder: str) -> None:
    for path in python_files(folder):
        for each in imports(path.read_text(encoding="utf-8"), module_of(path)):
            assert not within(each.name, "patterns", "exporters"), f"{path}: {each.name}"


def test_links_are_not_followed() -> None:
    names = {path.relative_to(ROOT).parts[1] for path in python_files("fusepass")}
    assert not names & {"patterns", "exporters"}
    assert ROOT / "exporters" / "__init__.py" in python_files("exporters")


IR, ENGINE, EMIT = "fusepass.expressions.ir", "fusepass.rules.engine", "fusepass.writing.emit"
MASKS, SDPA = "fusepass.patterns.masks", "fusepass.kernels.sdpa"


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        (MASKS, "import math, sympy\nfrom fusepass.expressions.ir import Expr", None),
        (MASKS, "from . import heads\nfrom ..rules.engine import Term", None),
        (MASKS, "import torch\nf32 = torch.float32", None),
        (MASKS, "import torch.nn.functional", "torch for its dtypes"),
        (MASKS, "from torch import fx", "torch for its dtypes"),
        (EMIT, "import pkgutil\npkgutil.resolve_name(name)", "by a computed name"),
        (EMIT, "import pkgutil\npkgutil.resolve_name('fusepass.kernels.sdpa:SDPA')", "may not use kernels"),
        ("fusepass.kernels", "import pkgutil\npkgutil.resolve_name(name)", None),
        (ENGINE, "import importlib\nimportlib.import_module('onnx')", "torch for its dtypes"),
        ("fusepass.compilation.site_pass", "from torch import fx", "torch for its dtypes"),
        (MASKS, "from fusepass.kernels import sdpa", "patterns may not use kernels"),
        (MASKS, "from ..kernels.sdpa import emit", "patterns may not use kernels"),
        (SDPA, "from fusepass.writing.emit import Builder\nimport onnx", None),
        (SDPA, "from fusepass.patterns.masks import classify", "kernels may not use patterns"),
        (SDPA, "def f():\n    from fusepass.patterns import masks", "kernels may not use patterns"),
        ("fusepass.exporters.onnx.files", "from fusepass.writing.emit import Builder", "may not use writing"),
        ("fusepass.irregular", "", "is in no room"),
        ("fusepass.expressions_of.ir", "", "is in no room"),
        (EMIT, "import patterns.masks", "knows none of these folders"),
        (EMIT, "from tests import zoo", "knows none of these folders"),
        (EMIT, "def f():\n    import flash_attn.cute\n    from torch._inductor import config", None),
        (EMIT, "def f():\n    import ctypes", "inside a function"),
        (EMIT, "def f():\n    from fusepass.expressions import ir", "inside a function"),
        (EMIT, "def f():\n    from fusepass.writing import slow", None),
        (EMIT, "class A:\n    async def f(self):\n        import json", "inside a function"),
        (EMIT, "if TYPE_CHECKING:\n    from fusepass.rules.engine import Term", "for types alone"),
        (EMIT, "from fusepass import __version__", None),
        (EMIT, "from fusepass import fuse", "front door"),
        (EMIT, "import fusepass.__main__", "front door"),
        ("fusepass.__main__", "def f():\n    from fusepass.kernels import sdpa", None),
    ],
)
def test_each_rule_can_be_broken(module: str, source: str, words: str | None) -> None:
    others = dict.fromkeys((IR, ENGINE, EMIT, MASKS, SDPA, "fusepass.patterns.heads"), "")
    packages = {"fusepass", "fusepass.__main__", *(name.rpartition(".")[0] for name in others)}
    slow = {"fusepass.writing.slow": "from torch._inductor import ir"}
    broken = violations({**dict.fromkeys(packages, ""), **others, **slow, module: source})
    if words is None:
        assert not broken
    else:
        assert broken and words in broken[-1], broken


@pytest.mark.parametrize("how", ["import fusepass.rules.c", "def f():\n    from fusepass.rules import c"])
def test_a_circle_is_found(how: str) -> None:
    """Through several modules, and where an import inside a function closes it."""
    texts = {
        "fusepass": "",
        "fusepass.rules": "",
        "fusepass.rules.a": "from fusepass.rules.b import x",
        "fusepass.rules.b": how,
        "fusepass.rules.c": "from . import a",
        "fusepass.rules.d": "from . import a",
    }
    circle = "circle: fusepass.rules.a -> fusepass.rules.b -> fusepass.rules.c"
    assert circle in violations(texts)
    assert not [f for f in violations({**texts, "fusepass.rules.c": "import math"}) if "circle" in f]


def test_a_circle_through_the_table_of_libraries_is_found() -> None:
    """The modules that its rows name count as imported by the file that loads them."""
    texts = {
        "fusepass": "",
        "fusepass.kernels": "from pkgutil import resolve_name\nresolve_name(entry)",
        "fusepass.kernels.flash": "from fusepass.kernels import named",
    }
    assert "circle: fusepass.kernels -> fusepass.kernels.flash" in violations(texts)
