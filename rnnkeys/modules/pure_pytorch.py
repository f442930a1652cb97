"""``LSTM`` and ``GRU``: pure-PyTorch implementations of ``nn.LSTM`` and ``nn.GRU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.loop import run_steps
from ..cells import GRU_CELL, LSTM_CELL, Cell
from .parameters import TorchLayers


class _PurePyTorchRNN(nn.RNNBase):
    """Shared depth, dropout, masking and checks; a subclass sets ``cell``."""

    cell: Cell

    def _state_shapes(self, batch: int) -> list[tuple[int, int, int]]:
        sizes = [self.hidden_size] * len(self.cell.state_names)
        sizes[0] = self.proj_size or self.hidden_size
        return [(self.num_layers, batch, size) for size in sizes]

    def _check(self, input: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None) -> None:
        name = type(self).__name__
        if input.dim() != 3:
            raise ValueError(f"{name}: Expected input to be 3D, got {input.dim()}D instead")
        if input.shape[2] != self.input_size:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; expected input_size="
                f"{self.input_size} last."
            )
        shapes = self._state_shapes(input.shape[0 if self.batch_first else 1])
        for i, (value, shape) in enumerate(zip(state or (), shapes, strict=False)):
            if value.shape != shape:
                raise ValueError(
                    f"{name}: hx[{i}] has shape {tuple(value.shape)}; expected {shape}: "
                    "num_layers, the input's batch, and the size of the state."
                )
        if mask is not None and mask.shape != input.shape[:2]:
            raise ValueError(
                f"{name}: mask has shape {tuple(mask.shape)}; expected {tuple(input.shape[:2])}, "
                "as the input without its last dimension."
            )

    def _unroll(
        self, input: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._check(input, state, mask)
        y = input.transpose(0, 1) if self.batch_first else input
        if state is None:
            state = tuple(y.new_zeros(shape) for shape in self._state_shapes(y.shape[1]))
        active = mask.transpose(0, 1) if mask is not None and self.batch_first else mask
        if active is not None:
            # An inactive step may hold NaN, and 0 * NaN would put NaN into the gradient.
            y = y.masked_fill(~active.unsqueeze(-1), 0)
        layers = TorchLayers(self)
        last = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                y = F.dropout(y, self.dropout, self.training)
            start = tuple(s[layer] for s in state)
            _, states = run_steps(self.cell, layers.weights(layer), y, start, active=active)
            y = torch.stack([s[0] for s in states])
            last.append(states[-1])
        final = tuple(torch.stack(entry) for entry in zip(*last, strict=True))
        return (y.transpose(0, 1) if self.batch_first else y), final


class LSTM(_PurePyTorchRNN):
    """Pure-PyTorch ``nn.LSTM``: supports vmap and derivatives of any order.

    Parameters, initialization and ``state_dict`` are those of ``nn.LSTM``. As in
    TorchRL, ``batch_first`` is the fourth argument and True by default.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``.
        batch_first: whether tensors are ``[B, T, ...]`` (default) or ``[T, B, ...]``.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        bidirectional: must be False.
        proj_size: size of a projection of ``h``, 0 for none.
        device: of the parameters.
        dtype: of the parameters.
        use_scan: accepted for compatibility; the time loop is the same either way.

    Raises:
        NotImplementedError: if ``bidirectional``.

    Examples:
        >>> lstm = LSTM(3, 5, num_layers=2)
        >>> y, (h, c) = lstm(torch.zeros(2, 4, 3))
        >>> y.shape, h.shape
        (torch.Size([2, 4, 5]), torch.Size([2, 2, 5]))
    """

    cell = LSTM_CELL

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_scan: bool = False,
    ) -> None:
        _check_bidirectional(self, bidirectional)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__("LSTM", *sizes, proj_size=proj_size, device=device, dtype=dtype)
        self.use_scan = use_scan

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run sequences.

        Args:
            input: ``[B, T, I]``.
            hx: ``(h, c)`` before the first step, each ``[L, B, H]``; zeros by default.
            mask: bool ``[B, T]``; the state does not change where it is False.

        Returns:
            Outputs ``[B, T, H]`` and the last ``(h, c)``, each ``[L, B, H]``.

        Raises:
            ValueError: if ``input`` is not of rank 3, or a shape does not fit.
        """
        y, (h, c) = self._unroll(input, hx, mask)
        return y, (h, c)


class GRU(_PurePyTorchRNN):
    """Pure-PyTorch ``nn.GRU``: supports vmap and derivatives of any order.

    Parameters, initialization and ``state_dict`` are those of ``nn.GRU``. As in
    TorchRL, ``batch_first`` is True by default.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``.
        bias: whether layers have biases.
        batch_first: whether tensors are ``[B, T, ...]`` (default) or ``[T, B, ...]``.
        dropout: probability of dropout between layers, in training.
        bidirectional: must be False.
        device: of the parameters.
        dtype: of the parameters.
        use_scan: accepted for compatibility; the time loop is the same either way.

    Raises:
        NotImplementedError: if ``bidirectional``.

    Examples:
        >>> y, h = GRU(3, 5)(torch.zeros(2, 4, 3))
        >>> y.shape, h.shape
        (torch.Size([2, 4, 5]), torch.Size([1, 2, 5]))
    """

    cell = GRU_CELL

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_scan: bool = False,
    ) -> None:
        _check_bidirectional(self, bidirectional)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__("GRU", *sizes, device=device, dtype=dtype)
        self.use_scan = use_scan

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, hx: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run sequences.

        Args:
            input: ``[B, T, I]``.
            hx: ``h`` before the first step, ``[L, B, H]``; zeros by default.
            mask: bool ``[B, T]``; the state does not change where it is False.

        Returns:
            Outputs ``[B, T, H]`` and the last ``h``, ``[L, B, H]``.

        Raises:
            ValueError: if ``input`` is not of rank 3, or a shape does not fit.
        """
        y, (h,) = self._unroll(input, None if hx is None else (hx,), mask)
        return y, h


def _check_bidirectional(rnn: nn.Module, bidirectional: bool) -> None:
    if bidirectional:
        raise NotImplementedError(
            f"{type(rnn).__name__}: bidirectional=True is not supported: a policy cannot read the "
            "future."
        )
