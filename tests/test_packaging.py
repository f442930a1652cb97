"""What is built and installed: complete, typed, and in need of four dependencies only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from email import message_from_string
from email.message import Message
from importlib import import_module, metadata
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

import rnnkeys

# tomllib is tomli, which came into Python with 3.11.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT = Path(__file__).resolve().parent.parent
DEPENDENCIES = {"numpy", "tensordict", "torch", "torchrl"}
# Import names of what the extras install.
OPTIONAL = {"cv2", "gymnasium", "hypothesis", "matplotlib", "pygame", "pytest", "tqdm", "triton"}
USE = """
import torch
from tensordict import TensorDict
from rnnkeys import LSTMModule, set_recurrent_mode

lstm = LSTMModule(input_size=3, hidden_size=4, in_key="x", out_key="y")
data = TensorDict({"x": torch.randn(2, 5, 3), "is_init": torch.zeros(2, 5, 1, dtype=bool)}, [2, 5])
with set_recurrent_mode(True):
    assert lstm(data)["y"].shape == (2, 5, 4)
"""


class Built(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel built from it; from a copy, for building writes to its source."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("rnnkeys", "tests", "scripts", "tutorials", "benchmarks", "docs"):
        if (PROJECT / name).is_dir():
            copytree(PROJECT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for path in PROJECT.iterdir():
        if path.is_file():
            copy(path, source)
    _python(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return Built(wheel, sdist)


def test_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(built):
    names = {Path(name) for name in zipfile.ZipFile(built.wheel).namelist()}
    modules = {path.relative_to(PROJECT) for path in (PROJECT / "rnnkeys").rglob("*.py")}
    assert {p for p in names if p.parts[0] == "rnnkeys"} == modules | {Path("rnnkeys/py.typed")}
    info = "-".join(built.wheel.name.split("-")[:2]) + ".dist-info"
    assert {p.parts[0] for p in names} == {"rnnkeys", info}
    assert any(p.name == "LICENSE" for p in names)


def test_sdist_holds_what_a_contributor_needs(built):
    with tarfile.open(built.sdist) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "tests/support/reference.py",
    ):
        assert name in names
    assert {str(p) for p in _linked_files(PROJECT / "README.md")} <= names


def test_package_requires_four_dependencies_alone(built):
    described = _metadata(built.wheel)
    requirements = [Requirement(text) for text in described.get_all("Requires-Dist", [])]
    assert {r.name for r in requirements if "extra" not in str(r.marker)} == DEPENDENCIES
    assert described["License-Expression"] == "MIT"
    assert described["Requires-Python"] == ">=3.10"


def test_wheel_without_extras_installs_and_works(built, tmp_path):
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    _link_installed(DEPENDENCIES, site)
    install = ("install", "-q", "--no-index", "--no-deps", built.wheel)
    _python(sys.executable, "-m", "pip", "--python", python, *install)
    found = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    # torch's CUDA build brings triton of itself.
    optional = OPTIONAL - {Requirement(text).name for text in metadata.requires("torch") or []}
    assert _python(python, "-c", found.format(sorted(optional)), cwd=tmp_path) == "[]"
    where = _python(python, "-c", f"{USE}\nimport rnnkeys; print(rnnkeys.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(site)


def test_import_of_the_package_imports_no_optional_package():
    """Beyond those that the dependencies import of themselves."""
    script = (
        "import sys, torchrl.collectors, torchrl.data, torchrl.envs, torchrl.modules, "
        "torchrl.objectives; before = set(sys.modules); import rnnkeys; "
        f"print(sorted({OPTIONAL} & (set(sys.modules) - before)))"
    )
    assert _python(sys.executable, "-c", script) == "[]"


def test_badges_say_what_pyproject_says():
    described = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    badges = set(re.findall(r"\[!\[(.+?)\]\((\S+?)\)\]", (PROJECT / "README.md").read_text()))
    name = "Programming Language :: Python :: 3."
    pythons = [int(one[len(name) :]) for one in described["classifiers"] if one.startswith(name)]
    (torchrl,) = (one for one in described["dependencies"] if one.startswith("torchrl"))
    bounds = re.fullmatch(r"torchrl>=([\d.]+),<0\.(\d+)", torchrl)
    assert bounds
    low, end = bounds.groups()
    labels = {
        "python": f"Python 3.{min(pythons)} to 3.{max(pythons)}",
        "TorchRL": f"TorchRL {low} to 0.{int(end) - 1}",
        "licence": f"licence {described['license']}",
    }
    assert {label for label, _ in badges} == set(labels.values())
    for kind, label in labels.items():
        text = label.split(" ", 1)[1].replace(" ", "_")
        assert (label, f"https://img.shields.io/badge/{kind}-{text}-blue") in badges


def test_citation_names_the_version_and_the_licence():
    citation = (PROJECT / "CITATION.cff").read_text().splitlines()
    described = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert f"version: {rnnkeys.__version__}" in citation
    assert f"license: {described['license']}" in citation


def _linked_files(readme: Path) -> set[Path]:
    """Files of the project that the text shows or links to."""
    targets = re.findall(r"\]\(([^)#]+)\)", readme.read_text())
    return {Path(target) for target in targets if "://" not in target}


def _python(python: str | Path, *arguments: str | Path, cwd: Path = PROJECT) -> str:
    """Run Python without the caller's path; returns what it printed, or fails with its errors."""
    command = [str(python), *map(str, arguments)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.strip()


def _metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_string(archive.read(name).decode())


def _link_installed(names: Iterable[str], site: Path) -> None:
    """Link packages and all that they require from this environment: needs no network."""
    # A nightly build is a distribution of another name.
    distributions = metadata.packages_distributions()
    done: set[str] = set()
    todo = set(names)
    while todo:
        done.add(name := todo.pop())
        distribution = metadata.distribution(distributions.get(name, [name])[0])
        for entry in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(str(distribution.locate_file(entry)))
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo |= {requirement.name} - done
