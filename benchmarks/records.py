"""The records of a benchmark, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case, Shape
from .memory import MemoryRecord
from .sequences import Record
from .steps import StepRecord
from .timing import Timing


@dataclass
class Results:
    """The records of a run. Lists of parts that did not run are empty.

    Attributes:
        machine: facts about the machine, by name.
        sequences: times of the grid, forward and backward, partly forward only.
        growth: times of rows of growing length at a constant amount of data.
        steps: times of modules, policies and collectors in single-step mode.
        memory: peak memory of the grid.
        memory_growth: peak memory of rows of growing length.
    """

    machine: dict[str, str]
    sequences: list[Record] = field(default_factory=list)
    growth: list[Record] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    memory: list[MemoryRecord] = field(default_factory=list)
    memory_growth: list[MemoryRecord] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that ``save`` wrote."""
        data = json.loads(path.read_text())
        revive: dict[str, Callable[[dict[str, Any]], Any]] = {
            "sequences": _record,
            "growth": _record,
            "steps": _step_record,
            "memory": _memory_record,
            "memory_growth": _memory_record,
        }
        lists = {name: [make(entry) for entry in data[name]] for name, make in revive.items()}
        return cls(data["machine"], **lists)


def _rounded(value: Any) -> Any:
    """Round floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def _case(data: dict[str, Any]) -> Case:
    return Case(data["cell"], Shape(*data["shape"]), data["resets"])


def _timings(data: dict[str, list[Any]]) -> dict[str, Timing]:
    return {name: Timing(*values) for name, values in data.items()}


def _record(data: dict[str, Any]) -> Record:
    return Record(_case(data["case"]), data["phase"], _timings(data["timings"]))


def _step_record(data: dict[str, Any]) -> StepRecord:
    return StepRecord(data["kind"], data["cell"], data["batch"], _timings(data["timings"]))


def _memory_record(data: dict[str, Any]) -> MemoryRecord:
    return MemoryRecord(_case(data["case"]), data["peaks"])
