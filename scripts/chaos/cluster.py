"""A Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .program import Program


def lose_node(program: Program) -> str:
    """Kill a node on which an actor runs; the run must finish with the actors of the other one."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--actors", "ray", "--num-actors", "2", "--ray-address", address)
    # Enough rounds that the run notices the loss before it ends.
    program.options = ("--frames", "1024", *options)
    head = ("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false")
    with _run_node(program, *head), _run_node(program, f"--address={address}") as other:
        process = program.start()
        program.wait_for_checkpoint(process)
        os.killpg(other.pid, signal.SIGKILL)
        problem = program.check_end(process)
    if not problem and "is lost" not in program.log.read_text():
        return "no warning of the lost actor"
    return problem


@contextmanager
def _run_node(program: Program, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node with one CPU in a process group of its own."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    node = subprocess.Popen(
        [*command, f"--temp-dir={program.folder}", "--node-ip-address=127.0.0.1", *options],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield node
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
