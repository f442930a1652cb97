"""Find the names of checks in the source of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_IN_TEXT = re.compile(r"\[([a-z]+(?:-[a-z]+)*)\](?: |$)")
_NAME = re.compile(r"[a-z]+(?:-[a-z]+)*")


def find_check_names(package: Path) -> set[str]:
    """Return the names of all checks that a package has.

    A name is the first argument of ``Problem`` or of a function that makes one, whose own name then
    contains ``problem``; or it stands in brackets in the text of an error that is raised. The flags
    ``init`` and ``done`` share a function, which adds ``-dtype`` or ``-shape``.
    """
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                names |= set(_IN_TEXT.findall(_text(node.exc)))
            elif isinstance(node, ast.Call):
                names |= set(_names_of_call(node))
    return names


def _names_of_call(call: ast.Call) -> Iterator[str]:
    called = getattr(call.func, "id", "")
    first = getattr(call.args[0], "value", None) if call.args else None
    if "problem" not in called.lower() or not isinstance(first, str):
        return
    if called == "_flag_problems":
        yield from (f"{first}-dtype", f"{first}-shape")
    elif _NAME.fullmatch(first):
        yield first


def _text(node: ast.expr) -> str:
    return "".join(str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant))
