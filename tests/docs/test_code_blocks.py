"""Blocks of code that the doctests do not run: Python that parses, names and options that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tutorials import ROOT, load_tutorial

TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```python.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^[ >$]*python tutorials/(\w+)\.py(.*)$", re.MULTILINE)


def read_blocks() -> list[tuple[str, str]]:
    found = [(page.name, block) for page in PAGES for block in BLOCK.findall(page.read_text())]
    return [(name, block) for name, block in found if ">>>" not in block]


def read_commands() -> list[tuple[str, str]]:
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    texts += [path.read_text().replace("python ", "python tutorials/") for path in TUTORIALS]
    return sorted({command for text in texts for command in COMMAND.findall(text)})


def read_options(tutorial: Path) -> set[str]:
    """Return the fields of the dataclass ``Args``, from which the command line is made."""
    tree = ast.parse(tutorial.read_text())
    (args,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = (node.target for node in args.body if isinstance(node, ast.AnnAssign))
    return {target.id for target in fields if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("name", "block"), read_blocks())
def test_block_of_python_parses_and_imports_names_that_exist(name, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rnnkeys"):
            module = importlib.import_module(str(node.module))
            assert [one.name for one in node.names if not hasattr(module, one.name)] == []


@pytest.mark.parametrize(("tutorial", "arguments"), read_commands())
def test_command_of_a_tutorial_has_options_that_exist(tutorial, arguments):
    fields = read_options(ROOT / "tutorials" / f"{tutorial}.py")
    for option in re.findall(r"(?<= )--([\w-]+)", arguments.partition("#")[0]):
        name = option.replace("-", "_")
        assert name in fields or name.removeprefix("no_") in fields, option


def test_readme_shows_a_deployed_policy_what_the_tutorial_showed_it() -> None:
    [expression] = re.findall(r"^    positions = (.*)$", (ROOT / "README.md").read_text(), re.M)
    tutorial: Any = load_tutorial("recurrent_dqn")
    env = tutorial.make_env(tutorial.Args(), 2)
    seen = env.reset()["observation"]
    states = np.stack([one.unwrapped.state for one in env.base_env._env.envs])
    expected = eval(expression, {"observations": states.astype(np.float32)})
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6)
