"""Small changes of the package's functions, one at a time, as a mistake would make them.

A mutation changes one expression or statement in the body of a function: a comparison, an
operator, a constant, a condition, a keyword or a statement. Text of errors is left alone.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

OTHER: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Types, texts, and what runs when the function is defined.
SKIPPED_NODES = (ast.JoinedStr, ast.Raise, ast.AnnAssign, ast.arguments)
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list"}
# Two arguments of these may be exchanged.
SYMMETRIC = {"min", "max", "minimum", "maximum", "transpose", "equal"}


class Mutation(NamedTuple):
    """One change of a file.

    Attributes:
        path: of the file, from the root of the checkout.
        function: qualified name of the function.
        line: of the change.
        last_line: of the changed statement.
        offset: of the line, from that of the function.
        before: the expression or statement.
        after: what replaces it.
        repeat: how many equal changes the function has above this one.
        slot: position among the changes of the file.
        is_inside: whether it is inside a positional argument of a call.
    """

    path: str
    function: str
    line: int
    last_line: int
    offset: int
    before: str
    after: str
    repeat: int
    slot: int
    is_inside: bool

    @property
    def name(self) -> str:
        """The change without its line, which moves when the file is edited above it."""
        repeat = f" #{self.repeat + 1}" if self.repeat else ""
        inside = " in an argument" if self.is_inside else ""
        return f"{self.path}:{self.function}: {self.before} -> {self.after}{inside}{repeat}"

    def rank(self, seed: int) -> str:
        """Return a random but fixed rank: other changes of the code do not move it."""
        return hashlib.sha256(f"{seed} {self.name}".encode()).hexdigest()


class _Slot(NamedTuple):
    """A node that may change, what replaces it, and its place in its parent."""

    function: str
    statement: ast.stmt | None
    node: Any
    new: ast.AST
    parent: ast.AST
    field: str
    position: int | None
    is_inside: bool


def list_mutations(root: Path, path: str) -> list[Mutation]:
    """Return all mutations of a file, in the order of its source."""
    seen: dict[tuple[str, str, str, bool], int] = {}
    found = []
    tree = parse_file(root, path)
    places = find_places(tree)
    for number, slot in enumerate(_find_slots(tree)):
        before, after = _shorten(slot.node), _shorten(slot.new)
        same = (slot.function, before, after, slot.is_inside)
        repeat = seen[same] = seen.get(same, -1) + 1
        line = slot.node.lineno
        last = getattr(slot.statement, "end_lineno", line)
        where = (path, slot.function, line, last, places[line][1])
        found.append(Mutation(*where, before, after, repeat, number, slot.is_inside))
    return found


def find_places(tree: ast.Module) -> dict[int, tuple[str, int]]:
    """Return for each line in a function its qualified name, and the offset from its first line."""
    places: dict[int, tuple[str, int]] = {}

    def visit(parent: ast.AST, outer: str) -> None:
        for node in ast.iter_child_nodes(parent):
            name = outer
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                name = f"{outer}.{node.name}".lstrip(".")
            if isinstance(node, FUNCTIONS):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                places.update((line, (name, line - node.lineno)) for line in lines)
            visit(node, name)

    visit(tree, "")
    return places


def parse_file(root: Path, path: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse((root / path).read_text(encoding="utf-8"))


def compile_mutation(root: Path, mutation: Mutation) -> dict[CodeType, CodeType]:
    """Return the code that a mutation changes, the old and the new code of each function."""
    tree, file = parse_file(root, mutation.path), str(root / mutation.path)
    old = compile(tree, file, "exec", dont_inherit=True)
    slot = list(_find_slots(tree))[mutation.slot]
    if slot.position is None:
        setattr(slot.parent, slot.field, slot.new)
    else:
        getattr(slot.parent, slot.field)[slot.position] = slot.new
    changed = compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)
    return dict(_pairs(old, changed))


def _pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    if old != new:
        yield old, new
    inner = {(c.co_name, c.co_firstlineno): c for c in new.co_consts if isinstance(c, CodeType)}
    for code in old.co_consts:
        if isinstance(code, CodeType) and (code.co_name, code.co_firstlineno) in inner:
            yield from _pairs(code, inner[code.co_name, code.co_firstlineno])


def _find_slots(tree: ast.Module) -> Iterator[_Slot]:
    def visit(parent: ast.AST, function: str, statement: Any, is_inside: bool) -> Iterator[_Slot]:
        for field, position, node in _children(parent):
            if field in SKIPPED_FIELDS or getattr(node, "arg", None) == "strict":
                continue
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                yield from visit(node, f"{function}.{node.name}".lstrip("."), None, False)
                continue
            here = node if isinstance(node, ast.stmt) else statement
            is_body = isinstance(parent, ast.Module) or (
                isinstance(parent, ast.ClassDef) and statement is None
            )
            if is_body:
                continue
            inside = is_inside or (isinstance(parent, ast.Call) and field == "args")
            for new in _mutate(node, parent, field):
                yield _Slot(function, here, node, new, parent, field, position, inside)
            if not isinstance(node, SKIPPED_NODES):
                yield from visit(node, function, here, inside)

    yield from visit(tree, "", None, False)


def _children(parent: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    for field, value in ast.iter_fields(parent):
        if isinstance(value, list):
            yield from ((field, i, n) for i, n in enumerate(value) if isinstance(n, ast.AST))
        elif isinstance(value, ast.AST):
            yield field, None, value


def _mutate(node: ast.AST, parent: ast.AST, field: str) -> Iterator[ast.AST]:
    """Yield what may stand in place of a node."""
    if isinstance(node, ast.Constant):
        yield from _mutate_constant(node)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _with(node, ops=[OTHER[type(node.ops[0])]()])
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in OTHER:
        yield _with(node, op=OTHER[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Call):
        yield from _mutate_call(node)
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.copy_location(ast.Pass(), node)
    if field == "test" and isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
        yield ast.copy_location(ast.UnaryOp(ast.Not(), node), node)


def _mutate_constant(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield _with(node, value=not node.value)
    elif isinstance(node.value, (int, float)):
        yield _with(node, value=node.value + 1)


def _mutate_call(node: ast.Call) -> Iterator[ast.AST]:
    starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    name = ast.unparse(node.func).rpartition(".")[2]
    texts = {ast.unparse(argument) for argument in node.args[:2]}
    if len(texts) == 2 and not starred and name not in SYMMETRIC:
        first, second, *rest = node.args
        yield _with(node, args=[second, first, *rest])
    for index, keyword in enumerate(node.keywords):
        if keyword.arg not in {None, "strict"}:
            yield _with(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for field, value in fields.items():
        setattr(new, field, value)
    return new


def _shorten(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:110]
