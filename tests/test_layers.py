"""The layers of the package: imports run one way, and private attributes stay private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rnnkeys

ROOT = Path(rnnkeys.__file__).parent
# From the bottom to the top: a module or folder imports only from those before it.
LAYERS = (
    *("_version", "_compat", "keys", "checks", "cells", "precision", "mode", "backends"),
    *("sequences", "modules", "policies", "transforms", "objectives", "collectors"),
    *("diagnostics", "deploy"),
    *(
        "gym_masks",
        "environments",
        "spaces",
        "exploration",
        "replay",
        "runs",
        "trainers",
        "__init__",
    ),
)
# Private names of torch, TorchRL and Ray outside of _compat.py; methods of a loss that a subclass
# overrides are read through _super(...).
FOREIGN = {"_buffers", "_clip_bounds", "_filtered_reset_keys", "_init", "_private", "_set_in_keys"}
NAMED_TUPLES = {"_replace"}


def parse() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def find_layer(path: Path) -> str:
    return path.with_suffix("").parts[0]


def find_imports(path: Path, node: ast.AST) -> Iterator[str]:
    """Yield the layers that the relative imports below a node name."""
    for one in ast.walk(node):
        if isinstance(one, ast.ImportFrom) and one.level:
            parent = path.parent.parts[: len(path.parent.parts) + 1 - one.level]
            names = one.module.split(".") if one.module else [alias.name for alias in one.names]
            yield (*parent, *names)[0]


def test_imports_run_from_upper_to_lower_layers() -> None:
    upward = [
        f"{path} imports {layer}"
        for path, tree in parse()
        for layer in find_imports(path, tree)
        if LAYERS.index(layer) > LAYERS.index(find_layer(path))
    ]
    assert not upward


def test_functions_import_no_part_of_the_package() -> None:
    """No import hides in a function to avoid a circle; Triton's kernels need an extra."""
    hidden = [
        f"{path}:{function.lineno}"
        for path, tree in parse()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and "triton" not in path.parts
        for _ in find_imports(path, function)
    ]
    assert not hidden


def test_private_attributes_are_read_by_their_own_class() -> None:
    def is_own(value: ast.expr) -> bool:
        called = value.func if isinstance(value, ast.Call) else value
        return isinstance(called, ast.Name) and called.id in ("self", "cls", "super", "_super")

    foreign = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, tree in parse()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and path.name != "_compat.py"
        if node.attr.startswith("_") and not node.attr.endswith("__")
        if not is_own(node.value) and node.attr not in FOREIGN | NAMED_TUPLES
    ]
    assert not foreign
