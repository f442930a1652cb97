"""``python -m rnnkeys doctor``: the doctor for a script, or for a batch that was saved."""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from . import check_recurrent_policy

_PARTS = ("policy", "env", "batch", "loss")
_DESCRIPTION = """\
Look at a recurrent wiring and say what is wrong with it, each with the line that cures it.

TARGET names a function without arguments that makes what is to be looked at and returns it as a
dict, with any of the entries 'policy', 'env', 'batch' and 'loss':

    # wiring.py
    def make():
        ...
        return {"policy": policy, "env": env, "batch": buffer.sample(), "loss": loss}

    python -m rnnkeys doctor wiring.py:make
    python -m rnnkeys doctor my_package.wiring:make --batch batch.pt
    python -m rnnkeys doctor --batch batch.pt

The status is 0 if nothing is wrong, 1 if something is, 2 if there was nothing to look at.
"""


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the commands of ``python -m rnnkeys``.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returns.
    """
    parser = commands.add_parser(
        "doctor",
        help="look at a recurrent wiring and say what is wrong with it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="file.py:function or package.module:function; the file or module is run",
    )
    parser.add_argument(
        "--batch",
        type=Path,
        metavar="PATH",
        help="a batch saved by torch.save(batch, PATH) or batch.memmap(PATH), in place of the "
        "target's; torch.load unpickles it, so take files that you trust",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--steps", type=int, default=32, help="length of the rollout (default: 32)")
    parser.add_argument(
        "--max-staleness",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="how far stored states may be from today's weights (default: 0.1)",
    )
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    parts: dict[str, Any] = dict.fromkeys(_PARTS)
    if options.target is None and options.batch is None:
        parser.error("there is nothing to look at: name a TARGET, or a --batch")
    try:
        if options.target is not None:
            parts.update(_made_by(options.target))
        if options.batch is not None:
            parts["batch"] = load_batch(options.batch)
    except (ImportError, OSError, LookupError, TypeError, ValueError) as error:
        parser.error(str(error.args[-1] if isinstance(error, LookupError) else error))
    limits = {"steps": options.steps, "max_staleness": options.max_staleness}
    report = check_recurrent_policy(**parts, **limits)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    return 1 if report else 0


def _made_by(target: str) -> Mapping[str, Any]:
    """Run the function that a target names, and check what it returns."""
    parts = _find_function(target)()
    if not isinstance(parts, Mapping) or not parts or not set(parts) <= set(_PARTS):
        raise TypeError(
            f"{target} must return a dict with entries {', '.join(_PARTS)}. Got "
            f"{sorted(parts) if isinstance(parts, Mapping) else type(parts).__name__}."
        )
    return parts


def _find_function(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"TARGET must be file.py:function or package.module:function. Got {target!r}."
        )
    if place.endswith(".py"):
        # As python runs a script: what lies beside it can be imported.
        sys.path.insert(0, str(Path(place).resolve().parent))
        names = runpy.run_path(place, run_name=Path(place).stem)
    else:
        sys.path.insert(0, "")
        names = vars(importlib.import_module(place))
    if not callable(names.get(name)):
        raise LookupError(f"{place} has no function {name!r}.")
    return names[name]


def load_batch(path: Path) -> TensorDictBase:
    """Load a batch saved by ``torch.save`` or, if ``path`` is a folder, by ``memmap``.

    Raises:
        FileNotFoundError: if there is nothing.
        TypeError: if it is no TensorDict.
    """
    batch: Any
    if path.is_dir():
        batch = TensorDict.load_memmap(path)
    else:
        batch = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(batch, TensorDictBase):
        raise TypeError(f"{path} must hold a TensorDict. It holds a {type(batch).__name__}.")
    return batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m rnnkeys`` with these arguments; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rnnkeys", description="Recurrent policies for TorchRL."
    )
    add_parser(parser.add_subparsers(required=True, metavar="COMMAND"))
    options = parser.parse_args(arguments)
    return options.run(options)
