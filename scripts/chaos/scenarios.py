"""Disturbances of a run, and what has to follow each of them."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from .cluster import lose_node
from .program import SECONDS, Program

Scenario = tuple[str, Callable[[Program], str]]
"""A name, and a function that disturbs a program and returns what is wrong afterwards."""

NOT_REACHED = "not reached"
"""Returned where the run ended before it could be disturbed."""


def kill_at_random(program: Program, seconds: float) -> str:
    """Kill -9 at a random moment."""
    process = program.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    return program.check_left() or program.check_next_run()


def kill_at_write(program: Program, number: int) -> str:
    """Kill -9 before the file operation of this number in the run's folder."""
    process = program.start(before=partial(_arm, str(program.out), number))
    process.join(SECONDS)
    if process.exitcode == 0:
        return NOT_REACHED
    return program.check_left() or program.check_next_run()


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
    process.join(SECONDS)
    if process.exitcode == 0:
        return NOT_REACHED
    return program.check_left() or program.check_next_run()


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
    process.join(SECONDS)
    if process.exitcode not in (0, -number):
        return f"exit status {process.exitcode}"
    return program.check_left() or program.check_next_run()


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
    process.join(SECONDS)


def resume_file(program: Program, write: Callable[[Path, dict[str, Any]], None]) -> str:
    """Resume from a file that is no checkpoint of this run, or one of another version."""
    _make_checkpoint(program)
    good = program.checkpoint.read_bytes()
    write(program.checkpoint, program.load())
    problem = program.check_end(program.restart(), fails=True)
    program.checkpoint.write_bytes(good)
    return problem or program.check_next_run()


def _truncate(path: Path, _: dict[str, Any]) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _write_text(path: Path, _: dict[str, Any]) -> None:
    path.write_text("# no checkpoint\n")


def _write_weights(path: Path, _: dict[str, Any]) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def _rename_argument(path: Path, content: dict[str, Any]) -> None:
    content["args"]["memoryless"] = content["args"].pop("threads")
    torch.save(content, path)


class _Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def resume_pickle(program: Program) -> str:
    """Resume from a checkpoint that would run code when it is unpickled."""
    folder = program.folder / "unpickled"

    def write(path: Path, content: dict[str, Any]) -> None:
        torch.save({**content, "code": _Attack(folder)}, path)

    problem = resume_file(program, write)
    return problem or ("the checkpoint ran code" if folder.exists() else "")


def resume_older(program: Program) -> str:
    """Resume from checkpoints that lack one entry each."""
    _make_checkpoint(program)
    good = program.checkpoint.read_bytes()
    whole = program.load()
    for name in whole:
        torch.save({key: whole[key] for key in whole if key != name}, program.checkpoint)
        problem = program.check_end(program.restart(), fails=True)
        if problem:
            return f"without {name!r}: {problem}"
    program.checkpoint.write_bytes(good)
    return program.check_next_run()


def kill_part(program: Program, *options: str) -> str:
    """Kill one of the processes that collect; the run must replace it and finish."""
    program.options = ("--frames", "384", *options)
    process = program.start()
    program.wait_for_checkpoint(process)
    os.kill(program.find_actor(process), signal.SIGKILL)
    problem = program.check_end(process) or program.check_left()
    if not problem and "is lost" not in program.log.read_text():
        return "no warning of the lost actor"
    return problem or program.check_next_run()


def kill_whole(program: Program, *options: str) -> str:
    """Kill the learner; the processes that collect for it must end, too."""
    program.options = options
    process = program.start()
    program.wait_for_checkpoint(process)
    process.kill()
    process.join()
    problem = program.check_processes()
    for left in program.folder.glob("rnnkeys-ray-*"):
        os.utime(left, (0, 0))  # the next start removes what is a minute old
    return problem or program.check_next_run()


ACTORS = ("--num-actors", "2", "--actors")


def list_actor_scenarios(name: str) -> Iterator[Scenario]:
    """Yield the disturbances of runs with several processes."""
    if name == "r2d2":
        for kind in ("process", "ray"):
            yield f"killed actor ({kind})", lambda one, kind=kind: kill_part(one, *ACTORS, kind)
            yield f"killed learner ({kind})", lambda one, kind=kind: kill_whole(one, *ACTORS, kind)
        yield "lost Ray node", lose_node
    if name == "recurrent_ppo":
        options = ("--vectorization", "async")
        yield "killed learner (environments)", lambda one: kill_whole(one, *options)


def list_scenarios(kills: int, writes: int, seconds: float) -> Iterator[Scenario]:
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
    yield "truncated checkpoint", partial(resume_file, write=_truncate)
    yield "text for a checkpoint", partial(resume_file, write=_write_text)
    yield "weights for a checkpoint", partial(resume_file, write=_write_weights)
    yield "renamed argument", partial(resume_file, write=_rename_argument)
    yield "checkpoint without an entry", resume_older
    yield "checkpoint with code", resume_pickle


def disturb(
    name: str, base: Path, scenarios: Iterator[Scenario], is_script: bool
) -> Iterator[tuple[str, str]]:
    """Run each scenario in a folder of its own; yields its name, and what is wrong.

    Numbers of a scenario come in order: after one that a run does not reach, it reaches none.
    """
    ended = set[str]()
    for number, (scenario, run) in enumerate(scenarios):
        if scenario in ended:
            continue
        folder = base / str(number)
        problem = run(Program(name, folder, is_script))
        if problem == NOT_REACHED:
            ended.add(scenario)
        else:
            yield scenario, problem
        if not problem or problem == NOT_REACHED:
            shutil.rmtree(folder, ignore_errors=True)
