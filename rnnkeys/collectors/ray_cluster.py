"""The connection to a Ray cluster, and a cluster of this machine alone."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER_PREFIX = "rnnkeys-ray-"
_LOCK = "lock"
_SECONDS_TO_LOCK = 60.0


def import_ray() -> Any:
    """Import Ray.

    Raises:
        ModuleNotFoundError: if it is not installed; the message names the extra.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "RayActors needs Ray, which is not installed: pip install 'rnnkeys[ray]'. "
            "ProcessActors needs no other package."
        ) from error
    return ray


def connect(
    address: str | None, num_cpus: float, object_store_memory: int, runtime_env: Mapping[str, Any]
) -> Callable[[], None]:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: of a running cluster; None for that of ``RAY_ADDRESS``, else a new one.
        num_cpus: of a new cluster.
        object_store_memory: of a new cluster, in bytes.
        runtime_env: of the actors; the package travels with them.

    Returns:
        A function that leaves the cluster, and stops it if it was started here.

    Raises:
        ConnectionError: if the cluster cannot be joined.
    """
    ray = import_ray()
    if ray.is_initialized():
        return lambda: None
    package = str(Path(__file__).parents[1])
    modules = [*runtime_env.get("py_modules", ()), package]
    options = {
        "runtime_env": {**runtime_env, "py_modules": modules},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        return _start_cluster(ray, num_cpus, object_store_memory, options)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. address, or the environment variable RAY_ADDRESS, must be that of a running "
            "cluster, such as 10.0.0.1:6379; without one, a cluster is started here. Clusters that "
            "ask for a token, as Ray's do by default, need RAY_AUTH_MODE=token and the token on "
            "this machine, too."
        ) from error
    return ray.shutdown


def _start_cluster(
    ray: Any, num_cpus: float, object_store_memory: int, options: Mapping[str, Any]
) -> Callable[[], None]:
    """Start a cluster of one node that only this machine can reach, and no file outlives."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without a token in the environment, Ray writes one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    folder, remove = _make_folder()
    try:
        with _on_loopback(ray):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=object_store_memory,
                _temp_dir=str(folder),
                **options,
            )
    except BaseException:
        ray.shutdown()
        remove()
        raise

    def stop() -> None:
        ray.shutdown()
        remove()

    return stop


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Let Ray's servers listen on the loopback interface, as they do on macOS by default.

    Ray has no option for it: it replaces 127.0.0.1 by the address of this machine unless this
    constant, which it reads from an environment variable at import, is False (Ray 2.50 to 2.60).
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _make_folder() -> tuple[Path, Callable[[], None]]:
    """Make a temporary folder, and remove those that killed programs have left.

    A program holds a lock on a file in its folder; the lock ends with the program.

    Returns:
        The folder, and a function that removes it.
    """
    # Paths of Ray's sockets may have some hundred characters; macOS' temporary folder has fifty.
    default = "/tmp" if os.name == "posix" else tempfile.gettempdir()
    base = os.environ.get("RAY_TMPDIR", default)
    for abandoned in filter(_is_abandoned, Path(base).glob(f"{FOLDER_PREFIX}*")):
        shutil.rmtree(abandoned, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    lock = (folder / _LOCK).open("w")
    if fcntl is not None:
        fcntl.flock(lock, fcntl.LOCK_EX)

    def remove() -> None:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)

    return folder, remove


def _is_abandoned(folder: Path) -> bool:
    """Return whether the program that made a folder is gone."""
    if fcntl is None:
        return False
    try:
        if time.time() - folder.stat().st_mtime < _SECONDS_TO_LOCK:
            return False
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return folder.is_dir()
    except OSError:
        return False
    return True
