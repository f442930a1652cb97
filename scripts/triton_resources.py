"""Compile every form of the Triton kernels for a GPU and say what it takes; needs no GPU.

``python -m scripts.triton_resources`` prints a table for Hopper, ``... 8.9`` for another compute
capability: for each problem the launch that :mod:`rnnkeys.backends.triton.config` chooses, and
registers, spills and shared memory of the compiled kernel. A kernel that spills or does not fit is
marked, and the exit code says so.

This is what a compiler can know. How fast a kernel is, only a GPU can show.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rnnkeys.backends.triton.config import FUSED_MULTIPLY_ADD, Config, Device, choose_config

# By compute capability: an H100, an RTX 4090, an A100.
GPUS = {"9.0": Device(), "8.9": Device(128, 101376), "8.0": Device(108, 166912)}
SIZES = (16, 64, 128, 256, 512, 1024)
BATCHES = (1, 64, 1024)
STEPS = 128
# Operands of the products: in float32 the modes, else bfloat16.
MODES = ("ieee", "tf32", "tf32x3", "bfloat16")
# Bytes of local memory per thread that are no sign of spilled weights.
MOST_STACK = 64
_SCALARS = ("B", "N", "T", "H", "reset_b", "reset_t", "t")


class Case(NamedTuple):
    """A kernel for a problem."""

    cell: str
    direction: str
    hidden: int
    batch: int
    mode: str
    gpu: str = "9.0"

    @property
    def config(self) -> Config:
        """The launch that is chosen for it."""
        itemsize, precision = (2, "ieee") if self.mode == "bfloat16" else (4, self.mode)
        sizes = (self.batch, STEPS, self.hidden, itemsize)
        return choose_config(self.direction, *sizes, precision, GPUS[self.gpu])


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread; spills, mostly.
        shared: bytes of shared memory per program.
        ptx: its assembly.
        room: bytes of shared memory that the GPU has for a program.
    """

    registers: int
    stack: int
    shared: int
    ptx: str
    room: int

    @property
    def fits(self) -> bool:
        """Whether it can be launched on its GPU and keeps its values on the chip."""
        return self.stack <= MOST_STACK and self.shared <= self.room


def compile_case(case: Case) -> Resources:
    """Compile a kernel as a launch on the case's GPU would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = _kernel(case)
    operand = "*bf16" if case.mode == "bfloat16" else "*fp32"
    signature = {name: _type(name, operand, constants) for name in kernel.arg_names}
    aligned: Any = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name == "H" or (name not in constants and name not in _SCALARS)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", int(case.gpu.replace(".", "")), 32),
        options={"num_warps": case.config.num_warps, **FUSED_MULTIPLY_ADD},
    )
    registers, stack = _usage(compiled.asm["cubin"])
    room = GPUS[case.gpu].shared_memory
    return Resources(registers, stack, compiled.metadata.shared, compiled.asm["ptx"], room)


def _kernel(case: Case) -> tuple[Any, dict[str, Any]]:
    from rnnkeys.backends.triton import gru, lstm

    config = case.config
    name = case.direction + ("" if config.resident else "_step")
    constants: dict[str, Any] = {
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": "ieee" if case.mode == "bfloat16" else case.mode,
        # What takes most: everything that can be asked for.
        **{"KEEP": True, "HAS_DC": True, "WANT_RESET": True},
        **{"SPLIT": config.split, "CHUNKS": config.chunks, "STAGES": config.stages},
    }
    kernel = getattr({"lstm": lstm, "gru": gru}[case.cell], name)
    return kernel, {k: v for k, v in constants.items() if k in kernel.arg_names}


def _type(name: str, operand: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _SCALARS:
        return "i32"
    special = {"is_init": "*i1", "order": "*i32", "tickets": "*i32"}
    operands = dict.fromkeys(("gates", "act", "w_hh", "d_gates"), operand)
    return (special | operands).get(name, "*fp32")


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack, as the tool that comes with Triton reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources:\n{report}")
    return int(found[1]), int(found[2])


def cases(gpu: str) -> Iterator[Case]:
    """All problems whose launches differ, those of one launch once."""
    seen = set()
    for mode in MODES:
        for hidden in SIZES:
            for batch in BATCHES:
                for cell in ("lstm", "gru"):
                    for direction in ("forward", "backward"):
                        case = Case(cell, direction, hidden, batch, mode, gpu)
                        key = (cell, direction, mode, case.config)
                        if key not in seen:
                            seen.add(key)
                            yield case


def main(gpu: str = "9.0") -> int:
    """Print a table of all kernels for a GPU of ``GPUS``."""
    if gpu not in GPUS:
        sys.exit(f"compute capability {gpu!r}: expected one of {', '.join(GPUS)}.")
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled. Unset it.")
    print("| cell | direction | H | B | mode | launch | registers | stack | shared memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for case in cases(gpu):
        c = case.config
        form = f"split {c.split}" if c.resident else "stepwise"
        tiles = f"{form}, {c.block_b}x{c.block_n}, {c.num_warps} warps, {c.chunks} chunks"
        taken = compile_case(case)
        failed += not taken.fits
        mark = "" if taken.fits else " **does not fit**"
        print(
            f"| {case.cell} | {case.direction} | {case.hidden} | {case.batch} | {case.mode} "
            f"| {tiles} | {taken.registers} | {taken.stack} | {taken.shared}{mark} |",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
