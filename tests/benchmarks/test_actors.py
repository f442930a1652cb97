"""CPU times of actors: which processes count, and the table."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.actors import main, read_others

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CPU times are read from /proc")
SPIN = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"


def test_read_others_counts_the_time_of_a_child() -> None:
    before = read_others()
    child = subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        assert 0.4 < read_others() - before < 5
    finally:
        child.communicate(b"\n")


def test_main_of_local_actors_has_no_other_process(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--batches", "2", "--only", "none"])
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| none")]
    learner, others = row[0].strip("| ").split(" | ")[1:]
    assert float(learner) > 0 and others == "0"
