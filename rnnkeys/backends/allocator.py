"""An explicit setting of glibc's allocator, which a training may profit from."""

from __future__ import annotations

import functools

import torch

# The most that glibc's threshold rises to by itself: 32 MiB, less the pages of the piece itself.
_MOST_BYTES = (32 << 20) - (64 << 10)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pass: pieces of up to 32 MiB, and 64 MiB in all.

    At first glibc gives every piece of more than 128 KiB back to the system when it is freed, and
    the next pass maps it again, page by page, which takes as long as to compute. The limit rises to
    the size of each piece that is freed, and what glibc keeps in all to twice that
    (``M_MMAP_THRESHOLD`` in mallopt(3)). So this function allocates and frees one piece of the
    largest size, without touching a page. It acts on the whole process, for good; with limits set
    by ``MALLOC_..._`` variables, or with another allocator, it changes nothing.

    Examples:
        >>> keep_freed_memory()
    """
    torch.empty(_MOST_BYTES, dtype=torch.uint8, device="cpu")
