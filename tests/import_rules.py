"""The rooms of the package, the rooms that each may use, and a checker of sources, for test_import_rules."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fusepass.host.libraries import BUILT_IN

ROOT = Path(__file__).parent.parent
FOLDERS = {  # folder -> the name its modules are imported by
    "fusepass": "fusepass",
    "patterns": "fusepass.patterns",
    "exporters": "fusepass.exporters",
    "tests": "tests",
    "examples": "examples",
    "benchmarks": "benchmarks",
}
PACKAGE = ("fusepass", "patterns", "exporters")

#: Every room with the rooms, or modules of rooms, that it may use; only those above it in this table.
ROOMS: dict[str, tuple[str, ...]] = {
    "host": (),
    "expressions": ("host",),
    "specification": ("expressions",),
    "rules": ("expressions", "specification"),
    "patterns": ("expressions", "specification", "rules"),
    "dialects": ("host", "expressions"),
    "recognition": ("expressions", "specification", "rules", "patterns"),
    "writing": ("host", "expressions", "rules", "dialects"),
    "kernels": ("host", "expressions", "specification", "rules", "dialects", "writing"),
    "selection": ("host", "expressions", "specification", "rules", "dialects", "writing", "kernels"),
    "reports": (),
    "compilation": (
        "host", "expressions", "specification", "rules", "dialects", "recognition", "writing", "kernels",
        "selection", "reports",
    ),
    "exporters": (
        "host", "expressions", "specification", "rules", "dialects", "recognition", "writing.layouts",
        "reports", "compilation.fusing", "compilation.site_pass",
    ),
    "tools": ("host", "kernels", "selection", "reports", "compilation"),
}  # fmt: skip

#: What people import and run.  Nothing may import them, so they may load their parts when these are needed.
FRONT_DOORS = ("fusepass", "fusepass.__main__", "fusepass.backend", "fusepass.report")

#: The only imports allowed inside functions: libraries that may be missing or take long to load.
LAZY = (
    "cudnn",
    "cutlass",
    "flash_attn",
    "flash_attn_interface",
    "matplotlib",
    "onnx_ir.passes",
    "onnxruntime",
    "onnxscript",
    "torch._dynamo",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch.distributed",
    "torch.nn.attention",
)
IMPORTERS = ("import_module", "resolve_name", "__import__")
#: Who may import modules by names that are computed, and what of the package they import in this way.
COMPUTED: dict[str, tuple[str, ...]] = {
    "fusepass.host.kernel_names": (),  # modules that the user names
    "fusepass.kernels": tuple(
        f"fusepass.kernels.{gate.entry.split(':')[0]}" for gate in BUILT_IN if gate.entry
    ),
    "fusepass.kernels.gates": (),  # libraries of the table
    "fusepass.tools.bench.cases": (),  # flash-attn's packages
    "fusepass.tools.targets": (),  # a model's module, which the command line names
}
#: Options are checked where torch is not loaded.
LAZY_TORCH = "fusepass.host.config"

#: Rooms and modules that know only expressions: no graphs, no file formats, and of torch only the dtypes.
ABSTRACT = ("rules", "patterns", "compilation.site_pass")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a import b` is of `a.b`."""

    name: str
    line: int
    lazy: bool
    """Is it inside a function?"""
    for_types: bool
    """Is it under `if TYPE_CHECKING`?"""


def python_files(folder: str) -> list[Path]:
    """The Python files of a root folder, except those behind a link."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [f for f in files if not any(p.is_symlink() for p in f.parents if p != ROOT and ROOT in p.parents)]


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    folder, *inner = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *inner]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """The text of every module of the package, by its name."""
    files = [path for folder in PACKAGE for path in python_files(folder)]
    return {module_of(path): path.read_text(encoding="utf-8") for path in files}


def imports(source: str, module: str = "", is_package: bool = False) -> Iterator[Import]:
    """Everything that a source imports, wherever the statement stands.

    `importlib.import_module` with a literal name counts too; for others see `computes_names`.
    """
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    functions = _inside(tree, lambda n: isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    types = _inside(tree, lambda n: isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    for node in ast.walk(tree):
        for name in _names(node, package):
            yield Import(name, getattr(node, "lineno", 0), id(node) in functions, id(node) in types)


def _inside(tree: ast.AST, which: Callable[[ast.AST], bool]) -> set[int]:
    """The ids of all nodes inside the nodes for which `which` is true."""
    return {id(inner) for node in ast.walk(tree) if which(node) for inner in ast.walk(node)}


def _names(node: ast.AST, package: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            parts = package.split(".")
            base = parts[: len(parts) - level + 1] if level else []
            prefix = ".".join([*base, *([module] if module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in names)
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if _imports(function):
            yield name.replace(":", ".")


def _imports(node: ast.AST) -> bool:
    """Is this a function that imports what its argument names?"""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in IMPORTERS
    return False


def computes_names(source: str) -> int:
    """The line on which a source imports a module whose name is not a literal; 0 if there is none."""
    tree = ast.parse(source)
    literal = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    }
    used = (node for node in ast.walk(tree) if _imports(node) and id(node) not in literal)
    return next((getattr(node, "lineno", 0) for node in used), 0)


def within(name: str, *modules: str) -> bool:
    """Whether a dotted name is one of the modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def room_of(module: str) -> str | None:
    """The row of the table that a module belongs to; None for a front door.

    Raises:
        LookupError: no row names it.
    """
    if module in FRONT_DOORS:
        return None
    _, room, *_ = [*module.split("."), ""]
    if room not in ROOMS or not within(module, f"fusepass.{room}"):
        raise LookupError(f"{module} is in no room: {', '.join(ROOMS)}")
    return room


def violations(texts: Mapping[str, str]) -> list[str]:
    """The violations of the rules in a package's modules, as readable lines."""
    lines: list[str] = []
    packages = {name for name in texts if any(other.startswith(name + ".") for other in texts)}
    graph: dict[str, set[str]] = {name: set() for name in texts}
    at_top: dict[str, list[str]] = {}
    statements = {name: list(imports(text, name, name in packages)) for name, text in texts.items()}
    for module, text in texts.items():
        if (line := computes_names(text)) and module not in (*FRONT_DOORS, *COMPUTED):
            lines.append(f"{module}:{line} imports a module by a computed name: add it to COMPUTED")
        named = (name for name in COMPUTED.get(module, ()) if name in texts)
        statements[module] += [Import(name, line, lazy=False, for_types=False) for name in named]
    for module, imported in statements.items():
        at_top[module] = [each.name for each in imported if not each.lazy]
    for module, imported in statements.items():
        try:
            room = room_of(module)
        except LookupError as unknown:
            lines.append(str(unknown))
            continue
        for each in imported:
            target = _module(each.name, texts)
            if target is not None and target not in FRONT_DOORS:
                graph[module].add(target)
            reasons = () if room is None else _faults(module, room, each, target, at_top)
            lines += [f"{module}:{each.line} {why}" for why in reasons]
    return lines + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def _module(name: str, texts: Iterable[str]) -> str | None:
    """The module of the package that an imported name is, or is defined in."""
    parts = name.split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((one for one in known if one in texts), None)


def _faults(
    module: str, room: str, each: Import, target: str | None, at_top: Mapping[str, list[str]]
) -> Iterator[str]:
    """What is wrong with one import."""
    name = each.name
    if within(name, "patterns", "exporters", "tests", "examples", "benchmarks"):
        yield f"imports {name}: the package knows none of these folders by that name"
    if each.for_types:
        yield f"imports {name} for types alone, which hides a circle"
    if each.lazy and not _may_be_lazy(module, name, target, at_top):
        yield f"imports {name} inside a function, and it is not a library that may be missing or loads slowly"
    if target in FRONT_DOORS and name != "fusepass.__version__":
        yield f"imports {name}: nothing may import a front door"
    if target is not None and target not in FRONT_DOORS:
        of = room_of(target)
        allowed = [room, *ROOMS[room]]
        if not within(target, *(f"fusepass.{one}" for one in allowed)):
            yield f"imports {name}: {room} may not use {of}"
    abstract = within(module, *(f"fusepass.{one}" for one in ABSTRACT))
    if target is None and abstract and not _is_abstract(name):
        yield f"imports {name}: {module} may use the standard library, sympy, and torch for its dtypes"


def _may_be_lazy(module: str, name: str, target: str | None, at_top: Mapping[str, list[str]]) -> bool:
    if target is not None:  # a module that cannot be loaded without such a library
        return any(within(one, *LAZY) for one in at_top[target])
    return within(name, *LAZY) or (name == "torch" and module == LAZY_TORCH)


def _is_abstract(name: str) -> bool:
    return name == "torch" or within(name, "sympy") or name.split(".")[0] in sys.stdlib_module_names


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    behind: dict[str, set[str]] = {}
    for start in graph:
        todo, seen = list(graph[start]), set[str]()
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo.extend(graph.get(at, ()))
        behind[start] = seen
    groups = {tuple(sorted(b for b in behind[a] if a in behind.get(b, ()))) for a in graph if a in behind[a]}
    return [list(group) for group in sorted(groups)]
