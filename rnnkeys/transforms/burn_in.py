"""Burn-in: the first steps of a sequence only bring its stored state up to date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import next_key
from ..mode import set_recurrent_mode
from ..sequences.segment_starts import read_is_init, set_segment_starts
from .batches import BatchTransform


class BurnIn(BatchTransform):
    """Runs the first steps of every sequence without gradient, and cuts them off.

    What is left, steps ``K`` and on, starts from the state that the modules have *now* after the
    first ``K`` steps from the stored state. A start of an episode inside the burn-in is honoured;
    one at step ``K`` makes what is left start from the state stored there.
    See "Recurrent Experience Replay in Distributed Reinforcement Learning", Kapturowski et al.,
    2019 (https://openreview.net/forum?id=r1lyTjAqYX).

    A call takes rows ``[*, T]`` or flat slices ``[N]``. As a transform of a replay buffer it takes
    what the buffer stores whole (windows); flat slices are marked only after a buffer's transforms
    ran, so call it on the sample. For target networks use :class:`rnnkeys.objectives.R2D2Loss`,
    which burns every network in with its own parameters.

    Args:
        modules: what to run: a network with recurrent modules inside, or a list of networks.
        burn_in: ``K``. 0 changes nothing.
        slice_len: length of flat slices. Without it every marked step of a flat batch is the first
            of a slice: right if no slice goes on into another episode.

    Raises:
        ValueError: if ``burn_in`` is negative, ``slice_len`` is not positive, nothing inside is
            recurrent, or its states are not stored within sequences (``store_states="starts"``).

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> batch = TensorDict(observation=torch.zeros(2, 7, 3), batch_size=[2, 7])
        >>> batch["is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> BurnIn(gru, 4)(batch)["recurrent_state"].shape
        torch.Size([2, 3, 1, 5])
    """

    _purpose = (
        "it cuts sequences. Call it on a batch of them, or append it to a replay buffer of windows "
        "(Windows)."
    )

    def __init__(
        self,
        modules: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        burn_in: int,
        slice_len: int | None = None,
    ) -> None:
        super().__init__()
        check_burn_in(burn_in)
        if slice_len is not None and (not isinstance(slice_len, int) or slice_len < 1):
            raise ValueError(f"slice_len must be a positive int. Got {slice_len!r}.")
        listed = [modules] if isinstance(modules, TensorDictModuleBase) else list(modules)
        # A tuple is no submodule: the transform neither owns nor copies the networks.
        self._networks = tuple(StateKeys(network) for network in listed)
        self.burn_in, self.slice_len = burn_in, slice_len

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the steps that are left, with up-to-date states; the batch stays as it was.

        Args:
            tensordict: ``[*, T]``, or flat slices ``[N]``.

        Returns:
            ``[*, T - K]``; of flat slices those steps that are left, each start marked.

        Raises:
            KeyError: if the marks or an input are missing.
            ValueError: if ``K`` steps or fewer are there, or ``slice_len`` does not divide them.
            RuntimeError: if it runs inside a replay buffer before its sampler's marks are there.
        """
        if self._in_buffer and tensordict.ndim < 2:
            raise RuntimeError(
                "BurnIn runs too early as a transform of this replay buffer: its items are single "
                "steps, and samplers mark the starts of slices after the transforms. Call it on "
                "the batch, batch = burn_in(buffer.sample()), or store windows (Windows)."
            )
        if not self.burn_in:
            return tensordict
        tensordict = set_segment_starts(tensordict, self._init_keys)
        if tensordict.ndim == 1 and self.slice_len is None:
            return self._cut_flat(tensordict)
        if tensordict.ndim == 1:
            if tensordict.shape[0] % cast(int, self.slice_len):
                raise ValueError(
                    f"slice_len={self.slice_len} does not divide a batch of {tensordict.shape[0]} "
                    "steps: these are slices of other lengths. Leave slice_len out, or sample "
                    "with strict_length=True."
                )
            rows = tensordict.reshape(-1, cast(int, self.slice_len))
            left = self._cut_rows(rows)
            for key in self._init_keys:
                marks = left.get(key).clone()
                marks[:, 0] = True
                left.set(key, marks)
            return left.reshape(-1)
        return self._cut_rows(tensordict)

    @property
    def _init_keys(self) -> list[NestedKey]:
        return [key for network in self._networks for key in network.init_keys]

    def _cut_rows(self, rows: TensorDictBase) -> TensorDictBase:
        left = split(rows, self.burn_in)[1]
        for network in self._networks:
            network.burn_in(rows, left, self.burn_in)
        return left

    def _cut_flat(self, flat: TensorDictBase) -> TensorDictBase:
        """Burn in slices of any lengths, laid end to end."""
        starts = torch.zeros(flat.shape, dtype=torch.bool)
        for key in self._init_keys:
            starts |= read_is_init(flat, key).reshape(*flat.shape, -1).any(-1).cpu()
        starts[:1] = True
        first = starts.nonzero().squeeze(-1)
        steps = torch.arange(flat.shape[0])
        position = steps - first[starts.cumsum(0) - 1]
        cut = position == self.burn_in
        if not cut.any():
            longest = int(position.max()) + 1 if len(position) else 0
            _refuse_short(longest, self.burn_in)
        kept = (position >= self.burn_in).to(flat.device or "cpu")
        cut = cut.to(kept.device)
        left = cast(TensorDictBase, flat[kept])
        for network in self._networks:
            network.burn_in_flat(flat, left, kept, cut)
        return left


class StateKeys:
    """A network, and the keys of the recurrent modules inside.

    Args:
        network: recurrent modules inside.
        in_sequences: whether states in the middle of sequences are going to be read.

    Raises:
        ValueError: if nothing is recurrent, or if the states that are read are not stored.
    """

    def __init__(self, network: TensorDictModuleBase, in_sequences: bool = True) -> None:
        # Modules import the primers, which lie beside this file.
        from ..modules.network import find_recurrent

        self.network = network
        found = find_recurrent(network)
        if not found:
            raise ValueError(
                f"There is no recurrent module inside {type(network).__name__}, so there is no "
                "state to burn in. Pass the network that contains it."
            )
        if in_sequences and any(getattr(r.module, "store_states", "all") != "all" for r in found):
            raise ValueError(
                "A recurrent module with store_states='starts' leaves NaN in the middle of "
                "sequences, where the state behind a burn-in or an episode's end is read. Make it "
                "with store_states='all'."
            )
        self.pairs = list(dict.fromkeys((key, r.init_key) for r in found for key in r.state_keys))
        self.states = list(dict.fromkeys(key for r in found for key in r.state_keys))
        self.init_keys = list(dict.fromkeys(r.init_key for r in found))
        inside = set(map(next_key, self.states)) | set(map(next_key, self.init_keys))
        self.inputs = [key for key in network.in_keys if next_key(key) not in inside]

    def run(self, rows: TensorDictBase) -> TensorDictBase:
        """Run the network over sequences, on a shallow copy of what it reads."""
        read = rows.select(*self.inputs, *self.states, *self.init_keys, strict=False)
        with set_recurrent_mode(True):
            return self.network(read)

    @torch.no_grad()
    def burn_in(self, rows: TensorDictBase, left: TensorDictBase, steps: int) -> None:
        """Run the first steps of ``rows [*, T]``; write the states that ``left`` starts from."""
        time = rows.ndim - 1
        # One step more, for the state that follows the first step that is left.
        out = self.run(head(rows, steps + 1))
        for key in self.states:
            after = out.get(next_key(key))
            reset = self._marks_like(left, key, after).select(time, 0)
            entering = after.select(time, steps - 1)
            stored = left.get(key, None)
            if stored is None:
                shape = (*left.batch_size, *entering.shape[time:])
                state = entering.new_zeros(shape)
            else:
                state = stored.clone(memory_format=torch.contiguous_format)
            first = state.select(time, 0)
            state.select(time, 0).copy_(torch.where(reset, first, entering))
            left.set(key, state)
            self._write_next(left, key, after.select(time, steps), time)

    def fresh(self, rows: TensorDictBase, steps: int) -> Tensor:
        """Tell which of the first ``steps`` ``[B, steps]`` follow an episode's start in the row."""
        fresh = torch.ones(1, dtype=torch.bool, device=rows.device)
        for key in self.init_keys:
            marks = read_is_init(rows, key)[:, :steps].flatten(2).cumsum(1) > 0
            fresh = fresh & marks.all(-1)
        return fresh

    @torch.no_grad()
    def rejoin(self, rows: TensorDictBase, left: TensorDictBase, steps: int) -> TensorDictBase:
        """Return all steps, with ``left`` starting anew from its state unless its row is fresh."""
        joined = rows.copy()
        goes_on = ~self.fresh(rows, steps)[:, -1]
        for key in self.states:
            state = left.get(key)
            stored = rows.get(key, None)
            if stored is None:
                stored = state.new_zeros(*rows.shape, *state.shape[2:])
            joined.set(key, torch.cat([stored[:, :steps], state], 1))
        for key in self.init_keys:
            marks = read_is_init(rows, key).clone()
            marks[:, steps] |= goes_on.reshape(-1, *[1] * (marks.ndim - 2))
            joined.set(key, marks)
        return joined

    def _write_next(self, left: TensorDictBase, key: NestedKey, value: Tensor, time: int) -> None:
        """Bring the state after the first step up to date, which losses' next views read."""
        stored = left.get(next_key(key), None)
        if stored is not None:
            stored = stored.clone(memory_format=torch.contiguous_format)
            stored.select(time, 0).copy_(value)
            left.set(next_key(key), stored)

    @torch.no_grad()
    def burn_in_flat(
        self, flat: TensorDictBase, left: TensorDictBase, kept: Tensor, cut: Tensor
    ) -> None:
        """Run slices laid end to end ``[N]``; write the states that what is left starts from."""
        out = self.run(flat)
        at = cut[kept]
        before = cut.roll(-1)
        for key in self.states:
            after = out.get(next_key(key))
            stored = left.get(key, None)
            state = after.new_zeros(left.shape + after.shape[1:]) if stored is None else stored
            state = state.clone()
            # A start at the cut would have made a slice of its own: none is lost here.
            state[at] = after[before]
            left.set(key, state)
            following = left.get(next_key(key), None)
            if following is not None:
                following = following.clone()
                following[at] = after[cut]
                left.set(next_key(key), following)
        for key in self.init_keys:
            marks = left.get(key).clone()
            marks[at] = True
            left.set(key, marks)

    def _marks_like(self, rows: TensorDictBase, key: NestedKey, state: Tensor) -> Tensor:
        """Return the marks that reset a state, with dimensions to select it by."""
        marks = read_is_init(rows, dict(self.pairs)[key])
        return marks.reshape(*marks.shape[:-1], *[1] * (state.ndim - marks.ndim + 1))


def head(rows: TensorDictBase, steps: int) -> TensorDictBase:
    """Return the first steps of ``[*, T]``."""
    return cast(TensorDictBase, rows[(..., slice(None, steps))])


def split(rows: TensorDictBase, burn_in: int) -> tuple[TensorDictBase, TensorDictBase]:
    """Return steps before ``burn_in`` and those after, ``[*, T]``.

    Raises:
        ValueError: if none would be left.
    """
    if rows.shape[-1] <= burn_in:
        _refuse_short(rows.shape[-1], burn_in)
    left = cast(TensorDictBase, rows[(..., slice(burn_in, None))])
    return head(rows, burn_in), left.copy()


def check_burn_in(burn_in: int) -> None:
    """Raise unless it is an int of at least 0."""
    if not isinstance(burn_in, int) or isinstance(burn_in, bool) or burn_in < 0:
        raise ValueError(f"burn_in must be an int, at least 0. Got {burn_in!r}.")


def _refuse_short(steps: int, burn_in: int) -> None:
    raise ValueError(
        f"burn_in={burn_in} leaves nothing of sequences of {steps} steps. It must be shorter than "
        "they are: lower it, or sample longer windows."
    )
