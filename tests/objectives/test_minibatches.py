"""Minibatches of whole sequences: every step once, in order, from its stored state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchrl.modules
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from rnnkeys.checks import set_value_checks
from rnnkeys.modules import RecurrentNetwork
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from rnnkeys.sequences.checked import is_checked
from tests.support.policy_gradients import Agent, collect, make_agent, move
from tests.support.recurrent import by_hand
from tests.support.tolerances import assert_equal

MASK = ("collector", "mask")


def make_rollout(rows: int = 3, steps: int = 10, resets: float = 0.2) -> TensorDict:
    """Make numbered steps; ``h`` contains the number of each."""
    number = torch.arange(rows * steps).reshape(rows, steps)
    return TensorDict(
        {
            "number": number,
            "is_init": torch.rand(rows, steps, 1) < resets,
            "h": number.float().unsqueeze(-1),
            "advantage": torch.randn(rows, steps, 1),
            "next": {"reward": torch.randn(rows, steps, 1)},
        },
        [rows, steps],
    )


def unmasked(batch: TensorDictBase) -> torch.Tensor:
    return batch.get(MASK, torch.ones(batch.shape, dtype=torch.bool))


@given(
    rows=st.integers(1, 4),
    steps=st.integers(1, 9),
    seq_len=st.one_of(st.none(), st.integers(1, 10)),
    by_episode=st.booleans(),
    some=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_minibatches_contain_every_step_once_and_in_order(
    rows: int, steps: int, seq_len: int | None, by_episode: bool, some: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rollout = make_rollout(rows, steps)
    before = rollout.clone()
    wanted = some * (seq_len or steps)
    minibatches = SequenceMinibatches(wanted, seq_len, by_episode=by_episode)
    seen = []
    for batch in minibatches(rollout):
        valid = unmasked(batch)
        for row, mask in zip(batch["number"], valid, strict=True):
            check_run(row[mask], before, seq_len, by_episode)
            assert torch.equal(row[mask], row[: int(mask.sum())])
        assert torch.equal(batch["h"].squeeze(-1).long(), batch["number"])
        seen += batch["number"][valid].tolist()
    assert sorted(seen) == list(range(rows * steps))
    assert (rollout == before).all()


def check_run(
    run: torch.Tensor, rollout: TensorDictBase, seq_len: int | None, by_episode: bool
) -> None:
    """Consecutive steps of one row, no longer than wanted, and of one episode if wanted."""
    steps = rollout.shape[1]
    assert (run.diff() == 1).all() and (run // steps == run[0] // steps).all()
    assert seq_len is None or len(run) <= seq_len
    is_init = rollout["is_init"].flatten()
    if by_episode:
        assert not is_init[run[1:]].any()
    elif seq_len is not None:
        assert run[0] % steps % seq_len == 0


def test_minibatches_have_the_size_asked_for() -> None:
    rollout = make_rollout(4, 12)
    shapes = [tuple(b.shape) for b in SequenceMinibatches(24, 6)(rollout)]
    assert shapes == [(4, 6), (4, 6)]
    shapes = [tuple(b.shape) for b in SequenceMinibatches(36, 12)(rollout)]
    assert shapes == [(3, 12), (1, 12)]
    assert all(MASK not in b for b in SequenceMinibatches(24, 6)(rollout))


def test_minibatches_add_episodes_up_to_the_size() -> None:
    rollout = make_rollout(4, 30)
    sizes = [int(unmasked(b).sum()) for b in SequenceMinibatches(40, by_episode=True)(rollout)]
    assert len(sizes) >= 2 and all(size >= 40 for size in sizes[:-1]) and sum(sizes) == 120


def test_minibatches_differ_between_epochs_and_repeat_with_a_generator() -> None:
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        minibatches = SequenceMinibatches(4, 2, epochs=3, generator=generator)
        return [b["number"][:, 0].tolist() for b in minibatches(make_rollout(4, 8))]

    first = draw(0)
    assert len(first) == 3 * 8 and first == draw(0) != draw(1)
    epochs = [first[:8], first[8:16], first[16:]]
    assert epochs[0] != epochs[1]
    assert all(sorted(sum(e, [])) == sorted(sum(epochs[0], [])) for e in epochs)


def test_minibatches_accept_any_batch_dimensions() -> None:
    rollout = make_rollout(4, 6)
    flat: Any = rollout.reshape(-1)
    assert [tuple(b.shape) for b in SequenceMinibatches(seq_len=6)(flat)] == [(4, 6)]
    deep: Any = rollout.reshape(2, 2, 6)
    [batch] = SequenceMinibatches()(deep)
    assert sorted(batch["number"].flatten().tolist()) == list(range(24))


def test_minibatches_normalise_advantages_over_valid_steps() -> None:
    rollout = make_rollout(3, 10)
    rollout[MASK] = torch.rand(3, 10) < 0.6
    rollout["advantage"][~rollout[MASK]] = float("inf")
    minibatches = SequenceMinibatches(8, 4, normalize_advantage=True)
    for batch in minibatches(rollout):
        chosen = batch["advantage"].squeeze(-1)[batch[MASK]]
        if len(chosen) < 2:
            continue
        torch.testing.assert_close(chosen.mean(), torch.zeros(()), rtol=0, atol=1e-5)
        torch.testing.assert_close(chosen.std(), torch.ones(()), rtol=1e-4, atol=0)
        assert not batch["advantage"].squeeze(-1)[~batch[MASK]].any()


def test_minibatches_keep_the_mask_and_drop_sequences_of_padding() -> None:
    rollout = make_rollout(2, 8)
    rollout[MASK] = torch.ones(2, 8, dtype=torch.bool)
    rollout[MASK][0, 4:] = False
    rollout[MASK][1, 5] = False
    [batch] = SequenceMinibatches(seq_len=4)(rollout)
    assert batch.shape == (3, 4)
    assert sorted(batch["number"][batch[MASK]].tolist()) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 14, 15]


def test_minibatches_without_refresh_keep_the_states_in_every_epoch() -> None:
    agent = make_agent()
    data = collect(agent)
    data["row"] = torch.arange(3).unsqueeze(-1).expand(3, 24)
    data["step"] = torch.arange(24).expand(3, 24)
    minibatches = SequenceMinibatches(seq_len=4, epochs=2, networks=agent.both)
    first, second = move_after_the_first(minibatches(data), agent)
    for key in ("actor_h", "value_h"):
        assert torch.equal(in_order(first, key), in_order(second, key))


def test_minibatches_refresh_states_between_epochs() -> None:
    agent = make_agent(cell="lstm")
    data = collect(agent)
    data["row"] = torch.arange(3).unsqueeze(-1).expand(3, 24)
    data["step"] = torch.arange(24).expand(3, 24)
    stored = data.clone()
    minibatches = SequenceMinibatches(seq_len=4, epochs=2, networks=agent.both, refresh=True)
    collected, refreshed = move_after_the_first(minibatches(data), agent)
    assert collected.shape == refreshed.shape == (18, 4)
    assert (data == stored).all()
    for layer in (agent.actor[0][0], agent.critic[0]):
        for key in layer.state_keys:
            now = by_hand(layer, data)["next", key]
            starts = data["is_init"].clone()
            starts[:, 0] = True
            carried = torch.cat([data[key][:, :1], now[:, :-1]], 1)
            truth = torch.where(starts.unsqueeze(-1), data[key], carried)
            assert_equal(in_order(collected, key), data[key], torch.float32)
            assert_equal(in_order(refreshed, key), truth, torch.float32)
            assert_equal(in_order(refreshed, ("next", key)), now, torch.float32)


def move_after_the_first(batches: Iterator[Any], agent: Agent) -> list[TensorDictBase]:
    first = next(batches)
    move(agent)
    return [first, *batches]


def in_order(batch: TensorDictBase, key: Any) -> torch.Tensor:
    """Put the sequences of a minibatch back in the rollout's order, ``[3, 24, ...]``."""
    place = batch["row"] * 24 + batch["step"]
    value = batch.get(key).flatten(0, 1)
    return value[place.flatten().argsort()].unflatten(0, (3, 24))


def test_minibatches_with_ppo_lower_the_objective() -> None:
    """A few epochs of PPO lower its own objective, with every option on."""
    agent = make_agent(cell="lstm")
    data = collect(agent, steps=32)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic, entropy_bonus=False))
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    minibatches = SequenceMinibatches(
        48, 8, epochs=16, networks=agent.both, refresh=True, normalize_advantage=True
    )
    losses = []
    for batch in minibatches(data):
        out = loss(batch)
        total = out["loss_objective"] + out["loss_critic"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert len(losses) == 32
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minibatch_steps": 10, "seq_len": 4}, "minibatch_steps=10 would cut through a sequence"),
        ({"seq_len": 0}, "seq_len must be an int of at least 1. Got seq_len=0"),
        (
            {"minibatch_steps": -1},
            "at least 1. Got minibatch_steps=-1",
        ),
        ({"epochs": 0}, "epochs must be an int of at least 1. Got epochs=0"),
        ({"seq_len": 2.0}, "seq_len must be an int of at least 1. Got seq_len=2.0"),
        ({"refresh": True}, "refresh=True needs networks="),
    ],
)
def test_minibatches_invalid_argument_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceMinibatches(**arguments)


def test_minibatches_refresh_without_next_states_raises() -> None:
    theirs = torchrl.modules.GRUModule(3, 5, in_key="observation", out_key="embed")
    with pytest.raises(ValueError, match="torchrl's GRUModule writes zeros"):
        SequenceMinibatches(networks=theirs, refresh=True)


@pytest.mark.parametrize("key", [("next", "reward"), "advantage", "value_target"])
def test_minibatches_entry_not_finite_raises(key: Any) -> None:
    rollout = make_rollout()
    rollout["value_target"] = torch.randn(3, 10, 1)
    rollout.get(key)[1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"not finite at 1 of 30 valid steps, first at \[1, 4\]"):
        SequenceMinibatches()(rollout)
    rollout[MASK] = torch.ones(3, 10, dtype=torch.bool)
    rollout[MASK][1, 4] = False
    assert len(list(SequenceMinibatches()(rollout))) == 1


def test_minibatches_invalid_rollout_raises() -> None:
    rollout = make_rollout()
    empty: Any = rollout[:, :0]
    with pytest.raises(ValueError, match=r"one step. Got batch size \[3, 0\].*\[no-steps\]"):
        SequenceMinibatches()(empty)
    with pytest.raises(KeyError, match=r"The init key 'is_init'.* is missing.*\[init-key\]"):
        SequenceMinibatches()(rollout.exclude("is_init"))
    with pytest.raises(KeyError, match="the rollout has no 'advantage'"):
        SequenceMinibatches(normalize_advantage=True)(rollout.exclude("advantage"))
    with pytest.raises(ValueError, match=r"is False everywhere.*\[mask-empty\]"):
        SequenceMinibatches()(rollout.set(MASK, torch.zeros(3, 10, dtype=torch.bool)))
    rows: Any = list(rollout)
    with pytest.raises(TypeError, match="SequenceMinibatches expects a TensorDict. Got list"):
        SequenceMinibatches()(rows)


def test_minibatches_rollout_without_order_or_states_raises() -> None:
    agent = make_agent()
    data = collect(agent)
    shuffled: Any = data.reshape(-1)[torch.randperm(data.numel())]
    with pytest.raises(ValueError, match=r"Time is not contiguous.*\[continuity\]"):
        SequenceMinibatches()(shuffled)
    with pytest.raises(
        KeyError,
        match=r"from zeros.*value_h.*\[state-missing\]",
    ):
        SequenceMinibatches(networks=agent.both)(data.exclude("value_h"))


def test_minibatches_of_known_networks_are_checked_once() -> None:
    """The rollout is checked, so a wired loss does not read the states of its minibatches again."""
    agent = make_agent()
    data = collect(agent)
    states = RecurrentNetwork(agent.both).state_keys
    for networks, checked in ((agent.both, True), (agent.both[0], False), (None, False)):
        [batch] = SequenceMinibatches(networks=networks)(data)
        assert is_checked(batch, states) == checked
        assert not is_checked(batch.clone(), states)
    with set_value_checks(False):
        [batch] = SequenceMinibatches(networks=agent.both)(data)
    assert not is_checked(batch, states)
