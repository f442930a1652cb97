from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rnnkeys.collectors import RayActors, ray_cluster
from tests.support.actors import (
    PATIENCE,
    collect_with_two_actors,
    is_running,
    make_policy,
    start_learner,
    wait_until,
)

pytest.importorskip("ray")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a cluster of one test alone may write."""
    # Not tmp_path: paths of sockets in it may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        # By default workers run at niceness 15, and hardly at all on a machine with other work.
        monkeypatch.setenv("RAY_worker_niceness", "0")
        # Ray ends workers that take a minute to start, and starts others, which take as long.
        monkeypatch.setenv("RAY_worker_register_timeout_seconds", str(int(PATIENCE)))
        yield Path(folder)


def find_ray_processes() -> set[int]:
    """Return Ray's processes below this one, and not those of other programs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)] = int(stat[1])
    below = {os.getpid()}
    for _ in range(3):  # raylet, its agents and workers
        below |= {process for process, parent in parents.items() if parent in below}
    return set(filter(is_of_ray, below - {os.getpid()}))


def is_of_ray(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False
    return "ray" in command.partition("\0")[0] or "gcs_server" in command


def listening_addresses(processes: set[int]) -> set[str]:
    """Return the addresses on which processes listen."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(os.readlink(link))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local.partition(":")[0])
    return addresses


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


@linux
@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
def test_ray_actors_collect_survive_a_kill_and_leave_nothing(folder: Path) -> None:
    processes, addresses = set(), set()

    def make(*args: Any, **kwargs: Any) -> RayActors:
        actors = RayActors(*args, **kwargs)
        processes.update(find_ray_processes())
        addresses.update(listening_addresses(processes))
        return actors

    processes.update(collect_with_two_actors(make))
    assert addresses and addresses <= LOOPBACK
    wait_until(lambda: not any(map(is_running, processes)))
    assert not list(folder.iterdir())


@linux
def test_ray_actors_of_a_killed_learner_end_and_their_folder_is_removed_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, processes = start_learner("RayActors", "time.sleep(600)")
    [left] = folder.iterdir()
    monkeypatch.setattr(ray_cluster, "_SECONDS_TO_LOCK", 0.0)
    _, remove = ray_cluster._make_folder()
    remove()
    assert left.exists()  # its program runs
    learner.send_signal(signal.SIGKILL)
    learner.communicate(timeout=60)
    wait_until(lambda: not any(map(is_running, processes)))
    monkeypatch.setattr(ray_cluster, "_SECONDS_TO_LOCK", 3600.0)
    ray_cluster._make_folder()[1]()
    assert left.exists()  # it may be about to be locked
    monkeypatch.setattr(ray_cluster, "_SECONDS_TO_LOCK", 0.0)
    ray_cluster._make_folder()[1]()
    assert not list(folder.iterdir())


def test_ray_actors_without_ray_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rnnkeys\[ray\]'"):
        RayActors(lambda: None, make_policy(), num_actors=2, frames_per_batch=8)  # pyright: ignore[reportArgumentType]


def test_ray_actors_that_cannot_join_a_cluster_name_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(address: str, **options: Any) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, remote=lambda **_: lambda c: c)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    make = partial(RayActors, lambda: None, make_policy(), num_actors=2, frames_per_batch=8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConnectionError, match="at 10.0.0.1:6379. .*RAY_AUTH_MODE=token"):
        make()
    with pytest.raises(ConnectionError, match="at 10.0.0.2:1. .*RAY_ADDRESS, must be that"):
        make(address="10.0.0.2:1")


def test_ray_actors_leave_a_connection_of_the_program_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        init=lambda **_: calls.append("init"),
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    ray_cluster.connect(None, 1, 0, {})()
    assert not calls


def test_ray_actors_lost_with_their_cluster_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise RayError("the cluster is gone")

    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError), kill=fail)
    handle = SimpleNamespace(collect=SimpleNamespace(remote=fail))
    worker = sys.modules["rnnkeys.collectors.ray_actors"]._RayWorker(ray, handle)
    assert isinstance(worker.collect(None).exception(), RayError)
    worker.stop()


@pytest.mark.skipif(ray_cluster.fcntl is None, reason="needs file locks")
def test_start_of_a_cluster_that_fails_leaves_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        assert Path(options["_temp_dir"]).is_dir() and not constants.ENABLE_RAY_CLUSTER
        raise OSError("no space left")

    constants = SimpleNamespace(ENABLE_RAY_CLUSTER=True)
    ray: Any = SimpleNamespace(
        is_initialized=lambda: False,
        init=init,
        shutdown=lambda: None,
        _private=SimpleNamespace(ray_constants=constants),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(OSError, match="no space left"):
        ray_cluster.connect(None, 1, 0, {})
    assert not list(folder.iterdir()) and constants.ENABLE_RAY_CLUSTER
