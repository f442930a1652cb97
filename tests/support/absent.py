"""Modules whose optional dependency is not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

import pytest


def import_without(monkeypatch: pytest.MonkeyPatch, dependency: str, name: str) -> None:
    """Run a module's code anew, as if a dependency of it were not installed."""
    monkeypatch.setitem(sys.modules, dependency, None)
    spec = find_spec(name)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))
