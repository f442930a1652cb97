"""A setting of glibc's allocator that can make training faster."""

from __future__ import annotations

import functools

import torch

# The largest allocation that still raises glibc's dynamic threshold: 32 MiB less some pages.
_MOST_BYTES = (32 << 20) - (64 << 10)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pass: blocks of up to 32 MiB, 64 MiB in total.

    By default glibc returns every freed block of more than 128 KiB to the system. The next pass
    maps it again, page by page, which can take as long as the computation. Freeing a block raises
    this threshold to its size, and the memory that glibc keeps to twice that
    (``M_MMAP_THRESHOLD`` in mallopt(3)). This function therefore allocates and frees one block of
    the largest size, without touching its pages. The effect is permanent and process-wide. It has
    no effect if ``MALLOC_..._`` variables set the limits, or with another allocator.

    Examples:
        >>> keep_freed_memory()
    """
    torch.empty(_MOST_BYTES, dtype=torch.uint8, device="cpu")
