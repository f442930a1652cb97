"""The map of the code in CONTRIBUTING.md: what it names exists, and it names every part."""

from __future__ import annotations

import re

from tests.support.tutorials import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAP_AND_RECIPES = TEXT.partition("## A map of the code")[2].partition("## Write a test")[0]
NAMES = set(re.findall(r"`([^`\s]+)`", MAP_AND_RECIPES))


def test_map_names_only_files_that_exist() -> None:
    folders = ("rnnkeys", "tests", "tutorials", "docs", "benchmarks", "scripts")
    there = [*ROOT.iterdir(), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    files = {name for name in NAMES if re.search(r"(\.(py|md|yml|txt|toml)|/)$", name)}
    absent = {name for name in files if not any(path.match(name) for path in there)}
    assert absent == {"rnnkeys/backends/<name>.py"}  # of the recipe


def test_map_names_every_part_of_the_package_and_every_file_of_the_backends() -> None:
    package = ROOT / "rnnkeys"
    parts = [*package.glob("*.py"), *(path.parent for path in package.glob("*/__init__.py"))]
    parts += (package / "backends").glob("*.py")
    named = " ".join(NAMES).replace("fused*.py", "fused.py fused_gru.py fused_lstm.py")
    known = {name.rstrip("/").split("/")[-1] for name in named.split()}
    assert {path.name for path in parts} - known <= {"__init__.py"}
