"""Keeps memory that a pass frees for the next one."""

from __future__ import annotations

import functools

import torch

# The most that glibc's threshold rises to by itself: 32 MiB, less what the piece's own pages take.
_MOST_BYTES = (32 << 20) - (64 << 10)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc hold on to pieces of up to 32 MiB, and to 64 MiB in all, once and for all.

    At first it gives every piece of more than 128 KiB back to the system as soon as it is freed,
    and the next pass has it mapped anew, page by page, which takes as long as to compute. That
    limit rises to the size of whatever piece is freed, and what it holds in all to twice of that
    (``M_MMAP_THRESHOLD`` in mallopt(3)). So one piece of the largest size is had and freed, of
    which no page is touched. With limits set by ``MALLOC_..._`` variables, or another allocator,
    nothing changes.

    Examples:
        >>> keep_freed_memory()
    """
    torch.empty(_MOST_BYTES, dtype=torch.uint8, device="cpu")
