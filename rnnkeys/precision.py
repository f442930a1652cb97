"""Precision of the recurrent matrix products on a GPU.

A recurrent layer in float32 multiplies matrices in two places: the recurrent product ``h W_hh^T``,
once per step inside the fused kernel, and the input projection and the weight gradients, once per
sequence in cuBLAS. One mode sets both, and a backward pass uses the mode of its forward pass.

=============== ================================================== ==========================
mode            recurrent product, in the kernel                   products in cuBLAS
=============== ================================================== ==========================
``"ieee"``      float32, no tensor cores                           float32
``"tf32"``      TF32 tensor cores, 10 bits of mantissa             TF32
``"tf32x3"``    three TF32 products, about 22 bits of mantissa     float32 (has no such mode)
``"fast"``      ``"tf32"`` where the GPU has it, else ``"ieee"``   as the mode it stands for
``"high-prec"`` ``"tf32x3"`` where the GPU has it, else ``"ieee"`` as the mode it stands for
``"auto"``      the first setting below that is not ``"auto"``     as the mode it stands for
=============== ================================================== ==========================

The first of these settings that is not ``"auto"`` applies:

1. the constructor's ``recurrent_matmul_precision=``;
2. :func:`set_recurrent_matmul_precision`, for the whole process;
3. the environment variable ``TORCHRL_RNN_PRECISION``, read on import and whenever the setter is
   cleared;
4. :func:`torch.get_float32_matmul_precision`: ``"highest"`` is ``"ieee"``, ``"high"`` is
   ``"high-prec"``, ``"medium"`` is ``"fast"``.

Settings 2 and 3 are shared with TorchRL: its setter also changes rnnkeys' modules, and this setter
also changes TorchRL's.

On a CPU the mode does not change results: every backend multiplies in the dtype of its operands,
and presets resolve to ``"ieee"``. A concrete mode is kept and takes effect when the module moves to
a GPU. (:func:`torch.set_float32_matmul_precision` sets how torch multiplies float32 on a CPU.) The
mode does not apply to float64, bfloat16 and float16, whose products are always summed in float32 or
wider.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, get_args

import torch

from ._compat import (
    PRECISION_OF_TORCH,
    get_precision_override,
    restore_precision_override,
    set_precision_override,
)
from ._compat import RecurrentMatmulPrecision as RecurrentMatmulPrecision
from ._compat import RecurrentMatmulPrecisionUserMode as RecurrentMatmulPrecisionUserMode

_USER: tuple[str, ...] = get_args(RecurrentMatmulPrecisionUserMode)
_ON_TENSOR_CORES = {"fast": "tf32", "high-prec": "tf32x3"}

# The cuBLAS flag is process-wide, so threads that set and restore it must take turns.
_CUBLAS_FLAG = threading.RLock()


class set_recurrent_matmul_precision:  # noqa: N801 -- called like a function, as torch.no_grad is
    """Set the precision of recurrent products, permanently or for a ``with`` block.

    A plain call sets the mode for the whole process, in all threads. As a context manager it
    restores the previous setting on exit, also after an exception; the same object can be entered
    again, also inside itself.

    Modules read the mode when a forward pass runs, so a change takes effect at once. A backward
    pass uses the mode of its forward pass, even if the setting has changed since.

    Args:
        mode: ``"ieee"``, ``"tf32"``, ``"tf32x3"``, ``"fast"`` or ``"high-prec"``; ``"auto"`` or
            None clears the setting, so that the environment variable and torch decide. The table
            at the top of :mod:`rnnkeys.precision` defines them.

    Raises:
        ValueError: if ``mode`` is none of these.

    Examples:
        >>> with set_recurrent_matmul_precision("tf32x3"):
        ...     get_recurrent_matmul_precision()
        'tf32x3'
    """

    def __init__(self, mode: str | None) -> None:
        if mode is not None:
            validate_recurrent_matmul_precision(mode, argument="mode")
        self.mode = mode
        self._saved: list[str | None] = []
        self._before_call: tuple[str | None] | None = (get_precision_override(),)
        set_precision_override(mode)

    def __enter__(self) -> set_recurrent_matmul_precision:
        (before,) = self._before_call or (get_precision_override(),)
        self._before_call = None
        self._saved.append(before)
        set_precision_override(self.mode)
        return self

    def __exit__(self, *exc_info: object) -> None:
        # The setter would read the environment variable again if nothing was set before.
        restore_precision_override(self._saved.pop())


def get_recurrent_matmul_precision() -> RecurrentMatmulPrecision:
    """Return the mode that a module with ``"auto"`` uses now, on the current device.

    Returns:
        ``"ieee"``, ``"tf32"`` or ``"tf32x3"``; presets are resolved for the current CUDA device,
        or for the CPU where there is none.

    Examples:
        >>> with set_recurrent_matmul_precision("ieee"):
        ...     get_recurrent_matmul_precision()
        'ieee'
    """
    return resolve(None)


def resolve(mode: str | None, device: torch.device | None = None) -> RecurrentMatmulPrecision:
    """Resolve a user's mode to the concrete mode of a kernel.

    Args:
        mode: a module's ``recurrent_matmul_precision``; None means ``"auto"``.
        device: where the kernel runs; presets depend on it. None: the current CUDA device, or the
            CPU where there is none.

    Returns:
        ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.

    Raises:
        ValueError: if ``mode`` is not a mode.

    Examples:
        >>> resolve("high-prec", torch.device("cpu"))
        'ieee'
    """
    if mode is None or mode == "auto":
        mode = get_precision_override() or PRECISION_OF_TORCH[_torch_precision()]
    validate_recurrent_matmul_precision(mode)
    if mode in _ON_TENSOR_CORES:
        mode = _ON_TENSOR_CORES[mode] if _has_tf32(device) else "ieee"
    return cast(RecurrentMatmulPrecision, mode)


def validate_recurrent_matmul_precision(
    mode: str, argument: str = "recurrent_matmul_precision"
) -> None:
    """Raise if ``mode`` is not a recurrent matmul precision.

    Args:
        mode: the user's value.
        argument: name of the argument, for the error.

    Raises:
        ValueError: if ``mode`` is none of ``RecurrentMatmulPrecisionUserMode``.

    Examples:
        >>> validate_recurrent_matmul_precision("fast")
    """
    if not isinstance(mode, str) or mode not in _USER:
        raise ValueError(
            f"{argument}={mode!r} is not a recurrent matmul precision; "
            f"expected one of {', '.join(map(repr, _USER))}."
        )


@contextmanager
def library_matmuls(precision: str) -> Iterator[None]:
    """Run cuBLAS's float32 products at ``precision`` inside a ``with`` block.

    Sets torch's process-wide flag if it has another value, and restores it. Threads inside this
    block take turns; other threads that multiply meanwhile use the changed flag.

    Args:
        precision: a resolved mode; only ``"tf32"`` lets cuBLAS use TF32.

    Yields:
        Nothing.

    Examples:
        >>> with library_matmuls("tf32"):
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    # Not `allow_tf32`: restoring it turns torch's "medium" into "high", and reading it raises if
    # the newer flag was set.
    flags = torch.backends.cuda.matmul
    with _CUBLAS_FLAG:
        before = flags.fp32_precision
        if before == wanted:
            yield
            return
        flags.fp32_precision = wanted
        try:
            yield
        finally:
            flags.fp32_precision = before


@torch.compiler.assume_constant_result
def _torch_precision() -> str:
    """Return torch's own setting; the newer flag wins if it contradicts the older one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        with _CUBLAS_FLAG:  # the contradiction may be another thread's `library_matmuls`
            try:
                return torch.get_float32_matmul_precision()
            except RuntimeError:
                tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
                return "high" if tf32 else "highest"


@torch.compiler.assume_constant_result
def _has_tf32(device: torch.device | None) -> bool:
    """Return whether ``device`` is an NVIDIA GPU with TF32 tensor cores (Ampere or newer)."""
    if device is not None and device.type != "cuda":
        return False
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8
