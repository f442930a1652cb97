"""The check of continuity: breaks in time are found, and good data passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torchrl.data import SliceSampler

from rnnkeys.checks import set_value_checks, suspend_value_checks
from rnnkeys.sequences import find_sequence_problems
from tests.support.sequence_data import AGENT_KEY, buffer, collect, with_states

MASK = ("collector", "mask")
STATES = [("h", "is_init")]


def names(batch: TensorDictBase, states: Any = STATES, init_keys: Any = ("is_init",)) -> list[str]:
    return [problem.check for problem in find_sequence_problems(batch, init_keys, states)]


def test_continuity_of_collected_states_finds_nothing() -> None:
    batch = with_states()
    assert not names(batch)
    flat: Any = batch.reshape(-1)
    assert not names(flat)


def test_continuity_of_shuffled_steps_is_seen_by_the_states() -> None:
    torch.manual_seed(0)
    flat: Any = with_states(8, 32).reshape(-1)
    [problem] = find_sequence_problems(flat[torch.randperm(256)], ["is_init"], STATES)
    assert problem.check == "continuity" and "SliceSampler" in problem.remedy


def test_continuity_of_transposed_rows_is_seen_by_the_states() -> None:
    never = torch.zeros(4, 6, dtype=torch.bool)
    batch = with_states(4, 6, never)
    swapped: Any = batch.transpose(0, 1).reshape(-1).reshape(4, 6)
    assert names(swapped) == ["continuity"]


def test_continuity_of_rows_laid_end_to_end_without_flags_is_seen_by_the_states() -> None:
    batch = with_states(4, 6, torch.zeros(4, 6, dtype=torch.bool))
    batch["is_init"][:] = False
    batch["h"] = torch.where(batch["h"] == 0, 0.5, batch["h"])
    batch["collector"] = TensorDict(traj_ids=torch.zeros(4, 6, dtype=torch.long), batch_size=[4, 6])
    assert not names(batch)
    [problem] = find_sequence_problems(batch.reshape(-1), ["is_init"], STATES)
    assert "3 of 23 steps" in problem.message and "first at [6]" in problem.message


def test_continuity_of_slices_from_a_buffer_finds_nothing() -> None:
    data: Any = with_states(1, 60)[0]
    rb = buffer(data, SliceSampler(slice_len=4, end_key=("next", "done")), batch_size=24)
    for _ in range(5):
        assert not names(rb.sample())  # pyright: ignore[reportArgumentType]


def test_continuity_with_next_states_left_out_names_the_remedy() -> None:
    batch = with_states()
    batch["next", "h"] = torch.zeros_like(batch["h"])
    [problem] = find_sequence_problems(batch, ["is_init"], STATES)
    assert problem.check == "continuity"
    assert "zero at every step" in problem.message
    assert "NextStateReconstructor" in problem.remedy and "compact_obs" in problem.remedy


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_continuity_of_recomputed_next_states_finds_nothing(noise: float) -> None:
    batch = with_states()
    batch["next", "h"] += noise * torch.randn_like(batch["h"])
    assert not names(batch)


def test_continuity_of_windows_with_one_state_finds_nothing() -> None:
    batch = with_states(3, 6, torch.zeros(3, 6, dtype=torch.bool))
    for key in ("h", ("next", "h")):
        batch[key] = torch.randn(3, 1, 1, 4).expand(3, 6, 1, 4)
    assert not names(batch)
    assert not names(batch.contiguous())
    assert not names(batch.clone())


@pytest.mark.parametrize(("steps", "checks"), [(4, ["continuity"]), (5, [])])
def test_continuity_of_windows_after_a_burn_in_needs_three_equal_states(
    steps: int, checks: list[str]
) -> None:
    batch = with_states(3, steps, torch.zeros(3, steps, dtype=torch.bool))
    batch["h"][:, 2:] = batch["h"][:, 2:3] + 1
    assert names(batch) == checks


def test_continuity_at_padding_is_not_read() -> None:
    batch = with_states(2, 8, torch.zeros(2, 8, dtype=torch.bool))
    batch["h"][:, 5:] = torch.randn(2, 3, 1, 4)
    assert names(batch) == ["continuity"]
    batch[MASK] = (torch.arange(8) < 5).expand(2, 8)
    assert not names(batch)


def test_continuity_with_agents_that_end_apart_finds_nothing_and_sees_a_break() -> None:
    torch.manual_seed(0)
    flags = torch.rand(2, 8, 3, 1) < 0.3
    after = torch.randn(2, 8, 3, 1, 4)
    before = after.roll(1, 1).masked_fill(flags.unsqueeze(-1), 0)
    agents = TensorDict({"h": before, "fresh": flags}, [2, 8, 3])
    following = TensorDict({"h": after}, [2, 8, 3])
    batch = TensorDict(
        {"agents": agents, "next": TensorDict({"agents": following}, [2, 8])}, [2, 8]
    )
    states = [(("agents", "h"), AGENT_KEY)]
    assert not names(batch, states, [AGENT_KEY])
    step, agent = flags[0, 1:, :, 0].logical_not().nonzero()[0].tolist()
    batch["agents", "h"][0, step + 1, agent] += 1
    assert names(batch, states, [AGENT_KEY]) == ["continuity"]


def test_continuity_with_changing_trajectory_ids_is_seen_without_states() -> None:
    batch = collect(12)
    batch["collector", "traj_ids"] = torch.tensor([1] * 6 + [2] * 6)
    batch["is_init"] = torch.zeros(12, 1, dtype=torch.bool)
    batch = batch.exclude(("next", "done"), "step_count")
    assert names(batch, []) == ["continuity"]
    batch["is_init"][6] = True
    assert not names(batch, [])


def test_continuity_with_step_counts_is_seen_without_ids() -> None:
    batch = collect(20).exclude("collector")
    assert not names(batch, [])
    torch.manual_seed(0)
    assert names(batch[torch.randperm(20)], []) == ["continuity"]


@pytest.mark.parametrize("ids", [False, True])
def test_continuity_with_entries_of_the_environment_called_like_clocks_finds_nothing(
    ids: bool,
) -> None:
    data = collect(20)
    data = data if ids else data.exclude("collector")
    for name in ("step_count", "index"):
        data[name] = torch.randint(0, 50, (20, 1))
        data["next", name] = torch.randint(0, 50, (20, 1))
    assert not names(data, [])


def test_continuity_with_the_index_of_a_storage_of_two_dimensions_reads_the_first() -> None:
    batch = collect(6).exclude("step_count", "collector", ("next", "done"))
    batch["is_init"] = torch.zeros(6, 1, dtype=torch.bool)
    batch["index"] = torch.stack([torch.arange(4, 10), torch.full((6,), 2)], -1)
    assert not names(batch, [])
    batch["index"][3:, 1] = 1
    assert names(batch, []) == ["continuity"]


def test_continuity_with_the_index_of_a_buffer_is_seen_without_anything_else() -> None:
    data = collect().exclude("step_count", "collector", ("next", "done"))
    data["is_init"] = torch.zeros(60, 1, dtype=torch.bool)
    sample: Any = buffer(data, None, batch_size=16).sample()
    [problem] = find_sequence_problems(sample, ["is_init"])
    assert problem.check == "continuity" and "'index'" in problem.message


def test_episode_state_that_was_not_reset_is_found() -> None:
    batch = with_states()
    batch["h"][:, 1:] = batch["next", "h"][:, :-1]
    for data in (batch, batch.reshape(-1)):
        [problem] = find_sequence_problems(data, ["is_init"], STATES)
        assert problem.check == "episode-state" and problem.error is UserWarning


def test_episode_state_of_random_initial_states_is_a_warning_in_rows() -> None:
    batch = with_states()
    batch["h"][batch["is_init"].squeeze(-1)] = torch.randn(4)
    [problem] = find_sequence_problems(batch, ["is_init"], STATES)
    assert problem.check == "episode-state" and problem.error is UserWarning


def test_episode_state_of_slices_that_start_inside_episodes_is_no_problem() -> None:
    """A sampler of slices sets ``done`` and a flag where one slice ends and the next starts."""
    data: Any = with_states(1, 60, (torch.arange(60) % 20 == 19).unsqueeze(0))[0]
    rb = buffer(data, SliceSampler(slice_len=4, end_key=("next", "done")), batch_size=40)
    for _ in range(5):
        sample: Any = rb.sample()
        assert sample["h"][::4].any()
        assert not names(sample)


def test_zero_state_inside_an_episode_is_a_warning() -> None:
    batch = with_states(2, 8, torch.zeros(2, 8, dtype=torch.bool))
    batch["h"][0, :4] = 0
    batch["next", "h"][0, :3] = 0
    batch["h"][0, 4] = batch["next", "h"][0, 3]
    [problem] = find_sequence_problems(batch, ["is_init"], STATES)
    assert problem.check == "zero-state" and problem.error is UserWarning
    assert "init_random_frames" in problem.remedy


def test_value_checks_switched_off_read_no_value() -> None:
    shuffled: Any = with_states(8, 32).reshape(-1)[torch.randperm(256)]
    with set_value_checks(False):
        assert not names(shuffled)
    with suspend_value_checks():
        assert not names(shuffled)
    assert names(shuffled) == ["continuity"]
    set_value_checks(False)
    try:
        assert not names(shuffled)
    finally:
        set_value_checks(True)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda b: b.exclude("is_init"), "init-key"),
        (lambda b: b.set("is_init", torch.zeros(3, 12, 1)), "init-dtype"),
        (lambda b: b.set("is_init", torch.zeros(3, 12, dtype=torch.bool)), "init-shape"),
        (lambda b: b.set(MASK, torch.ones(3, 12)), "mask-dtype"),
        (lambda b: b.set(MASK, torch.ones(3, 12, 2, dtype=torch.bool)), "mask-shape"),
        (lambda b: b.set(MASK, torch.zeros(3, 12, 1, dtype=torch.bool)), "mask-empty"),
        (lambda b: b.set(("next", "done"), torch.zeros(3, 12, 1).byte()), "done-dtype"),
        (lambda b: b.set(("next", "done"), torch.zeros(3, 12).bool()), "done-shape"),
        (lambda b: b.set(("next", "terminated"), NonTensorData("no", [3, 12])), "entry-type"),
        (lambda b: b[:, :0], "no-steps"),
        (lambda b: b[0, 0], "no-time"),
    ],
)
def test_sequence_problems_of_a_bad_entry_name_the_check(change: Any, check: str) -> None:
    assert names(change(with_states())) == [check]


def test_segments_of_one_step_are_a_warning() -> None:
    batch = with_states(2, 6, torch.ones(2, 6, dtype=torch.bool))
    batch["next", "terminated"] = torch.zeros(2, 6, 1, dtype=torch.bool)  # as samplers cut slices
    [problem] = find_sequence_problems(batch, ["is_init"], STATES)
    assert problem.check == "segment-length" and problem.error is UserWarning
    one: Any = batch[:, :1]
    assert not names(one)
    batch["next", "terminated"] = torch.ones(2, 6, 1, dtype=torch.bool)  # episodes of one step
    assert not names(batch)


def test_zero_states_throughout_are_no_problem() -> None:
    batch = with_states(2, 8, torch.zeros(2, 8, dtype=torch.bool))
    batch["h"].zero_()
    batch["next", "h"].zero_()
    assert not names(batch)
