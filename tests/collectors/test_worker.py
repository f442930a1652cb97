"""A learner on another device than its actors."""

from __future__ import annotations

import multiprocessing
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from rnnkeys.collectors import ProcessActors
from rnnkeys.collectors.worker import Plan, dumps
from tests.support.actors import PATIENCE, make_parts, make_policy, version_of
from tests.support.other_device import to_other_device


def test_dumps_of_a_module_on_another_device_arrives_on_the_cpu() -> None:
    policy: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    policy.device = torch.device("meta")
    policy.again = policy[0].weight
    values = deepcopy(policy.state_dict())
    to_other_device(policy)
    policy.again = policy[0].weight
    with pytest.raises(RuntimeError, match="was pickled"):
        pickle.dumps(policy)
    policy = pickle.loads(dumps(Plan(lambda: policy, lambda _: policy, 1))).make_env()
    for name, value in policy.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, values[name])
    assert isinstance(policy[0].weight, nn.Parameter) and policy.again is policy[0].weight
    assert policy.device == torch.device("cpu")


def test_actors_on_the_cpu_serve_a_learner_on_another_device() -> None:
    policy = make_policy()
    to_other_device(policy)
    make_env, make_actor_policy = make_parts(policy)
    options: dict[str, Any] = {"num_actors": 1, "frames_per_batch": 8, "timeout": PATIENCE}
    with ProcessActors(make_env, make_actor_policy, **options) as actors:
        # A process that is no daemon would keep the learner from ending.
        assert [child.daemon for child in multiprocessing.active_children()] == [True]
        batch = actors.next()
        assert batch["action_value"].any() and batch["action_value"].device.type == "cpu"
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.zero_()
        actors.update_policy(make_actor_policy(0))
        while version_of(batch) == 0:
            batch = actors.next()
        assert not batch["action_value"].any()
