"""The interface of a cell: the equations of one time step, and nothing else.

A cell is a pure function ``(weights, input_t, state) -> (output_t, next_state)``. It does not
depend on time, resets, depth, keys or devices: backends run time, modules handle keys. Letters:
``B`` batch, ``I`` input size, ``H`` hidden size, ``O`` output size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

State = tuple[Tensor, ...]


class Cell(ABC):
    """One time step of a recurrent layer.

    .. math:: (y_t, s_t) = f_w(x_t, s_{t-1})

    Calling a cell computes that step. Backends call its two parts: ``project_input`` once for all
    time steps, since it does not depend on the state, and ``step`` once per time step.

    A cell of your own overrides ``parameter_shapes`` and ``step``; if it has gates that are sums of
    an input and a recurrent projection, derive it from :class:`GatedCell` instead. See
    ``docs/custom_cells.md``.

    Attributes:
        name: lower-case name, such as ``"lstm"``, for error messages and ``repr``.
        state_names: names of the entries of the state, in order; ``()`` for a cell without state.
        is_pure: whether a step depends on its arguments alone, so that it can be computed again in
            the backward pass.
    """

    name: str
    state_names: tuple[str, ...]
    is_pure: bool = True

    @abstractmethod
    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a layer by name, such as ``"weight_ih"``."""

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return the size of each entry of the state, by default ``H``."""
        return (hidden_size,) * len(self.state_names)

    def reset_parameters(self, parameters: dict[str, Tensor], hidden_size: int) -> None:
        """Initialize the parameters of a layer in place, each by :meth:`reset_parameter`."""
        for name, parameter in parameters.items():
            self.reset_parameter(name, parameter, hidden_size)

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """Initialize a parameter in place: uniform within ``1 / sqrt(H)``, as torch's layers."""
        init_uniform(parameter, hidden_size)

    def bind(self, parameters: dict[str, Tensor]) -> Any:
        """Return the ``weights`` argument of a step: by default the parameters by name."""
        return parameters

    def project_input(self, weights: Any, x: Tensor) -> Tensor:
        """Compute the part of a step that depends on the input ``x [..., I]`` alone.

        The default returns ``x``.
        """
        return x

    @abstractmethod
    def step(self, weights: Any, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step.

        Args:
            weights: of one layer, from :meth:`bind`.
            input_t: projected input of one time step, ``[..., F]``, from :meth:`project_input`.
            state: after the previous time step, one tensor ``[..., H]`` per name in
                ``state_names``.

        Returns:
            The output ``[..., O]`` and the next state.
        """

    def __call__(self, weights: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step from an input ``[..., I]`` that is not projected."""
        return self.step(weights, self.project_input(weights, x), state)


def init_uniform(parameter: Tensor, size: int) -> None:
    """Initialize a parameter in place, uniform within ``1 / sqrt(size)``, as torch's layers do."""
    nn.init.uniform_(parameter, -(size**-0.5), size**-0.5)
