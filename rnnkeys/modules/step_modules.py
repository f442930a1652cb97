"""``LSTMCell`` and ``GRUCell``: single steps as ``nn.Module``, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from ..cells import GRU_CELL, LSTM_CELL, GatedCell, Weights
from ..checks import as_int
from .arguments import MAX_SIZES


class _StepModule(RNNCellBase):
    """Shared parameters and shape checks; a subclass sets ``cell``."""

    cell: GatedCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        input_size, hidden_size = (
            as_int(name, size, maximum=MAX_SIZES[name])
            for name, size in (("input_size", input_size), ("hidden_size", hidden_size))
        )
        super().__init__(
            input_size, hidden_size, bias, self.cell.num_gates, device=device, dtype=dtype
        )

    def _advance(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; expected input_size="
                f"{self.input_size} last."
            )
        if state is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            state = (zeros,) * len(self.cell.state_names)
        expected = (*input.shape[:-1], self.hidden_size)
        for i, value in enumerate(state):
            if value.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected hx[{i}] to be 1D or 2D, got {value.dim()}D instead"
                )
            if value.shape != expected:
                raise ValueError(
                    f"{name}: hx[{i}] has shape {tuple(value.shape)}; expected {expected}, as many "
                    "rows as the input has, and hidden_size."
                )
        # nn.RNNCellBase types these as Tensor although they are None without bias.
        weights = Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        _, state = self.cell(weights, input, state)
        return state


class LSTMCell(_StepModule):
    """Pure-PyTorch ``nn.LSTMCell``: supports vmap and compile.

    Parameters, initialization and ``state_dict`` are those of ``nn.LSTMCell``.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: whether the layer has biases.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> cell = LSTMCell(3, 5)
        >>> h, c = torch.vmap(cell)(torch.zeros(7, 2, 3))
        >>> h.shape
        torch.Size([7, 2, 5])
    """

    cell = LSTM_CELL

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance one step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``(h, c)``, each ``[B, H]`` or ``[H]``; zeros by default.

        Returns:
            The next ``(h, c)``.

        Raises:
            ValueError: if a rank is neither 1 nor 2, or a shape does not fit.
        """
        h, c = self._advance(input, hx)
        return h, c


class GRUCell(_StepModule):
    """Pure-PyTorch ``nn.GRUCell``: supports vmap and compile.

    Parameters, initialization and ``state_dict`` are those of ``nn.GRUCell``.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: whether the layer has biases.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> cell = GRUCell(3, 5)
        >>> torch.vmap(cell)(torch.zeros(7, 2, 3)).shape
        torch.Size([7, 2, 5])
    """

    cell = GRU_CELL

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Advance one step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``h``, ``[B, H]`` or ``[H]``; zeros by default.

        Returns:
            The next ``h``.

        Raises:
            ValueError: if a rank is neither 1 nor 2, or a shape does not fit.
        """
        return self._advance(input, None if hx is None else (hx,))[0]
