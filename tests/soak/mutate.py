"""Small wrong changes to a source file, each of which some test should notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}


@dataclass(frozen=True)
class Mutant:
    """One change: where, what, and the file with it."""

    path: Path
    line: int
    text: str
    change: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}: {self.change}   in   {self.text}"


def mutants(path: Path, source: str) -> Iterator[Mutant]:
    """All changes of a file: operators, constants, conditions, arguments, and statements left out.

    Texts that users read, annotations, asserts and imports stay as they are.
    """
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for node in _changeable(ast.parse(source)):
        old = ast.get_source_segment(source, node) or ""
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        for new in _changes(node):
            replaced = new if isinstance(node, ast.stmt) else f"({new})"
            changed = (source.encode()[:begin] + replaced.encode() + source.encode()[end:]).decode()
            shown = f"{' '.join(old.split())} -> {new}"
            yield Mutant(path, node.lineno, lines[node.lineno - 1].decode().strip(), shown, changed)


def _changeable(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """A node and all below it, without what only people and type checkers read."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr) or _is_log(node):
        return
    for part in _parts(node):
        yield from _changeable(part)


def _parts(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef):
        return [*node.args.defaults, *(default for default in node.args.kw_defaults if default), *node.body]
    if isinstance(node, ast.ClassDef):
        return [*node.body]
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    return [*ast.iter_child_nodes(node)]


def _is_log(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("log.")


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    """What may stand instead of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.unparse(ast.Compare(node.left, [_swapped(node.ops[0])], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.unparse(ast.BinOp(node.left, _swapped(node.op), node.right))
    elif isinstance(node, ast.BoolOp):
        yield ast.unparse(ast.BoolOp(_swapped(node.op), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) not in ("min", "max"):
        one, two = node.args[:2] if len(node.args) > 1 else (None, None)
        if one and two and not any(isinstance(arg, ast.Starred) for arg in (one, two)):
            swapped = ast.Call(node.func, [two, one, *node.args[2:]], node.keywords)
            if ast.unparse(swapped) != ast.unparse(node):
                yield ast.unparse(swapped)
    elif isinstance(node, ast.IfExp):
        yield ast.unparse(ast.IfExp(node.test, node.orelse, node.body))
    else:
        yield from _statements(node)


def _swapped(operator: ast.AST) -> ast.AST:
    return SWAPS[type(operator)]()


def _constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
    elif isinstance(value, float):
        yield repr(value * 2 or 1.0)
    elif isinstance(value, str):
        yield repr(f"{value}X")


def _statements(node: ast.expr | ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return None"
    elif isinstance(node, ast.Raise | ast.AugAssign | ast.Delete) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_log(node)
    ):
        yield "pass"
    elif isinstance(node, ast.Continue):
        yield "break"
    elif isinstance(node, ast.Break):
        yield "continue"
