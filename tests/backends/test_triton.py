"""The Triton backend where there is no GPU: its kernels compiled, its errors, its benchmark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu, gpu_bounds, gpu_contestants, gpu_report
from benchmarks.cases import Case, Shape
from benchmarks.contestants import NATIVE, TORCHRL_PAD, TORCHRL_SCAN, TORCHRL_TRITON, TRITON
from benchmarks.gpu_contestants import ALL
from benchmarks.time_limits import TimeLimits
from rnnkeys.backends import triton, why_not
from rnnkeys.backends.triton.config import FUSED_MULTIPLY_ADD, MAX_HIDDEN, Device, choose_config
from rnnkeys.cells import GRU_CELL, LSTM_CELL, Weights
from scripts import triton_resources
from tests.support import recurrent

PROJECT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize(
    ("case", "instruction"),
    [
        (("lstm", "forward", 64, 16, "ieee"), "fma.rn"),
        (("lstm", "forward", 512, 16, "tf32"), "mma.sync.aligned.m16n8k8.row.col.f32.tf32"),
        (("lstm", "backward", 256, 16, "tf32"), "mma.sync.aligned.m16n8k8.row.col.f32.tf32"),
        (("gru", "forward", 128, 16, "bfloat16"), "mma.sync.aligned.m16n8k16.row.col.f32.bf16"),
        (("gru", "backward", 64, 16, "tf32x3"), "mma.sync.aligned.m16n8k8.row.col.f32.tf32"),
    ],
)
def test_kernels_compile_for_hopper_and_fit_it(case, instruction):
    """Without spills and within shared memory, products by the unit that the mode names."""
    case = triton_resources.Case(*case)
    taken = triton_resources.compile_case(case)
    assert case.config.resident
    assert taken.fits, f"stack {taken.stack}, shared memory {taken.shared}"
    assert instruction in taken.ptx
    assert ("mma" in taken.ptx) == (case.mode != "ieee")
    meets = case.config.split > 1
    # From Triton 3.9 on an addition whose result is not read is a reduction.
    adds = re.search(r"(atom|red)\.global\.gpu\.release\.add", taken.ptx)
    assert (adds is not None) == meets
    assert ("ld.global.gpu.acquire" in taken.ptx) == meets


@needs_triton
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_linear_kernels_compile_for_hopper(direction, constant):
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rnnkeys.backends.triton import linear

    kernel = getattr(linear, direction)
    constants = {"CONSTANT": constant, "PAIRED": True, "LOCAL": False, "BLOCK": 128}
    if direction == "backward":
        constants["WANT_START"] = True
    scalars = dict.fromkeys(["T", "N", "F", "length", "stride_t", "stride_n", "stride_f"], "i32")
    special = scalars | {"reset": "*i1", "cuts": "*i1"} | dict.fromkeys(constants, "constexpr")
    signature = {name: special.get(name, "*fp32") for name in kernel.arg_names}
    compiled = compiler.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options=FUSED_MULTIPLY_ADD,
    )
    assert "fma.rn" in compiled.asm["ptx"]


@needs_triton
@pytest.mark.parametrize(("mode", "rounds"), [("tf32", False), ("tf32x3", True)])
def test_operands_are_rounded_as_the_emulation_does(mode, rounds):
    """Otherwise the emulation in ``tests/support`` shows tolerances of something else."""
    for direction in ("forward", "backward"):
        case = triton_resources.Case("gru", direction, 64, 16, mode)
        assert ("cvt.rna.tf32" in triton_resources.compile_case(case).ptx) == rounds


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        ("lstm", "forward", 256, 1024, "tf32", "8.9"),
        ("lstm", "forward", 256, 1, "bfloat16", "8.9"),
        ("lstm", "backward", 512, 1024, "tf32", "8.0"),
        ("gru", "backward", 16, 16, "ieee", "8.0"),
        ("lstm", "backward", 32, 1024, "tf32x3", "8.9"),
    ],
)
def test_kernels_fit_smaller_gpus(case):
    taken = triton_resources.compile_case(triton_resources.Case(*case))
    assert taken.fits, f"stack {taken.stack}, shared memory {taken.shared} of {taken.room}"


@needs_triton
def test_kernel_program_arrives_after_its_writes_and_reads_after_all_arrivals():
    case = triton_resources.Case("lstm", "forward", 256, 16, "tf32")
    loop = triton_resources.compile_case(case).ptx
    release, acquire = loop.index("gpu.release"), loop.index("gpu.acquire")
    h_stored = loop.rindex("st.global", 0, release)
    assert "bar.sync" in loop[h_stored:release]
    after = loop[acquire:]
    assert after.index("bar.sync") < after.index("ld.global")


def test_launch_follows_from_the_problem_alone():
    def launch(hidden: int, batch: int = 16, itemsize: int = 4, mode: str = "tf32", **gpu: int):
        return choose_config("forward", batch, 64, hidden, itemsize, mode, Device(**gpu))

    assert launch(64).split == 1 and launch(512).split == 32
    assert launch(500).split * launch(500).block_n >= 500
    assert not launch(4096).resident and not launch(512, batch=4096).resident
    # Where programs cannot all run at once none may wait for another.
    assert not launch(512, processors=16).resident and launch(64, processors=1).resident
    small = launch(512, shared_memory=101376)
    assert not small.resident or small.block_n < launch(512).block_n
    for hidden in (1, 17, 64, 65, 128, 300, 512, 1000, 2048):
        for direction in ("forward", "backward"):
            for mode, itemsize in (("ieee", 4), ("tf32", 4), ("tf32x3", 4), ("ieee", 2)):
                for batch in (1, 16, 100, 3000):
                    config = choose_config(direction, batch, 64, hidden, itemsize, mode)
                    lanes = config.lanes(Device())
                    assert lanes >= 1
                    assert config.split == 1 or lanes * config.split <= 132
                    assert not config.resident or config.split * config.block_n >= hidden
                    assert not config.resident or config.block_k >= hidden


def _weights(hidden: int = 4, dtype: torch.dtype = torch.float32, **others: Any) -> Weights:
    matrix = torch.empty(1, hidden, dtype=dtype, device="meta")
    return Weights(matrix, matrix, **others)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_triton_without_gpu_raises_with_the_remedy(kind, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError) as error:
        recurrent.make(kind, recurrent_backend="triton")
    message = str(error.value)
    if find_spec("triton"):
        assert "recurrent_backend='triton' needs a CUDA device, and there is none" in message
    assert "Use recurrent_backend='pad' or 'auto'" in message


def test_triton_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    reason = triton.why_not(GRU_CELL, _weights())
    assert reason and "pip install 'rnnkeys[triton]'" in reason


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (_weights(dtype=torch.float64), "float32, bfloat16 or float16, got float64"),
        (_weights(MAX_HIDDEN + 1), f"hidden_size up to {MAX_HIDDEN}, got {MAX_HIDDEN + 1}"),
        (_weights(w_hr=torch.empty(3, 4)), "has no projection, got proj_size=3"),
    ],
)
def test_triton_unsupported_argument_raises_by_name(weights, message):
    error = why_not("triton", LSTM_CELL, weights)
    assert isinstance(error, RuntimeError)
    assert message in str(error) and "recurrent_backend='pad' or 'auto'" in str(error)


def test_triton_constructor_names_a_dtype_that_is_not_computed_in(monkeypatch):
    monkeypatch.setattr(triton, "why_not_machine", lambda device: None)
    with pytest.raises(RuntimeError, match="got recurrent_compute_dtype=float64"):
        recurrent.make("gru", recurrent_backend="triton", recurrent_compute_dtype=torch.float64)


def test_triton_on_an_old_gpu_names_its_capability(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    reason = triton.why_not(GRU_CELL, _weights(), torch.device("cuda"))
    assert reason and "capability 8.0 or higher, got 7.5" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert triton.why_not(GRU_CELL, _weights(), torch.device("cuda")) is None


def test_triton_on_amd_gpu_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = triton.why_not(GRU_CELL, _weights(), torch.device("cuda"))
    assert reason and "needs an NVIDIA GPU" in reason and "recurrent_backend='pad'" in reason


def test_triton_with_cpu_data_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "why_not_machine", lambda device: None)
    module = recurrent.make("gru", recurrent_backend="triton")
    with pytest.raises(RuntimeError, match=r"runs on CUDA tensors, got x on 'cpu'"):
        recurrent.recurrently(module, recurrent.batch(module))


@needs_triton
@pytest.mark.slow
def test_benchmark_runs_dry_with_all_contestants(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_gpu", "--dry-run"]
    arguments = ["--modes", "ieee", "--budget", "0", "--output", str(tmp_path)]
    done = subprocess.run(command + arguments, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["seconds"].keys() == set(ALL) - {TORCHRL_TRITON}
        assert row["skipped"] == {TORCHRL_TRITON: "needs a GPU"}
    text = (tmp_path / "gpu.md").read_text()
    assert "No figure here means anything" in text
    assert text.count("| open |") == 3


CASE = Case("LSTM", Shape(4, 8, 16, 32), 0.1)


class Failing:
    """One fails as Triton does, with no error that is a RuntimeError; one computes nonsense."""

    wrong = NATIVE

    def __init__(self, name: str, case: Case, batch: Any, mode: str) -> None:
        self.name, self.forward = name, self.both

    def both(self) -> tuple[torch.Tensor, ...]:
        if self.name == TORCHRL_TRITON:
            raise OSError("out of resource: shared memory\nand more")
        return (torch.ones(1) * (1 + (self.name == self.wrong)),)


def test_benchmark_skips_contestants_that_fail_or_are_slow(monkeypatch):
    monkeypatch.setattr(gpu_contestants, "make_contestant", Failing)
    monkeypatch.setattr(gpu_contestants, "NEEDS_GPU", ())
    out = bench_gpu.check("cpu", "ieee")
    assert out[TORCHRL_TRITON] == "out of resource: shared memory"
    assert out[NATIVE].startswith(f"{NATIVE!r} differs from")
    limits = TimeLimits(call_seconds=1.0)
    limits.record(TORCHRL_SCAN, CASE, 3.0)
    for row in bench_gpu.measure(CASE, "ieee", "cpu", 0.0, limits, {NATIVE: "differs"}):
        assert row.skipped == {
            TORCHRL_TRITON: "out of resource: shared memory",
            TORCHRL_SCAN: "took 3.0 s on LSTM (4, 8, 16, 32)",
            NATIVE: "differs",
        }
        assert row.seconds.keys() == set(ALL) - row.skipped.keys()


def test_benchmark_with_a_wrong_result_of_ours_stops(monkeypatch):
    monkeypatch.setattr(gpu_contestants, "make_contestant", Failing)
    monkeypatch.setattr(Failing, "wrong", TRITON)
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_gpu.check("cpu", "ieee")


def test_benchmark_that_is_quick_ends_in_time_and_sees_all_sizes():
    quick = bench_gpu.parse(["--quick"])
    cases = [case for case, _ in bench_gpu.grid(quick)]
    assert 50 < len(cases) < 80 and quick.minutes == 7.0 and quick.call_seconds == 2.0
    seen = [{case.shape[i] for case in cases} for i in (0, 1, 3)]
    every = (bench_gpu.BATCHES, bench_gpu.STEPS, bench_gpu.HIDDEN)
    assert all(found == set(all_sizes) for found, all_sizes in zip(seen, every, strict=True))
    now = [0.0]
    limits = TimeLimits(1.0, run_minutes=8.0, clock=lambda: now[0])
    assert not limits.is_over
    now[0] = 481.0
    assert limits.is_over and not TimeLimits(1.0).is_over


def test_benchmark_goals_follow_from_the_figures():
    fast = {TRITON: 1.0, TORCHRL_TRITON: 2.0, TORCHRL_PAD: 1.1, TORCHRL_SCAN: 9.0, NATIVE: 0.9}
    row = gpu_report.Row(CASE, "both", "ieee", fast)
    assert [reached for *_, reached in gpu_report.goals([row])] == [True, True, True]
    slow = gpu_report.Row(CASE, "both", "ieee", fast | {TRITON: 1.2, TORCHRL_TRITON: 1.5})
    assert [reached for *_, reached in gpu_report.goals([slow])] == [False, False, False]
    assert [reached for *_, reached in gpu_report.goals([])] == [None, None, None]


def test_bounds_are_the_larger_of_traffic_and_products():
    flops = 2 * 4 * 8 * (16 + 32) * 4 * 32
    forward = 4 * (4 * 8 * (16 + 2 * 32) + 4 * 32 * (16 + 32 + 2)) + 4 * 8
    assert gpu_bounds.least_bytes(CASE, "forward") == forward
    by_traffic = gpu_bounds.Rates(1.0, dict.fromkeys(("tf32", "tf32x3"), 1e30))
    assert gpu_bounds.least_seconds(CASE, "forward", "tf32", by_traffic) == forward
    by_products = gpu_bounds.Rates(1e30, dict.fromkeys(("tf32", "tf32x3"), 1.0))
    assert gpu_bounds.least_seconds(CASE, "forward", "tf32", by_products) == flops
    assert gpu_bounds.least_seconds(CASE, "both", "tf32x3", by_products) == 9 * flops
