from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from rnnkeys.collectors import LocalActors
from rnnkeys.collectors.base import draw_seed
from tests.support.actors import actor_of, assert_continues, make_parts, make_policy, version_of


def test_local_actors_collect_with_the_current_weights() -> None:
    policy = make_policy()
    make_env, make_actor_policy = make_parts(policy)
    with LocalActors(make_env, make_actor_policy, frames_per_batch=16) as actors:
        first, second = actors.next(), actors.next()
        assert first.shape == (2, 8) and actor_of(first) == 0 and version_of(second) == 0
        assert_continues(first, second)
        for parameter in policy.parameters():
            nn.init.zeros_(parameter)
        actors.update_policy(make_actor_policy(0))
        third = actors.next()
        assert not third["action_value"].any() and version_of(third) == 1
        assert actors.num_trajectories == third["collector", "traj_ids"].max() + 1


def test_local_actors_update_policy_copies_weights_of_another_module() -> None:
    policy, other = make_policy(), make_policy()
    make_env, _ = make_parts(policy)
    with LocalActors(make_env, policy, frames_per_batch=16) as actors:
        weights: Any = TensorDict.from_module(other)
        actors.update_policy(weights.data)
    for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


def test_local_actors_update_policy_with_another_structure_raises() -> None:
    make_env, make_actor_policy = make_parts(policy := make_policy())
    with LocalActors(make_env, make_actor_policy, frames_per_batch=16) as actors:
        with pytest.raises(
            ValueError, match="exploration included. Missing: .*module.*; unknown: "
        ):
            actors.update_policy(policy)
        assert actors.policy_version == 0


def test_local_actors_leave_the_random_numbers_of_the_learner_alone() -> None:
    policy = make_policy()
    make_env, _ = make_parts(policy)
    before = torch.get_rng_state()
    actors = LocalActors(make_env, policy, frames_per_batch=16)
    assert torch.equal(torch.get_rng_state(), before)
    actors.close()
    actors.close()


def test_local_actors_of_equal_seed_collect_equal_batches() -> None:
    policy = make_policy()
    make_env, _ = make_parts(policy)
    batches = []
    for seed in (3, 3, 4):
        with LocalActors(make_env, policy, frames_per_batch=16, seed=seed) as actors:
            batches.append(actors.next()["observation"])
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_local_actors_make_the_policy_of_the_first_actor() -> None:
    make_env, make_actor_policy = make_parts(make_policy())
    made = []

    def make_and_note(actor: int) -> Any:
        made.append(actor)
        return make_actor_policy(actor)

    with LocalActors(make_env, make_and_note, frames_per_batch=16):
        assert made == [0]


def test_local_actors_close_the_environment() -> None:
    policy, made = make_policy(), []
    make_env, _ = make_parts(policy)

    def make_and_keep() -> Any:
        made.append(make_env())
        return made[0]

    # Held, since actors that nobody holds close as well.
    actors = LocalActors(make_and_keep, policy, frames_per_batch=16)
    actors.close()
    assert made[0].is_closed


def test_draw_seed_is_in_its_range_and_differs_between_actors_and_restarts() -> None:
    seeds = {draw_seed(seed, a, r) for seed in range(3) for a in range(10) for r in range(3)}
    assert len(seeds) == 90 and 2**30 <= min(seeds) and max(seeds) < 2**31
