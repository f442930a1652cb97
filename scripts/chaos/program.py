"""A tutorial that runs in processes of its own, with what it may leave behind."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parents[2] / "tutorials"
SECONDS = 900.0
"""Of a run, at most."""

_FORK = multiprocessing.get_context("fork")
_MARK = "RNNKEYS_CHAOS"
_MODULES: dict[str, ModuleType] = {}

_SMALL = ("--num-envs", "2", "--hidden-size", "8")
_FRAMES = ("--frames", "128", "--eval-every", "64")
_SLICES = ("--slices", "2", "--slice-len", "8")
_REPLAY = (*_SMALL, *_FRAMES, "--warmup", "32", "--updates", "1", "--batch-frames", "32")
_ONE = ("--eval-episodes", "1")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "recurrent_dqn": (*_REPLAY, *_ONE, *_SLICES),
    "r2d2": (
        *(*_REPLAY, *_ONE, "--windows", "2"),
        *("--window-len", "8", "--period", "4", "--burn-in", "2"),
    ),
    "recurrent_ppo": (
        *(*_SMALL, *_FRAMES, *_ONE, "--steps", "16", "--seq-len", "8"),
        *("--minibatch-steps", "16", "--epochs", "1", "--net-arch", "8"),
    ),
    "recurrent_sac": (*_REPLAY, *_ONE, *_SLICES, "--burn-in", "2", "--net-arch", "8"),
    "recurrent_reinforce": (*_SMALL, "--num-layers", "1", "--episodes", "8"),
    "recurrent_qmix": (*_REPLAY, *_ONE, *_SLICES),
    "recurrent_mappo": (*_SMALL, *_FRAMES, "--steps", "16", "--sequences", "1", "--epochs", "1"),
}
"""Arguments of a run of about a second."""

NEEDS = {"recurrent_mappo": "vmas"}
"""Packages of tutorials that the tests' environment lacks."""


def load_tutorial(name: str) -> ModuleType:
    """Import a tutorial, once, so that forks of this process need not."""
    if name not in _MODULES:
        spec = spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        _MODULES[name] = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(_MODULES[name])
    return _MODULES[name]


class Program:
    """A tutorial in a folder of its own.

    Args:
        name: of the tutorial.
        folder: gets ``out``, ``tmp``, ``log`` and the folders of Ray.
        is_script: whether a new interpreter runs the file. Otherwise a fork of this process calls
            its ``main``, which saves seconds of imports.

    Attributes:
        options: further arguments of each run.
    """

    def __init__(self, name: str, folder: Path, is_script: bool = False) -> None:
        self.name = name
        self.folder = folder
        self.is_script = is_script
        self.options: tuple[str, ...] = ()
        self.out = folder / "out"
        self.checkpoint = self.out / "checkpoint.pt"
        self.tmp = folder / "tmp"
        self.log = folder / "log"
        self.tmp.mkdir(parents=True)
        self._sessions: set[int] = set()

    def start(self, *argv: str, before: Callable[[], None] | None = None) -> Any:
        """Start the tutorial, after ``before`` in its process, and return that process."""
        arguments = [*ARGUMENTS[self.name], *self.options, *argv, "--output", str(self.out)]
        process: Any = _FORK.Process(target=self._run, args=(arguments, before))
        process.start()
        self._sessions.add(process.pid)
        return process

    def _run(self, argv: list[str], before: Callable[[], None] | None) -> None:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT
            signal.signal(number, signal.SIG_DFL)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        os.environ["RAY_TMPDIR"] = str(self.folder)  # paths of sockets have to be short
        os.environ[_MARK] = str(self.folder)
        if before is not None:
            before()
        if self.is_script:
            script = str(FOLDER / f"{self.name}.py")
            os.execv(sys.executable, [sys.executable, script, *argv])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            load_tutorial(self.name).main(argv)
        except KeyboardInterrupt:  # ends an interpreter by the signal, but this process with 1
            traceback.print_exc()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    def restart(self, **options: Any) -> Any:
        """Continue the run from its checkpoint, or start it again where there is none."""
        argv = ("--resume", str(self.checkpoint)) if self.checkpoint.exists() else ("--overwrite",)
        return self.start(*argv, **options)

    def load(self) -> dict[str, Any]:
        """Return the content of the checkpoint."""
        return torch.load(self.checkpoint, weights_only=True)

    def wait_for_checkpoint(self, process: Any) -> None:
        """Wait until the run has written a checkpoint, or has ended."""
        deadline = time.monotonic() + SECONDS
        while process.is_alive() and not self.checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    def check_end(self, process: Any, fails: bool = False) -> str:
        """Wait for the end of a process, which may have to fail; returns what is wrong with it."""
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            return "hangs"
        text = self.log.read_text()
        if process.exitcode not in ((1, 2) if fails else (0,)):
            return f"exit status {process.exitcode}: {_last_line(text)}"
        if "Traceback" in text:
            return f"traceback: {_last_line(text)}"
        return "no message" if fails and "error: " not in text else ""

    def check_left(self) -> str:
        """Return the temporary files that runs have left, or the processes, after some time."""
        left = [*self.tmp.iterdir(), *self.folder.glob("rnnkeys-ray-*")]
        if left:
            return f"temporary files are left: {sorted(path.name for path in left)}"
        return self.check_processes()

    def check_processes(self) -> str:
        """Return which processes of the runs are alive, some time after they ended."""
        deadline = time.monotonic() + 240
        while (alive := list(self._list_processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return f"processes are left: {alive}" if alive else ""

    def check_next_run(self) -> str:
        """Start the run again, undisturbed; returns what is lost or left."""
        before = _list_progress(self.load()) if self.checkpoint.exists() else []
        problem = self.check_end(self.restart())
        if problem:
            return f"the next run: {problem}"
        if self._read_curve()[: len(before)] != before:
            return f"of the rows {before} the next run has {self._read_curve()}"
        if not json.loads((self.out / "result.json").read_text())["test_returns"]:
            return "the next run has no result"
        return self.check_left()

    def _read_curve(self) -> list[float]:
        with (self.out / "learning_curve.csv").open(newline="") as file:
            return [float(row.get("frames", row.get("return"))) for row in csv.DictReader(file)]

    def _list_processes(self) -> Iterator[int]:
        mark = f"{_MARK}={self.folder}\0".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                state, *rest = (path / "stat").read_text().rpartition(")")[2].split()
                is_own = int(rest[2]) in self._sessions or mark in (path / "environ").read_bytes()
                if is_own and state != "Z":
                    yield int(path.name)

    def find_actor(self, process: Any) -> int:
        """Wait for a process that runs an actor or an environment, and return its id."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for pid in sorted(self._list_processes(), reverse=True):
                with suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if pid != process.pid and (b"spawn_main" in command or b"Worker" in command):
                        return pid
            time.sleep(0.05)
        raise TimeoutError("no actor has started")


def _list_progress(checkpoint: dict[str, Any]) -> list[float]:
    """Return the frames of all rows, or the returns of a run that counts episodes."""
    if "rows" in checkpoint:
        return [row["frames"] for row in checkpoint["rows"]]
    return checkpoint["returns"]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1][-200:]
