"""The cases that are measured: shapes of batches, and the steps at which episodes start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GATES = {"LSTM": 4, "GRU": 3}
STATES = {"LSTM": ("h", "c"), "GRU": ("h",)}

# Lengths of real episodes; see `episode_lengths`.
SHORT, LONG = "short episodes", "long episodes"


class Shape(NamedTuple):
    """Sizes of a batch and of the layers that run over it."""

    B: int
    T: int
    I: int
    H: int
    L: int = 1

    def __str__(self) -> str:
        layers = f", L={self.L}" if self.L > 1 else ""
        return f"({self.B}, {self.T}, {self.I}, {self.H}{layers})"


@dataclass(frozen=True)
class Case:
    """One cell on one batch.

    Attributes:
        cell: ``"LSTM"`` or ``"GRU"``.
        shape: sizes.
        resets: chance of an episode start at every step, or the name of real episode lengths.
    """

    cell: str
    shape: Shape
    resets: float | str

    @property
    def has_resets(self) -> bool:
        """Whether episodes may start within a row."""
        return self.resets != 0

    @property
    def matmul_flops(self) -> int:
        """Floating point operations of all matmuls, forward and (twice as many) backward."""
        B, T, I, H, L = self.shape
        inputs = [I] + [H] * (L - 1)
        return sum(3 * 2 * B * T * (size + H) * GATES[self.cell] * H for size in inputs)

    @property
    def state_bytes(self) -> int:
        """Size of the float32 state entries that a call writes at every position."""
        B, T, _, H, L = self.shape
        return 4 * B * T * L * H * len(STATES[self.cell])


class Batch(NamedTuple):
    """Data for a case.

    Attributes:
        x: ``[B, T, I]``.
        is_init: bool ``[B, T]``.
        states: by name, each ``[B, T, L, H]``.
        grad: ``[B, T, H]``, the gradient that arrives at the output.
    """

    x: Tensor
    is_init: Tensor
    states: dict[str, Tensor]
    grad: Tensor


def make_batch(case: Case, device: str = "cpu") -> Batch:
    """Draw the data of a case; the same numbers every time on a kind of device.

    The input requires a gradient, as after an encoder. States exist at every step: zeros where
    an episode starts, as primers write them, and stored ones at the start of a row and elsewhere.
    """
    B, T, I, H, L = case.shape
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    states = {name: draw(B, T, L, H) for name in STATES[case.cell]}
    is_init = starts(case.resets, B, T).to(device)
    for state in states.values():
        state[:, 1:][is_init[:, 1:]] = 0
    return Batch(draw(B, T, I).requires_grad_(), is_init, states, draw(B, T, H))


def starts(resets: float | str, rows: int, steps: int) -> Tensor:
    """Draw where episodes start, bool ``[rows, steps]``; the same flags every time.

    The first step of a row always counts, as in every sampled slice. Rows of real episodes begin at
    a random step of one.

    Args:
        resets: chance of a start at every step, or the name of real episode lengths.
        rows: ``B``.
        steps: ``T``.
    """
    random = np.random.default_rng(0)
    if isinstance(resets, str):
        is_init = np.stack([_episodes_in_row(resets, steps, random) for _ in range(rows)])
    else:
        is_init = random.random((rows, steps)) < resets
    is_init[:, 0] = True
    return torch.from_numpy(is_init)


def _episodes_in_row(name: str, steps: int, random: np.random.Generator) -> np.ndarray:
    lengths = episode_lengths(name)
    # A random step of all steps lies in a long episode more often than in a short one.
    first = random.choice(lengths, p=lengths / lengths.sum())
    following = random.choice(lengths, size=steps)
    ends = random.integers(1, first + 1) + np.cumsum(np.append(0, following))
    is_init = np.zeros(steps, dtype=bool)
    is_init[ends[ends < steps]] = True
    return is_init


@lru_cache
def episode_lengths(name: str, episodes: int = 100) -> np.ndarray:
    """Play CartPole and return the lengths of the episodes.

    ``SHORT`` is played at random, as at the start of training (22 steps on average). ``LONG`` is
    played by a controller that balances the pole, with one action in ten at random, as at the end
    of training (400 steps on average; an episode is cut at 500).
    """
    import gymnasium

    act = {SHORT: _act_randomly, LONG: _balance}[name]
    random = np.random.default_rng(0)
    environment = gymnasium.make("CartPole-v1")
    lengths = []
    for episode in range(episodes):
        observation, _ = environment.reset(seed=episode)
        steps, over = 0, False
        while not over:
            observation, _, terminated, truncated, _ = environment.step(act(observation, random))
            over = terminated or truncated
            steps += 1
        lengths.append(steps)
    environment.close()
    return np.array(lengths)


def _act_randomly(observation: Any, random: np.random.Generator) -> int:
    return int(random.integers(2))


def _balance(observation: Any, random: np.random.Generator) -> int:
    if random.random() < 0.1:
        return _act_randomly(observation, random)
    _, _, angle, angular_velocity = observation
    return int(angle + angular_velocity > 0)


@dataclass(frozen=True)
class Grid:
    """The cases of a run.

    Attributes:
        cases: timed forward and backward, every contestant in each.
        forward: those of them that are timed without a backward pass too.
        growth: cases of one amount of data whose rows get longer.
        growth_torchrl: longest rows of ``growth`` that TorchRL runs.
        memory: cases whose memory is measured, every contestant in each.
        memory_growth: cases whose rows get longer; without TorchRL.
        batches: of single steps.
        environments: of collectors.
    """

    cases: tuple[Case, ...]
    forward: tuple[Case, ...]
    growth: tuple[Case, ...]
    growth_torchrl: int
    memory: tuple[Case, ...]
    memory_growth: tuple[Case, ...]
    batches: tuple[int, ...]
    environments: tuple[int, ...]


_ALL_RESETS = (0.0, 0.005, 0.02, 0.1, 0.5, SHORT, LONG)
_SOME_RESETS = (0.0, 0.02, 0.1, SHORT)
_SHAPES = {
    Shape(1, 64, 64, 128): _SOME_RESETS,
    Shape(16, 64, 64, 128): _ALL_RESETS,
    Shape(64, 128, 64, 128): _ALL_RESETS,
    Shape(256, 32, 64, 64): _SOME_RESETS,
    Shape(32, 80, 256, 512): _SOME_RESETS,
    Shape(16, 64, 64, 128, 2): _SOME_RESETS,
    Shape(8, 256, 64, 256): _SOME_RESETS,
    Shape(32, 512, 64, 128): _SOME_RESETS,
    Shape(8, 1024, 64, 256): _SOME_RESETS,
}
_FORWARD_RESETS = (0.0, 0.02)
_FORWARD_SHAPES = (
    Shape(16, 64, 64, 128),
    Shape(64, 128, 64, 128),
    Shape(16, 64, 64, 128, 2),
    Shape(8, 256, 64, 256),
    Shape(32, 512, 64, 128),
)


def _product(shapes: dict[Shape, tuple[float | str, ...]]) -> tuple[Case, ...]:
    return tuple(
        Case(cell, shape, resets)
        for shape, patterns in shapes.items()
        for cell in GATES
        for resets in patterns
    )


def _lengthening(total: int, lengths: tuple[int, ...], H: int) -> tuple[Case, ...]:
    return tuple(Case(cell, Shape(total // T, T, 64, H), 0.05) for cell in GATES for T in lengths)


def full_grid() -> Grid:
    """Return the cases of ``make bench``: 20 minutes on two cores, most of them TorchRL's."""
    cases = _product(_SHAPES)
    return Grid(
        cases=cases,
        forward=_product(dict.fromkeys(_FORWARD_SHAPES, _FORWARD_RESETS)),
        growth=_lengthening(4096, (64, 128, 256, 512, 1024, 2048, 4096), H=128),
        growth_torchrl=1024,
        memory=_product(
            {
                Shape(16, 64, 64, 128): (0.0, 0.02, 0.1),
                Shape(64, 128, 64, 128): (0.0, 0.02, 0.1),
            }
        ),
        memory_growth=tuple(
            Case(cell, Shape(8, T, 64, 128), 0.05) for cell in GATES for T in (128, 512, 1024, 2048)
        ),
        batches=(1, 8, 32),
        environments=(1, 8, 32),
    )


def quick_grid() -> Grid:
    """Return a grid that ends in a minute: enough to see that something broke."""
    cases = _product({Shape(16, 64, 64, 128): (0.0, 0.1), Shape(4, 512, 32, 64): (0.1,)})
    return Grid(
        cases=cases,
        forward=_product({Shape(16, 64, 64, 128): (0.1,)}),
        growth=_lengthening(1024, (64, 256, 1024), H=64),
        growth_torchrl=64,
        memory=_product({Shape(16, 64, 64, 128): (0.1,)}),
        memory_growth=(),
        batches=(1,),
        environments=(8,),
    )
