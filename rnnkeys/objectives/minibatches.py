"""Minibatches of whole sequences for policy gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

from ..checks import (
    Problem,
    as_int,
    can_read_values,
    find_finite_problems,
    find_meta_problems,
    find_tensor_problems,
    find_type_problems,
    raise_first,
    value_checks_enabled,
)
from ..checks.losses import find_start_problems, find_written_state_problems
from ..keys import MASK_KEY, as_key
from ..modules.network import as_networks
from ..sequences import (
    Spans,
    cut_windows,
    find_segment_starts,
    find_sequence_problems,
    find_spans,
    flag_padding,
    read_mask,
)
from ..sequences.checked import set_checked
from ..sequences.segment_starts import reduce_agents
from .valid_steps import expand_mask, standardize

_NAME = "SequenceMinibatches"


class SequenceMinibatches:
    """Cut a rollout into minibatches of whole sequences, for several epochs.

    Each row of ``[*, T]`` is cut into sequences of ``seq_len`` steps (or into episodes), and each
    minibatch holds some of them, ``[sequences, seq_len]``. Every epoch draws which sequences share
    a minibatch. The steps inside a sequence stay in their order, and each sequence starts from the
    state that is stored at its first step. Episodes may end inside a sequence: ``is_init`` resets
    the recurrent layers there.

    Shorter sequences are padded with copies of their last step, each flagged as a segment start.
    ``("collector", "mask")`` is False at padding, and TorchRL's losses read it. A mask of the
    rollout is kept, and sequences without a valid step are left out.

    Args:
        minibatch_steps: steps in a minibatch, a multiple of ``seq_len``; by default one minibatch
            holds all. Episodes are added until there are as many steps or more. The last minibatch
            of an epoch may be smaller.
        seq_len: steps in a sequence; by default whole rows, or whole episodes.
        epochs: how often each step is used.
        by_episode: cut where episodes start, so that a sequence holds one episode, or a part of
            one, no longer than ``seq_len``.
        networks: module or modules that run on the minibatches: the actor and the critic, or both
            in sequence. The call then checks their states once for all epochs; otherwise a wired
            loss checks them in every minibatch.
        refresh: run ``networks`` over the whole rollout after each epoch but the last, and store
            the states of the current weights. Otherwise sequences start from the collected states.
        normalize_advantage: bring the advantages of each minibatch to mean 0 and standard
            deviation 1 over its valid steps.
        advantage_key: key of the advantages.
        init_key: key of the ``is_init`` flags.
        generator: random generator of the draws; by default torch's.

    Raises:
        TypeError: if ``networks`` are not networks, a key is not a key, or ``generator`` is not a
            ``torch.Generator``.
        ValueError: if a number is out of range, if ``minibatch_steps`` would cut a sequence, or if
            ``refresh`` is set without ``networks``.

    Examples:
        >>> from tensordict import TensorDict
        >>> steps = torch.arange(8).reshape(2, 4)
        >>> rollout = TensorDict(step=steps, is_init=(steps == 0).unsqueeze(-1), batch_size=[2, 4])
        >>> minibatches = SequenceMinibatches(minibatch_steps=4, seq_len=2)
        >>> [batch.shape for batch in minibatches(rollout)]
        [torch.Size([2, 2]), torch.Size([2, 2])]
    """

    def __init__(
        self,
        minibatch_steps: int | None = None,
        seq_len: int | None = None,
        *,
        epochs: int = 1,
        by_episode: bool = False,
        networks: nn.Module | list[nn.Module] | None = None,
        refresh: bool = False,
        normalize_advantage: bool = False,
        advantage_key: NestedKey = "advantage",
        init_key: NestedKey = "is_init",
        generator: torch.Generator | None = None,
    ) -> None:
        self.minibatch_steps = _as_optional_int("minibatch_steps", minibatch_steps)
        self.seq_len = _as_optional_int("seq_len", seq_len)
        self.epochs = as_int("epochs", epochs)
        self.by_episode = by_episode
        self.networks = () if networks is None else as_networks(networks)
        self.refresh = refresh
        self.normalize_advantage = normalize_advantage
        self.advantage_key = as_key("advantage_key", advantage_key)
        self.init_key = as_key("init_key", init_key)
        if not isinstance(generator, (torch.Generator, type(None))):
            raise TypeError(f"generator must be a torch.Generator. Got {generator!r}. [argument]")
        self.generator = generator
        if refresh:
            self._check_refresh()
        if self.seq_len is not None and not by_episode:
            self._check_whole(self.seq_len)

    def _check_refresh(self) -> None:
        layers = [layer for network in self.networks for layer in network.layers]
        if not layers:
            raise ValueError(
                "refresh=True needs networks= with a recurrent module inside, to run over the "
                f"rollout. Got networks={[network.network for network in self.networks]}."
            )
        for layer in layers:
            raise_first(find_written_state_problems(layer, "refresh=True"))

    def _check_whole(self, seq_len: int) -> None:
        if self.minibatch_steps is not None and self.minibatch_steps % seq_len:
            nearest = max(1, round(self.minibatch_steps / seq_len)) * seq_len
            raise ValueError(
                f"minibatch_steps={self.minibatch_steps} would cut through a sequence of {seq_len} "
                f"steps. Expected a multiple of seq_len: {nearest} is the nearest."
            )

    def __call__(self, rollout: TensorDictBase) -> Iterator[TensorDictBase]:
        """Check a rollout, then yield its minibatches.

        Args:
            rollout: ``[*, T]``, time last, as a collector returns it, with advantages if the loss
                is to use them. It stays as it is.

        Yields:
            ``[sequences, seq_len]`` TensorDicts, one sequence in each row.

        Raises:
            KeyError: if flags, advantages to normalize or the states of ``networks`` are missing.
            TypeError: if flags, ``done`` or the mask are not bool.
            ValueError: if there is no step or no valid one, if time is not contiguous, or if the
                reward, advantage or value target of a valid step is not finite.
        """
        # A generator would raise at the first minibatch only.
        self._check(rollout)
        return self._make_minibatches(rollout)

    def _check(self, rollout: TensorDictBase) -> None:
        raise_first(find_type_problems(rollout, _NAME))
        numbers = [("next", "reward"), self.advantage_key, "value_target"]
        raise_first(find_tensor_problems(rollout, [self.init_key, *numbers]))
        raise_first(find_meta_problems(rollout, self.init_key, _NAME))
        pairs = [pair for network in self.networks for pair in network.pairs]
        raise_first(find_sequence_problems(rollout, [self.init_key], pairs, reader=_NAME))
        for network in self.networks:
            for layer in network.layers:
                raise_first(find_start_problems(rollout, layer, _NAME))
        if self.normalize_advantage:
            raise_first(self._find_advantage_problems(rollout.get(self.advantage_key, None)))
        if can_read_values(rollout.get(self.init_key)):
            raise_first(find_finite_problems(rollout, numbers, read_mask(rollout)))

    def _find_advantage_problems(self, advantage: Tensor | None) -> Iterator[Problem]:
        remedy = "Compute it first, over the whole rollout: recurrent_loss(GAE(...))(rollout)."
        if advantage is None:
            yield Problem(
                "advantage",
                f"normalize_advantage=True, and the rollout has no {self.advantage_key!r}.",
                remedy,
                KeyError,
            )
        elif not advantage.is_floating_point():
            yield Problem(
                "advantage",
                f"The advantages {self.advantage_key!r} must be floats. Got {advantage.dtype}.",
                remedy,
                TypeError,
            )

    def _make_minibatches(self, rollout: TensorDictBase) -> Iterator[TensorDictBase]:
        steps = rollout.shape[-1]
        starts = reduce_agents(find_segment_starts(rollout, self.init_key), rollout.ndim)
        cuts = starts.reshape(-1, steps)
        rows = rollout.reshape(-1, steps) if rollout.ndim != 2 else rollout
        cuts = cuts if self.by_episode else torch.zeros_like(cuts)
        sequences = find_spans(cuts, self.seq_len, read_mask(rows))
        for epoch in range(self.epochs):
            if epoch and self.refresh:
                for network in self.networks:
                    rows = network.recompute_states(rows)
            for chosen in self._draw(sequences):
                yield self._gather(rows, chosen)

    def _draw(self, sequences: Spans) -> Iterator[Spans]:
        """Yield the sequences of each minibatch, in random order."""
        count = len(sequences.row)
        order = torch.randperm(count, generator=self.generator).to(sequences.row.device)
        if self.minibatch_steps is None:
            yield sequences.take(order)
            return
        # Sequences are added until minibatch_steps is reached.
        begin = steps = 0
        for i, length in enumerate(sequences.length[order].tolist()):
            steps += length
            if steps >= self.minibatch_steps or i == count - 1:
                yield sequences.take(order[begin : i + 1])
                begin = i + 1
                steps = 0

    def _gather(self, rows: TensorDictBase, chosen: Spans) -> TensorDictBase:
        batch, mask = cut_windows(rows, chosen)
        if rows.get(MASK_KEY, None) is not None or not mask.all():
            batch.set(MASK_KEY, mask)
            flag_padding(batch, self.init_key, chosen.length)
        if self.normalize_advantage:
            self._normalize(batch, mask)
        # Without networks it is not known which entries are states, so the loss checks them.
        if self.networks and value_checks_enabled():
            set_checked(batch, [key for network in self.networks for key in network.state_keys])
        return batch

    def _normalize(self, batch: TensorDictBase, mask: Tensor) -> None:
        """Normalize the advantages over the steps that TorchRL's losses count, in place."""
        advantage = batch.get(self.advantage_key)
        counted = expand_mask(mask, advantage)
        for key in AUTO_LOSS_MASK_KEYS:
            other = batch.get(key, None)
            if other is not None:
                counted = counted & expand_mask(other, advantage)
        batch.set(self.advantage_key, standardize(advantage, counted, min_std=1e-8))


def _as_optional_int(name: str, value: Any) -> int | None:
    return None if value is None else as_int(name, value)
