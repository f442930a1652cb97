"""Prioritized samplers that need no compiled extension.

TorchRL keeps priorities in trees of its compiled extension, and the extension loads only beside the
build of torch that it was compiled with: elsewhere (torchrl 0.14.1 with torch 2.13.0, for one)
``PrioritizedSampler`` cannot be made. The samplers here are TorchRL's, with the same arguments
and states; only the trees are NumPy's where the extension is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers import samplers
from torchrl.data.replay_buffers.samplers import prioritized

HAS_EXTENSION = prioritized.SumSegmentTreeFp32 is not None


class _Tree:
    """A binary tree over ``capacity`` numbers; each node reduces its two children."""

    reduce: np.ufunc
    identity: float

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # A power of two: node k has the children 2k and 2k + 1, and leaves start at `leaves`.
        self.leaves = 1 << max(capacity - 1, 0).bit_length()
        # float64 whatever is asked for: in float32 the sum of many small priorities stops growing.
        self.nodes = np.full(2 * self.leaves, self.identity)

    def __getitem__(self, index: Any) -> Any:
        values = torch.as_tensor(self.nodes[np.asarray(index) + self.leaves]).to(self.dtype)
        if isinstance(index, Tensor):
            return values
        return values.numpy() if values.ndim else values.item()

    def __setitem__(self, index: Any, value: Any) -> None:
        nodes = np.atleast_1d(np.asarray(index)) + self.leaves
        self.nodes[nodes] = np.asarray(value)
        while nodes.size and nodes[0] > 1:
            nodes = np.unique(nodes >> 1)
            self.nodes[nodes] = self.reduce(self.nodes[2 * nodes], self.nodes[2 * nodes + 1])

    def query(self, left: int, right: int) -> float:
        """Reduce the numbers ``left``, ..., ``right - 1`` to one."""
        result = self.identity
        left, right = left + self.leaves, right + self.leaves
        while left < right:
            if left & 1:
                result = self.reduce(result, self.nodes[left])
                left += 1
            if right & 1:
                right -= 1
                result = self.reduce(result, self.nodes[right])
            left, right = left >> 1, right >> 1
        return float(result)


class _SumTree(_Tree):
    reduce = np.add
    identity = 0.0

    def scan_lower_bound(self, mass: Any) -> Tensor:
        """Return, for each mass, the index in whose share of the running sum it lies (int64)."""
        mass = torch.as_tensor(mass, dtype=torch.float64).numpy()
        node = np.ones(mass.shape, dtype=np.int64)
        for _ in range(self.leaves.bit_length() - 1):
            left = self.nodes[2 * node]
            goes_right = mass >= left
            mass = np.where(goes_right, mass - left, mass)
            node = 2 * node + goes_right
        return torch.as_tensor(node - self.leaves)


class _MinTree(_Tree):
    reduce = np.minimum
    identity = float("inf")


class AnyTrees:
    """Mixin for TorchRL's prioritized samplers: NumPy's trees where the extension is missing."""

    dtype: torch.dtype
    _max_capacity: int
    _device: torch.device | None
    _sum_tree: Any
    _alpha: float
    _eps: float

    @property
    def _base(self) -> Any:
        """TorchRL's sampler, the next class in the order of methods."""
        return super()

    def _init(self) -> None:
        on_cuda = self._device is not None and self._device.type == "cuda"
        if HAS_EXTENSION or on_cuda:
            return self._base._init()
        if self.dtype not in (torch.float32, torch.float64):
            raise NotImplementedError(
                f"dtype={self.dtype} of priorities: pass torch.float32 or torch.float64."
            )
        self._sum_tree = _SumTree(self._max_capacity, self.dtype)
        self._min_tree = _MinTree(self._max_capacity, self.dtype)
        # A property of TorchRL's class, which a declaration here would hide.
        setattr(self, "_max_priority", None)  # noqa: B010

    def update_priority(self, index: Any, priority: Any, **storage: Any) -> None:
        """Set priorities of any floating dtype; the extension takes only that of its trees."""
        cast = torch.as_tensor(priority).to(self.dtype)
        self._base.update_priority(index, cast, **storage)

    def get_priorities(self, index: Tensor) -> Tensor:
        """Return the priorities of items, as ``update_priority`` takes them.

        Where ``alpha=0`` makes all items equal, their priorities are 1.

        Args:
            index: indices of items, int64 ``[*]``.

        Returns:
            float64 ``[*]``.

        Examples:
            >>> sampler = PrioritizedSampler(max_capacity=4, alpha=0.5, beta=1.0)
            >>> sampler.extend(torch.arange(3))
            >>> sampler.update_priority(torch.tensor([0, 2]), torch.tensor([2.0, 5.0]))
            >>> sampler.get_priorities(torch.tensor([2, 0])).round(decimals=4)
            tensor([5., 2.], dtype=torch.float64)
        """
        # The extension returns a number for an index of one item.
        mass = torch.as_tensor(self._sum_tree[index]).double().cpu().reshape(index.shape)
        if self._alpha == 0:
            return torch.ones_like(mass)
        return mass ** (1 / self._alpha) - self._eps


class PrioritizedSampler(AnyTrees, samplers.PrioritizedSampler):
    """TorchRL's ``PrioritizedSampler``, with or without its compiled extension.

    Args:
        *args: as for TorchRL's ``PrioritizedSampler``.
        **kwargs: as for TorchRL's ``PrioritizedSampler``.

    Raises:
        NotImplementedError: if ``dtype`` is neither float32 nor float64.

    Examples:
        >>> import torch
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = PrioritizedSampler(max_capacity=4, alpha=1.0, beta=1.0, eps=0.0)
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=100)
        >>> index = rb.extend(torch.arange(4))
        >>> sampler.update_priority(index, torch.tensor([1.0, 1e-9, 1e-9, 2.0]))
        >>> sorted(set(rb.sample().tolist()))
        [0, 3]
    """


class PrioritizedSliceSampler(AnyTrees, samplers.PrioritizedSliceSampler):
    """TorchRL's ``PrioritizedSliceSampler``, with or without its compiled extension.

    It sets ``done`` at the end of every slice and no ``is_init`` flag at its start; readers of this
    package start a segment after every ``done``.

    Args:
        *args: as for TorchRL's ``PrioritizedSliceSampler``.
        **kwargs: as for TorchRL's ``PrioritizedSliceSampler``.

    Raises:
        NotImplementedError: if ``dtype`` is neither float32 nor float64.
    """
