"""Kill, stop and starve runs of the tutorials, and see that they continue or end with one line.

    python -m scripts.chaos                               # all tutorials, 20 kills each
    python -m scripts.chaos --tutorials r2d2 --kills 5 --seed 1

Each run is forked from this process, which has imported what they need, into a session and a
temporary folder of its own. After every disturbance the run is started again: it must keep the rows
of its checkpoint, finish, and leave no process and no temporary file. The table goes to
``benchmarks/results/chaos.md``. It needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.md"
_FORK = multiprocessing.get_context("fork")
_SECONDS = 300.0  # of a run, at most
_SMALL = ("--num-envs", "2", "--hidden-size", "8", "--eval-episodes", "1")
_REPLAY = (*_SMALL, "--warmup", "32", "--updates", "1", "--frames", "128", "--eval-every", "64")
TUTORIALS: dict[str, tuple[str, ...]] = {
    "recurrent_dqn": (*_REPLAY, "--batch-frames", "32", "--slices", "2", "--slice-len", "8"),
    "r2d2": (
        *(*_REPLAY, "--batch-frames", "32", "--windows", "2", "--window-len", "8"),
        *("--period", "4", "--burn-in", "2"),
    ),
    "recurrent_ppo": (
        *(*_SMALL, "--frames", "128", "--eval-every", "64", "--steps", "16", "--seq-len", "8"),
        *("--minibatch-steps", "16", "--epochs", "1", "--net-arch", "8"),
    ),
    "recurrent_sac": (
        *(*_REPLAY, "--batch-frames", "32", "--slices", "2", "--slice-len", "8"),
        *("--burn-in", "2", "--net-arch", "8"),
    ),
}


class Outcome(NamedTuple):
    """What one disturbance led to; ``problem`` is empty where all is well."""

    tutorial: str
    scenario: str
    problem: str


class Program:
    """A tutorial that runs in a process of its own, in a folder of its own.

    Args:
        name: name of the tutorial.
        folder: gets ``out``, ``tmp`` and ``log``.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.out = folder / "out"
        self.checkpoint = self.out / "checkpoint.pt"
        self.tmp = folder / "tmp"
        self.log = folder / "log"
        self.tmp.mkdir(parents=True)
        self.sessions: list[int] = []

    def start(self, *argv: str, before: Callable[[], None] | None = None) -> Any:
        """Start the tutorial, after ``before`` in its process, and return that process."""
        words = [*TUTORIALS[self.name], *argv, "--output", str(self.out)]
        process: Any = _FORK.Process(target=self._main, args=(words, before))
        process.start()
        self.sessions.append(process.pid)
        return process

    def _main(self, argv: list[str], before: Callable[[], None] | None) -> None:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        if before is not None:
            before()
        _MODULES[self.name].main(argv)

    def restart(self, **options: Any) -> Any:
        """Continue the run from its checkpoint, or start it again where there is none."""
        words = ("--resume", str(self.checkpoint)) if self.checkpoint.exists() else ("--overwrite",)
        return self.start(*words, **options)

    def read_rows(self) -> list[dict[str, float]]:
        """Return the rows of the learning curve that the checkpoint contains."""
        return torch.load(self.checkpoint, weights_only=True)["rows"]

    def check_end(self, process: Any, fails: bool = False) -> str:
        """Wait for the end of a process, which may have to fail; returns what is wrong with it."""
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            return "hangs"
        text = self.log.read_text()
        if process.exitcode not in ((1, 2) if fails else (0,)):
            return f"exit status {process.exitcode}: {_last_line(text)}"
        if "Traceback" in text:
            return f"traceback: {_last_line(text)}"
        return "no message" if fails and "error: " not in text else ""

    def check_next_run(self) -> str:
        """Start the run again, undisturbed; returns what is lost or left."""
        rows = self.read_rows() if self.checkpoint.exists() else []
        problem = self.check_end(self.restart())
        if problem:
            return f"the next run: {problem}"
        with (self.out / "learning_curve.csv").open(newline="") as file:
            written = [float(row["frames"]) for row in csv.DictReader(file)]
        if written[: len(rows)] != [row["frames"] for row in rows]:
            return f"rows are lost: {len(rows)} before, then {written}"
        if not json.loads((self.out / "result.json").read_text())["test_returns"]:
            return "no result"
        left = sorted(path.name for path in self.tmp.iterdir())
        return f"left in the temporary folder: {left}" if left else self.check_processes()

    def check_processes(self) -> str:
        """Return which processes of the runs are alive, a while after they ended."""
        alive: list[int] = []
        for _ in range(100):
            alive = [pid for pid in self.sessions if _is_session_alive(pid)]
            if not alive:
                return ""
            time.sleep(0.2)
        return f"processes left of sessions {alive}"

    def wait_for_checkpoint(self, process: Any) -> None:
        """Wait until the run has written a checkpoint, or has ended."""
        deadline = time.monotonic() + _SECONDS
        while process.is_alive() and not self.checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.005)


_MODULES: dict[str, Any] = {}


def _load(name: str) -> Any:
    spec = spec_from_file_location(f"chaos_{name}", ROOT / "tutorials" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1][-200:]


def _is_session_alive(session: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, *rest = path.read_text().rpartition(")")[2].split()
            if int(rest[2]) == session and state != "Z":
                return True
    return False


def kill_at_random(program: Program, seconds: float) -> str:
    """Kill -9 at a random moment."""
    process = program.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    return program.check_next_run()


def kill_at_write(program: Program, number: int) -> str:
    """Kill -9 before the file operation of this number in the run's folder."""
    process = program.start(before=partial(_arm, str(program.out), number))
    process.join(_SECONDS)
    if process.exitcode == 0:
        raise StopIteration  # the run has fewer operations
    return program.check_next_run()


def _arm(folder: str, number: int) -> None:
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.rename", "os.remove"):
            return
        is_read = event == "open" and arguments[1] == "r"
        if not is_read and str(arguments[0]).startswith(folder):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_in_checkpoint(program: Program, number: int) -> str:
    """Kill -9 when half of the checkpoint of this number is written."""
    process = program.start(before=partial(_write_half, number))
    process.join(_SECONDS)
    if process.exitcode == 0:
        raise StopIteration
    return program.check_next_run()


def _write_half(number: int) -> None:
    save, left = torch.save, number

    def save_half(value: Any, path: Any) -> None:
        nonlocal left
        left -= 1
        if left:
            save(value, path)
            return
        buffer = BytesIO()
        save(value, buffer)
        Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def stop_by_signal(program: Program, number: signal.Signals, times: int) -> str:
    """Send a signal after the first checkpoint, once or twice."""
    process = program.start()
    program.wait_for_checkpoint(process)
    for _ in range(times):
        os.kill(process.pid, number)
        time.sleep(0.02)
    if times == 1:
        return program.check_end(process) or program.check_next_run()
    process.join(_SECONDS)
    if process.exitcode not in (0, -number):
        return f"exit status {process.exitcode}"
    return program.check_next_run()


def fill_disk(program: Program) -> str:
    """Continue a run whose files may have half the size of its checkpoint."""
    _make_checkpoint(program)
    size = program.checkpoint.stat().st_size // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return program.check_end(program.restart(before=limit), fails=True) or program.check_next_run()


def forbid_writing(program: Program) -> str:
    """Start a run in a folder that its user may only read."""
    program.out.mkdir(mode=0o555)
    program.tmp.chmod(0o777)
    program.folder.chmod(0o755)
    program.log.touch()
    program.log.chmod(0o666)
    drop = (lambda: os.setuid(65534)) if os.getuid() == 0 else None  # root may write anywhere
    problem = program.check_end(program.start(before=drop), fails=True)
    program.out.chmod(0o755)
    return problem or program.check_next_run()


def _make_checkpoint(program: Program) -> None:
    process = program.start()
    program.wait_for_checkpoint(process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(_SECONDS)


def break_checkpoint(program: Program, kind: str) -> str:
    """Resume from a checkpoint that is none, or of another version."""
    _make_checkpoint(program)
    good = program.checkpoint.read_bytes()
    content = torch.load(program.checkpoint, weights_only=True)
    if kind == "truncated":
        program.checkpoint.write_bytes(good[: len(good) // 2])
    elif kind == "foreign":
        program.checkpoint.write_text("# no checkpoint\n")
    elif kind == "pickle":
        torch.save({"args": content["args"], "code": os.getpid}, program.checkpoint)
    elif kind == "weights":
        torch.save(torch.nn.Linear(2, 2).state_dict(), program.checkpoint)
    elif kind == "older":
        del content["rows"]
        torch.save(content, program.checkpoint)
    else:
        content["args"]["memoryless"] = content["args"].pop("cell")
        torch.save(content, program.checkpoint)
    problem = program.check_end(program.restart(), fails=True)
    program.checkpoint.write_bytes(good)
    return problem or program.check_next_run()


def kill_actor(program: Program) -> str:
    """Kill one of two actors while they collect."""
    process = program.start("--actors", "process", "--num-actors", "2")
    program.wait_for_checkpoint(process)
    children = _find_children(process.pid)
    if children:
        os.kill(children[-1], signal.SIGKILL)
    return program.check_end(process) or program.check_processes()


def kill_learner(program: Program) -> str:
    """Kill the learner of two actors; they must end, too."""
    process = program.start("--actors", "process", "--num-actors", "2")
    program.wait_for_checkpoint(process)
    process.kill()
    process.join()
    return program.check_processes() or program.check_next_run()


def _find_children(pid: int) -> list[int]:
    """Return the processes below one that run an actor."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
            if int(fields[1]) == pid and b"resource_tracker" not in command:
                found.append(int(path.parent.name))
    return sorted(found)


Scenario = tuple[str, Callable[[Program], str]]


def list_scenarios(name: str, kills: int, writes: int, seconds: float) -> Iterator[Scenario]:
    """Yield the disturbances of a tutorial whose undisturbed run takes some seconds."""
    for _ in range(kills):
        yield "kill -9", partial(kill_at_random, seconds=random.uniform(0, seconds))
    for number in range(1, writes + 1):
        yield "kill -9 at a file operation", partial(kill_at_write, number=number)
    for number in range(1, 4):
        yield "kill -9 within a checkpoint", partial(kill_in_checkpoint, number=number)
    yield "SIGTERM", partial(stop_by_signal, number=signal.SIGTERM, times=1)
    yield "Ctrl-C", partial(stop_by_signal, number=signal.SIGINT, times=1)
    yield "Ctrl-C twice", partial(stop_by_signal, number=signal.SIGINT, times=2)
    yield "full disk", fill_disk
    yield "read-only folder", forbid_writing
    for kind in ("truncated", "foreign", "pickle", "weights", "older", "renamed argument"):
        yield f"checkpoint: {kind}", partial(break_checkpoint, kind=kind)
    if name == "r2d2":
        yield "killed actor", kill_actor
        yield "killed learner", kill_learner


def disturb(name: str, options: argparse.Namespace) -> Iterator[Outcome]:
    """Run all disturbances of one tutorial."""
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    base.chmod(0o755)
    start = time.perf_counter()
    problem = Program(name, base / "undisturbed").check_next_run()
    seconds = time.perf_counter() - start
    yield Outcome(name, "undisturbed", problem)
    scenarios = list_scenarios(name, options.kills, options.writes, seconds)
    for number, (scenario, run) in enumerate(scenarios):
        if options.only and not any(word in scenario for word in options.only):
            continue
        with suppress(StopIteration):
            yield Outcome(name, scenario, run(Program(name, base / str(number))))
    shutil.rmtree(base)


def write_table(outcomes: list[Outcome], path: Path) -> None:
    """Write the number of outcomes by scenario and tutorial, and each problem."""
    names = list(dict.fromkeys(one.tutorial for one in outcomes))
    lines = [
        "# Runs that were killed, stopped and starved",
        "",
        "Made by `python -m scripts.chaos` (`make chaos`). Runs of a few seconds are disturbed and "
        "started again. A number pair is *without a problem / all*: after a kill or a signal the "
        "next run keeps every row of the checkpoint, finishes, and leaves neither a process nor a "
        "temporary file; with a full disk, a read-only folder or a bad checkpoint the run ends "
        "with an exit status of 1 or 2 and one line, and the next run finishes. Every checkpoint "
        "was loaded with `weights_only=True`.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for scenario in dict.fromkeys(one.scenario for one in outcomes):
        cells = []
        for name in names:
            all_ = [o.problem for o in outcomes if (o.tutorial, o.scenario) == (name, scenario)]
            cells.append(f"{all_.count('')} / {len(all_)}" if all_ else "")
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    bad = [f"- {o.tutorial}, {o.scenario}: {o.problem}" for o in outcomes if o.problem]
    path.write_text("\n".join([*lines, "", *(["Problems:", "", *bad] if bad else [])]))


def main() -> None:
    """Run the campaign; the exit status is 1 if there was a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tutorials", nargs="+", choices=TUTORIALS, default=list(TUTORIALS))
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--writes", type=int, default=60, help="file operations, at most")
    parser.add_argument("--only", nargs="+", help="scenarios whose name contains a word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=RESULTS, help="file for the table")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    outcomes = []
    for name in options.tutorials:
        _MODULES[name] = _load(name)
        for outcome in disturb(name, options):
            outcomes.append(outcome)
            print(*outcome[:2], outcome.problem or "ok", sep="  ", flush=True)
            write_table(outcomes, options.report)
    sys.exit(any(one.problem for one in outcomes))


if __name__ == "__main__":
    main()
