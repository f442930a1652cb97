"""Minibatches of whole sequences for policy gradients: steps are never torn out of their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn

from ..checks.losses import (
    read_mask,
    refuse_emptiness,
    refuse_lost_memory,
    refuse_not_finite,
    refuse_unknown_states,
)
from ..keys import MASK_KEY, next_key
from ..mode import set_recurrent_mode
from ..modules.network import Recurrent, find_recurrent
from ..sequences.segment_starts import check_contiguous_time, find_segment_starts


class Sequences(NamedTuple):
    """Runs of consecutive steps: row, first step and length of each, int64 ``[N]``."""

    row: Tensor
    first: Tensor
    length: Tensor

    def __getitem__(self, which: Any) -> Sequences:  # pyright: ignore[reportIncompatibleMethodOverride]
        row, first, length = tuple(self)
        return Sequences(row[which], first[which], length[which])


class SequenceMinibatches:
    """Cut a rollout into minibatches of whole sequences, several times over.

    Each row of ``[*, T]`` is cut into sequences of ``seq_len`` steps (or into episodes), and each
    minibatch holds some of them, ``[sequences, seq_len]``. Which sequences share a minibatch is
    drawn anew in every epoch; the steps inside a sequence stay as they were collected, and each
    sequence starts from the state that is stored at its first step. Ends of episodes inside a
    sequence are no obstacle: ``is_init`` tells the memory where to start anew.

    Where sequences differ in length, shorter ones are filled up with copies of their last step,
    each marked as a start. ``("collector", "mask")`` tells them apart, and TorchRL's losses read
    it. A mask that the rollout brings along is kept, and sequences without a single unmasked step
    are left out.

    Args:
        minibatch_steps: steps in a minibatch, a multiple of ``seq_len``; by default one minibatch
            holds all. Episodes are added until there are as many steps or more. The last minibatch
            of an epoch may be smaller.
        seq_len: steps in a sequence; by default whole rows, or whole episodes.
        epochs: how often each step is used.
        by_episode: cut where episodes start, so that a sequence holds one episode (or a part of
            one, no longer than ``seq_len``).
        networks: module or modules that run on the minibatches: the actor and the critic, or both
            in sequence. Their states are then checked to be there.
        refresh: run ``networks`` over the whole rollout after each epoch but the last, and store
            the states that the weights of the time give. Otherwise sequences start from those that
            were collected.
        normalize_advantage: bring the advantages of each minibatch to mean 0 and deviation 1, over
            its unmasked steps. (The losses' own option counts masked steps in.)
        advantage_key: where advantages are.
        init_key: key of the marks.
        generator: of the draws; by default torch's.

    Raises:
        ValueError: if a number is out of range or ``minibatch_steps`` would cut a sequence, or if
            ``refresh`` is asked for without ``networks``.

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
        for name in ("minibatch_steps", "seq_len", "epochs"):
            _check_positive(name, locals()[name], optional=name != "epochs")
        self.minibatch_steps = minibatch_steps
        self.seq_len = seq_len
        self.epochs = epochs
        self.by_episode = by_episode
        self.networks = _as_list(networks)
        self.refresh = refresh
        self.normalize_advantage = normalize_advantage
        self.advantage_key = unravel_key(advantage_key)
        self.init_key = unravel_key(init_key)
        self.generator = generator
        self.recurrent = [one for network in self.networks for one in find_recurrent(network)]
        if refresh:
            self._check_refresh()
        if seq_len is not None and not by_episode:
            self._check_whole(seq_len)

    def _check_refresh(self) -> None:
        if not self.recurrent:
            raise ValueError(
                "refresh=True needs networks= with a recurrent module inside, to run over the "
                f"rollout. Got networks={self.networks}."
            )
        for one in self.recurrent:
            refuse_unknown_states(one, "refresh=True")

    def _check_whole(self, seq_len: int) -> None:
        if self.minibatch_steps is not None and self.minibatch_steps % seq_len:
            raise ValueError(
                f"minibatch_steps={self.minibatch_steps} would cut through a sequence of {seq_len} "
                "steps. Expected a multiple of seq_len: "
                f"{max(1, round(self.minibatch_steps / seq_len)) * seq_len} is the nearest."
            )

    def __call__(self, rollout: TensorDictBase) -> Iterator[TensorDictBase]:
        """Check a rollout, then yield its minibatches.

        Args:
            rollout: ``[*, T]``, time last, as a collector gives it, with advantages if the loss is
                to use them. It is left as it was.

        Yields:
            ``[sequences, seq_len]`` TensorDicts, each sequence in its own row.

        Raises:
            KeyError: if marks, advantages that are to be normalised or the states of ``networks``
                are missing.
            TypeError: if the marks or the mask are not bool.
            ValueError: if there are no steps or no unmasked ones, if time is not contiguous, or if
                an unmasked reward, advantage or value target is not finite.
        """
        # Errors are raised at the call, not at the first minibatch.
        return self._minibatches(*self._prepare(rollout))

    def _prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, Tensor, Tensor | None]:
        refuse_emptiness(rollout, "SequenceMinibatches")
        starts = find_segment_starts(rollout, self.init_key)
        check_contiguous_time(rollout, self.init_key, starts)
        mask = read_mask(rollout, "a loss")
        for one in self.recurrent:
            refuse_lost_memory(rollout, one, "the minibatches")
        if self.normalize_advantage and rollout.get(self.advantage_key, None) is None:
            raise KeyError(
                f"There is no {self.advantage_key!r} in the rollout to normalise. Work it out "
                "first, over the whole rollout: recurrent_loss(GAE(...))(rollout)."
            )
        for key in (("next", "reward"), self.advantage_key, "value_target"):
            refuse_not_finite(rollout, key, mask)
        steps = rollout.shape[-1]
        marks = starts.flatten(rollout.ndim).any(-1).reshape(-1, steps)
        rows = rollout.reshape(-1, steps) if rollout.ndim != 2 else rollout
        return rows, marks, None if mask is None else mask.reshape(-1, steps)

    def _minibatches(
        self, rows: TensorDictBase, marks: Tensor, mask: Tensor | None
    ) -> Iterator[TensorDictBase]:
        sequences = self._cut(marks, mask)
        for epoch in range(self.epochs):
            if epoch and self.refresh:
                rows = self._refresh(rows)
            for chosen in self._draw(sequences):
                yield self._gather(rows, chosen, mask)

    def _cut(self, marks: Tensor, mask: Tensor | None) -> Sequences:
        """Find the sequences of ``marks`` ``[B, T]``; those wholly masked are left out."""
        steps = marks.shape[1]
        cuts = marks.clone() if self.by_episode else torch.zeros_like(marks)
        cuts[:, 0] = True
        where = torch.arange(steps, device=marks.device)
        if self.seq_len is not None:
            # Counted from the start of the row, or of the episode.
            origin = torch.where(cuts, where, 0).cummax(1).values
            cuts |= (where - origin) % self.seq_len == 0
        row, first = cuts.nonzero(as_tuple=True)
        flat = row * steps + first
        length = torch.diff(flat, append=flat.new_tensor([marks.numel()]))
        if mask is None:
            return Sequences(row, first, length)
        # Unmasked steps before each sequence and before its end.
        seen = nn.functional.pad(mask.flatten().long().cumsum(0), (1, 0))
        return Sequences(row, first, length)[seen[flat + length] > seen[flat]]

    def _draw(self, sequences: Sequences) -> Iterator[Sequences]:
        count = len(sequences.row)
        order = torch.randperm(count, generator=self.generator).to(sequences.row.device)
        if self.minibatch_steps is None:
            yield sequences[order]
            return
        # Sequences go together until minibatch_steps is reached.
        lengths = sequences.length[order].tolist()
        begin = steps = 0
        for i, length in enumerate(lengths):
            steps += length
            if steps >= self.minibatch_steps or i == count - 1:
                yield sequences[order[begin : i + 1]]
                begin, steps = i + 1, 0

    def _gather(
        self, rows: TensorDictBase, chosen: Sequences, mask: Tensor | None
    ) -> TensorDictBase:
        longest = int(chosen.length.max())
        ahead = torch.arange(longest, device=chosen.row.device)
        valid = ahead < chosen.length.unsqueeze(-1)
        step = chosen.first.unsqueeze(-1) + ahead.minimum(chosen.length.unsqueeze(-1) - 1)
        batch: Any = rows[chosen.row.unsqueeze(-1), step]
        if mask is not None:
            valid &= mask[chosen.row.unsqueeze(-1), step]
        if mask is not None or not valid.all():
            batch.set(MASK_KEY, valid)
            _mark_filling(batch, self.init_key, chosen.length)
        if self.normalize_advantage:
            advantage = batch.get(self.advantage_key)
            batch.set(self.advantage_key, normalize(advantage, valid))
        return batch

    @torch.no_grad()
    def _refresh(self, rows: TensorDictBase) -> TensorDictBase:
        """Return the rollout with the states that the networks' weights give now."""
        fresh = rows.copy()
        with set_recurrent_mode(True):
            for network in self.networks:
                out = rows.copy()
                network(out)
                for one in find_recurrent(network):
                    _store(fresh, out, one)
        return fresh


def normalize(advantage: Tensor, valid: Tensor) -> Tensor:
    """Bring advantages to mean 0 and deviation 1 over the unmasked steps; others become 0.

    Args:
        advantage: ``[*batch, ...]``.
        valid: bool ``[*batch]``, where a step counts.

    Returns:
        Of the same shape. A single step is left as it is: it has no deviation.

    Examples:
        >>> normalize(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    valid = valid.reshape(*valid.shape, *[1] * (advantage.ndim - valid.ndim)).expand_as(advantage)
    chosen = advantage[valid]
    if chosen.numel() > 1:
        # As small as it can be without a division by zero: equal advantages become 0.
        advantage = (advantage - chosen.mean()) / (chosen.std() + 1e-8)
    return torch.where(valid, advantage, 0)


def _store(fresh: TensorDictBase, out: TensorDictBase, recurrent: Recurrent) -> None:
    """Carry each state that was written after a step to the next step, where no segment starts."""
    marks = find_segment_starts(fresh, recurrent.init_key).squeeze(-1)
    for key in recurrent.state_keys:
        after = out.get(next_key(key))
        stored = fresh.get(key, None)
        stored = torch.zeros_like(after) if stored is None else stored
        before = torch.cat([stored[:, :1], after[:, :-1]], 1)
        keep = marks.reshape(*marks.shape, *[1] * (stored.ndim - marks.ndim))
        fresh.set(key, torch.where(keep, stored, before))
        fresh.set(next_key(key), after)


def _mark_filling(batch: TensorDictBase, init_key: NestedKey, length: Tensor) -> None:
    """Mark every copy of a step as a start, so that it gives what the step itself gave.

    Figures that losses report without a look at the mask (ratios, ESS) then stay right.
    """
    marks = batch.get(init_key).clone()
    ahead = torch.arange(marks.shape[1], device=marks.device)
    filling = ahead >= length.unsqueeze(-1)
    marks |= filling.reshape(*filling.shape, *[1] * (marks.ndim - 2))
    batch.set(init_key, marks)


def _check_positive(name: str, value: Any, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1. Got {value!r}.")


def _as_list(networks: nn.Module | list[nn.Module] | None) -> list[nn.Module]:
    if networks is None:
        return []
    return [networks] if isinstance(networks, nn.Module) else list(networks)
