"""The public names of the package, read from its source without importing it.

Public are the names that ``rnnkeys`` and its packages import as themselves (``from .x import A as
A``), and those that its modules define, unless they start with an underscore.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rnnkeys"


class PublicName(NamedTuple):
    """A public name.

    Attributes:
        path: where users import it from: ``rnnkeys`` itself, if it is there.
        defined: path of its definition.
        summary: first sentence of its docstring, or nothing.
    """

    path: str
    defined: str
    summary: str

    @property
    def name(self) -> str:
        """The name alone, without the module."""
        return self.path.rpartition(".")[2]


@cache
def public_modules() -> tuple[str, ...]:
    """Return the packages and modules that have public names, without ``rnnkeys`` itself.

    Examples:
        >>> "rnnkeys.objectives" in public_modules(), "rnnkeys._compat" in public_modules()
        (True, False)
    """
    paths = (ROOT / PACKAGE).iterdir()
    names = {
        path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    return tuple(f"{PACKAGE}.{name}" for name in sorted(names) if not name.startswith("_"))


@cache
def public_names(module: str) -> tuple[PublicName, ...]:
    """Return the public names of a package or module, in the order of its source.

    A name that several packages export belongs to the one that its definition lies in.

    Args:
        module: path of the module, such as ``rnnkeys.objectives``.

    Examples:
        >>> "rnnkeys.StatefulPolicy" in [name.path for name in public_names("rnnkeys.deploy")]
        True
    """
    top = set(exports(PACKAGE).values())
    names = []
    for name, defined in exports(module).items():
        if defined.startswith(module + "."):
            path = f"{PACKAGE}.{name}" if defined in top else f"{module}.{name}"
            names.append(PublicName(path, defined, _summary(defined)))
    return tuple(names)


@cache
def exports(module: str) -> dict[str, str]:
    """Return the path of each definition that a module exports, by its public name.

    Examples:
        >>> exports("rnnkeys.deploy")["export_step"]
        'rnnkeys.deploy.export.export_step'
    """
    if _path(module).name != "__init__.py":
        definitions = _definitions(module)
        return {name: f"{module}.{name}" for name in definitions if not name.startswith("_")}
    return {
        name: _follow(module, name)
        for name, (_, same) in _imports(module).items()
        if same and not name.startswith("_")
    }


def _follow(module: str, name: str) -> str:
    """Return the path of a definition that a module imports, perhaps through others."""
    while module.startswith(PACKAGE) and name not in _definitions(module):
        module = _imports(module)[name][0]
    return f"{module}.{name}"


@cache
def _imports(module: str) -> dict[str, tuple[str, bool]]:
    """Return the module that each name is imported from, and whether it is imported as itself."""
    found = {}
    package = module if _path(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in _parse(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*parents, node.module])
            for alias in node.names:
                found[alias.asname or alias.name] = (source, alias.asname == alias.name)
    return found


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in _parse(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        for target in _targets(node):
            found[target] = node
    return found


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _summary(defined: str) -> str:
    module, _, name = defined.rpartition(".")
    node = _definitions(module)[name]
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return ""
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text())


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
