"""Makes a failing program smaller as long as it fails in the same way."""

import ast
import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.programs import Program, assigned, read

LISTS = ("body", "inputs", "state", "edits")
NOT_FINITE = ("inf", "-inf", "nan")
PLAIN_SIZES = (2, 2, 2, 4, 4, 8, 8)


def shrink(program: Program, bad: Callable[[Program], bool], seconds: float = 60.0) -> Program:
    """The smallest program found in the given time for which `bad` still holds.

    A change that did not work is tried again only when no other one is left.
    """
    end = time.monotonic() + seconds
    program = tidied(program, bad)
    tried = {program}
    changed = True
    while changed:
        changed, vain = False, set[str]()
        while time.monotonic() < end:
            for change, candidate in candidates(program):
                if change in vain or candidate in tried:
                    continue
                tried.add(candidate)
                if bad(candidate):
                    program, changed = tidied(candidate, bad), True
                    break
                vain.add(change)
                if time.monotonic() > end:
                    return program
            else:
                break
    return program


def tidied(program: Program, bad: Callable[[Program], bool]) -> Program:
    """The program without unused arguments, lines whose results are not read, and second names of values."""
    small = program
    while (next_one := _tidier(small)) != small:
        small = next_one
    if small == program or bad(small):
        return small
    used = _read(program.body, program.results)
    fewer = replace(program, args=tuple(name for name in program.args if name in used) or program.args[:1])
    return fewer if fewer == program or bad(fewer) else program


def _tidier(program: Program) -> Program:
    """One step of `tidied`."""
    used = _read(program.body, program.results)
    args = tuple(name for name in program.args if name in used) or program.args[:1]
    body = tuple(
        line
        for place, line in enumerate(program.body)
        if assigned(line) is None or assigned(line) in _read(program.body[place + 1 :], program.results)
    )
    inputs = tuple(
        line
        for place, line in enumerate(program.inputs)
        if assigned(line) is None or assigned(line) in _read(program.inputs[place + 1 :], args)
    )
    return next(_inlined(replace(program, args=args, body=body, inputs=inputs)), ("", program))[1]


def _read(*lines: tuple[str, ...]) -> set[str]:
    return set[str]().union(*(read(line) for part in lines for line in part))


def candidates(program: Program) -> Iterator[tuple[str, Program]]:
    """Simpler programs, each with the change that makes it; those that are much simpler come first."""
    yield from _calls(program)
    yield from _without_lines(program)
    yield from _results(program)
    yield from _sizes(program)
    yield from _expressions(program)


def _calls(program: Program) -> Iterator[tuple[str, Program]]:
    """Fewer and simpler calls."""
    for place in range(len(program.sizes)):
        if len(program.sizes) > 1:
            fewer = program.sizes[:place] + program.sizes[place + 1 :]
            yield f"without call {place} of {len(program.sizes)}", replace(program, sizes=fewer)
    if program.dynamic is not None:
        yield "dynamic", replace(program, dynamic=None)
    if program.mode != "grad":
        yield "mode", replace(program, mode="grad")
    if program.inner != "eager":
        yield "inner", replace(program, inner="eager")
    if program.kernel != "auto":
        yield "kernel", replace(program, kernel="auto")
    if program.state and not any("self" in line for line in program.body):
        yield "state", replace(program, state=(), edits=())


def _without_lines(program: Program) -> Iterator[tuple[str, Program]]:
    """The last lines go first: nothing reads them."""
    for attribute in LISTS:
        lines = getattr(program, attribute)
        for place in reversed(range(len(lines))):
            rest = lines[:place] + lines[place + 1 :]
            yield f"without {lines[place]}", _with(program, attribute, rest)


def _with(program: Program, attribute: str, lines: tuple[str, ...]) -> Program:
    """The program with other lines."""
    changes: dict[str, Any] = {attribute: lines}
    return replace(program, **changes)


def _results(program: Program) -> Iterator[tuple[str, Program]]:
    if len(program.results) > 1:
        for place in range(len(program.results)):
            rest = program.results[:place] + program.results[place + 1 :]
            yield f"without result {program.results[place]}", replace(program, results=rest)


def _inlined(program: Program) -> Iterator[tuple[str, Program]]:
    """Without a name that only stands for another name or for a number; without any, the program itself."""
    for place, line in enumerate(program.body):
        name = assigned(line)
        value = line.partition(" = ")[2]
        if name is not None and re.fullmatch(r"\w+", value):
            rest = [_renamed(other, name, value) for other in program.body[place + 1 :]]
            results = tuple(_renamed(result, name, value) for result in program.results)
            yield line, replace(program, body=(*program.body[:place], *rest), results=results)
    yield "", program


def _renamed(line: str, name: str, value: str) -> str:
    return re.sub(rf"\b{name}\b", value, line)


def _sizes(program: Program) -> Iterator[tuple[str, Program]]:
    """Simple sizes for all; then one size after another."""
    if any(sizes != PLAIN_SIZES for sizes in program.sizes):
        yield "plain sizes", replace(program, sizes=(PLAIN_SIZES,) * len(program.sizes))
    for turn, sizes in enumerate(program.sizes):
        for place, size in enumerate(sizes):
            for smaller in (1, 2, 4):
                if smaller < size:
                    changed = (*sizes[:place], smaller, *sizes[place + 1 :])
                    every = (*program.sizes[:turn], changed, *program.sizes[turn + 1 :])
                    yield f"size {turn} {place} {smaller}", replace(program, sizes=every)


def _expressions(program: Program) -> Iterator[tuple[str, Program]]:
    """One expression replaced by a part of it."""
    for attribute in ("results", *LISTS):
        lines = getattr(program, attribute)
        for place, line in enumerate(lines):
            for simpler in simplified(line):
                changed = (*lines[:place], simpler, *lines[place + 1 :])
                yield f"{line} -> {simpler}", _with(program, attribute, changed)


def simplified(line: str) -> Iterator[str]:
    """A line with one expression replaced by one of its parts, or without one keyword argument."""
    tree = ast.parse(line)
    nodes = list(ast.walk(tree))
    seen = {line}
    for number, node in enumerate(nodes):
        for part in range(len(_parts(node))):
            copied = copy.deepcopy(tree)
            old = list(ast.walk(copied))[number]
            text = ast.unparse(_Swap(old, _parts(old)[part]).visit(copied))
            if text not in seen:
                seen.add(text)
                yield text
        for keyword in range(len(node.keywords) if isinstance(node, ast.Call) else 0):
            copied = copy.deepcopy(tree)
            call = list(ast.walk(copied))[number]
            assert isinstance(call, ast.Call)
            if call.keywords[keyword].arg not in ("seed", "out", "inplace"):
                del call.keywords[keyword]
                yield ast.unparse(copied)


class _Swap(ast.NodeTransformer):
    """Replaces one node by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)


def _parts(node: ast.AST) -> list[ast.AST]:
    """Replacements for an expression; never infinity or NaN, which cause failures of their own."""
    return [part for part in _all_parts(node) if ast.unparse(part) not in ("torch", "F", "math", *NOT_FINITE)]


def _all_parts(node: ast.AST) -> list[ast.AST]:
    match node:
        case ast.Call(func=ast.Attribute(value=value), args=args):
            return [value, *args]
        case ast.Call(args=args):
            return [] if ast.unparse(node.func) in ("r", "whole") else list(args)
        case ast.BinOp(left=left, right=right):
            return [left, right]
        case ast.UnaryOp(operand=operand) if not isinstance(operand, ast.Constant):
            return [operand]
        case ast.Compare(left=left, comparators=[right]):
            return [left, right]
        case ast.Subscript(value=value) | ast.Attribute(value=value, attr="mT" | "data"):
            return [value]
        case ast.IfExp(body=body, orelse=orelse):
            return [body, orelse]
        case ast.With(body=[statement]):
            return [statement]
        case _:
            return []
