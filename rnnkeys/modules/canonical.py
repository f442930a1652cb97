"""Row-major memory layout for the entries that recurrent modules read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor


class CanonicalKeys:
    """Mixin: the entries of a module whose memory layout matters."""

    @property
    def canonical_keys(self: Any) -> list[NestedKey]:
        """Keys that the module reads and writes; other entries may keep any layout."""
        return [*self.in_keys, *self.out_keys]

    def canonicalize(self, data: TensorDictBase, *, inplace: bool = False) -> TensorDictBase:
        """Lay out the module's entries row by row, with canonical strides; others stay as they are.

        Args:
            data: any batch; entries that are missing are skipped.
            inplace: whether to replace the entries of ``data`` itself.

        Returns:
            ``data`` if ``inplace``, else a shallow copy.

        Examples:
            >>> from tensordict import TensorDict
            >>> from rnnkeys import GRUModule
            >>> module = GRUModule(3, 4, in_key="obs", out_key="embed")
            >>> data = TensorDict(obs=torch.zeros(5, 2, 3).transpose(0, 1), batch_size=[2, 5])
            >>> module.canonicalize(data)["obs"].is_contiguous()
            True
        """
        return _canonicalize(data, self.canonical_keys, inplace)


def canonicalize_rnn_subset(
    data: TensorDictBase, modules: Iterable[CanonicalKeys], *, inplace: bool = False
) -> TensorDictBase:
    """Lay out the entries of several modules row by row; see ``RecurrentModule.canonicalize``.

    Args:
        data: any batch; entries that are missing are skipped.
        modules: recurrent modules, whose keys are united.
        inplace: whether to replace the entries of ``data`` itself.

    Returns:
        ``data`` if ``inplace`` (or if it has none of the entries), else a shallow copy.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule, LSTMModule
        >>> modules = [cls(3, 4, in_key="obs", out_key="embed") for cls in (GRUModule, LSTMModule)]
        >>> data = TensorDict(obs=torch.zeros(5, 2, 3).transpose(0, 1), batch_size=[2, 5])
        >>> canonicalize_rnn_subset(data, modules)["obs"].is_contiguous()
        True
    """
    keys = dict.fromkeys(key for module in modules for key in module.canonical_keys)
    return _canonicalize(data, list(keys), inplace)


def _canonicalize(data: TensorDictBase, keys: Sequence[NestedKey], inplace: bool) -> TensorDictBase:
    found = {key: value for key in keys if (value := data.get(key, None)) is not None}
    if not found:
        return data
    out = data if inplace else data.copy()
    for key, value in found.items():
        out.set(key, _row_major(value))
    return out


def _row_major(value: Tensor) -> Tensor:
    # is_contiguous() ignores the strides of dimensions of size one; kernels that read strides do
    # not.
    strides = torch.empty(value.shape, device="meta").stride()
    if value.stride() == strides:
        return value
    return torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value)
