"""The pages of the site are complete. ``make docs`` builds them, and finds broken links."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.check_names import find_check_names

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"

yaml = pytest.importorskip("yaml")
public_names = importlib.import_module("scripts.public_names")
PACKAGES = ("rnnkeys", *public_names.public_modules())


def read_nav() -> set[str]:
    text = (PROJECT / "mkdocs.yml").read_text()
    return set(_pages(yaml.safe_load(text)["nav"]))


def read_reference() -> str:
    return "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))


def test_nav_lists_every_page_of_the_docs():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages and pages <= read_nav()


def test_nav_names_only_pages_that_exist():
    assert [uri for uri in read_nav() if not _exists(uri)] == []


@pytest.mark.parametrize("module", public_names.public_modules())
def test_reference_documents_every_public_module(module):
    assert f"{{{{ names {module} }}}}" in read_reference()


@pytest.mark.parametrize("module", PACKAGES)
def test_reference_documents_every_public_name(module):
    shown = {one.defined for name in PACKAGES[1:] for one in public_names.public_names(name)}
    for name, defined in public_names.exports(module).items():
        # Names of TorchRL have no docstring here, and are named in the text.
        assert defined in shown or f"`rnnkeys.{name}`" in read_reference(), name


@pytest.mark.parametrize("module", PACKAGES)
def test_public_names_are_those_that_a_user_can_import(module):
    imported = importlib.import_module(module)
    for name, defined in public_names.exports(module).items():
        source, _, original = defined.rpartition(".")
        assert getattr(imported, name) is getattr(importlib.import_module(source), original)


def test_error_index_has_a_heading_for_every_check_and_no_other():
    headings = re.findall(r"^### (.+)$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(find_check_names(PROJECT / "rnnkeys"))


def test_error_index_names_a_remedy_for_every_check():
    sections = re.split(r"^### ", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)[1:]
    assert [text.split()[0] for text in sections if text.count("**Remedy**: ") != 1] == []


@pytest.mark.parametrize("name", ["docs_docstrings", "docs_hooks", "public_names"])
def test_scripts_of_the_site_pass_their_doctests(name):
    for needed in ("griffe", "latex2mathml", "mkdocs"):
        pytest.importorskip(needed)
    result = doctest.testmod(importlib.import_module(f"scripts.{name}"))
    assert result.failed == 0 and result.attempted > 0


def test_styles_of_the_site_exist():
    styles = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["extra_css"]
    assert styles and [path for path in styles if not (DOCS / path).is_file()] == []


def test_pages_that_the_source_names_exist():
    sources = [path for name in ("rnnkeys", "tutorials") for path in (PROJECT / name).rglob("*.py")]
    named = {page for path in sources for page in re.findall(r"docs/[\w/]+\.md", path.read_text())}
    assert named and [page for page in named if not (PROJECT / page).is_file()] == []


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else _pages(value)


def _exists(uri: str) -> bool:
    return (DOCS / uri).is_file() or (PROJECT / uri).is_file() or _notebook(uri).is_file()


def _notebook(uri: str) -> Path:
    return (DOCS / uri).with_suffix(".ipynb")
