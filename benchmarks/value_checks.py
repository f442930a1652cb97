"""Time the checks that read values: gradient steps with and without them, taking turns.

    python -m benchmarks.value_checks                # a minute on one core

The shapes are those of ``tutorials/recurrent_dqn.py`` and ``tutorials/recurrent_ppo.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule
from torchrl.objectives import ClipPPOLoss, DQNLoss, SoftUpdate, ValueEstimators

from rnnkeys import LSTMModule, set_recurrent_mode
from rnnkeys.checks import set_value_checks
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

SIZE, ACTIONS = 2, 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the time of gradient steps with and without the checks."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=60, help="pairs of steps (default: 60)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, step in (("recurrent_dqn", make_dqn()), ("recurrent_ppo", make_ppo())):
        on, off, share = compare(step, options.rounds)
        print(f"{name}: {1e3 * on:.2f} ms with checks, {1e3 * off:.2f} ms without: {share:+.1%}")


def compare(step: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Return the median times with and without checks, and their median relative difference."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 5):
        for checked in (True, False) if number % 2 else (False, True):
            with set_value_checks(checked):
                begin = time.perf_counter()
                step()
                times[checked].append(time.perf_counter() - begin)
    on, off = times[True][5:], times[False][5:]
    share = statistics.median(a / b - 1 for a, b in zip(on, off, strict=True))
    return statistics.median(on), statistics.median(off), share


def make_dqn() -> Callable[[], None]:
    """Make a gradient step of double DQN on sequences ``[32, 64]``."""
    policy = sequential(
        recurrent("lstm", 128),
        TensorDictModule(nn.Linear(128, ACTIONS), ["lstm"], ["action_value"]),
        QValueModule(action_space="one-hot"),
    )
    loss: Any = DQNLoss(policy, action_space="one-hot", delay_value=True, double_dqn=True)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.99, lmbda=0.95)
    loss = recurrent_loss(loss)
    target = SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    batch = collect([policy], 32, 64)

    def step() -> None:
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
        optimizer.step()
        target.step()

    return step


def make_ppo() -> Callable[[], None]:
    """Make the gradient steps of four epochs over a rollout ``[8, 128]``, in minibatches."""
    actor = ProbabilisticActor(
        sequential(
            recurrent("actor", 64), TensorDictModule(nn.Linear(64, ACTIONS), ["actor"], ["logits"])
        ),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    critic = sequential(
        recurrent("critic", 64), TensorDictModule(nn.Linear(64, 1), ["critic"], ["state_value"])
    )
    rollout = collect([actor, critic], 8, 128)
    rollout["advantage"] = torch.randn(8, 128, 1)
    rollout["value_target"] = torch.randn(8, 128, 1)
    networks: list[nn.Module] = [actor, critic]
    minibatches = SequenceMinibatches(
        256, 64, epochs=4, networks=networks, normalize_advantage=True
    )
    loss = recurrent_loss(ClipPPOLoss(actor, critic))
    optimizer = torch.optim.Adam(loss.parameters(), 3e-4)

    def step() -> None:
        for batch in minibatches(rollout):
            out = loss(batch)
            optimizer.zero_grad()
            (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()
            optimizer.step()

    return step


def recurrent(name: str, size: int) -> LSTMModule:
    """Make an LSTM with state keys of its own."""
    states = [f"{name}_h", f"{name}_c"]
    return LSTMModule(
        SIZE,
        size,
        in_keys=["observation", *states],
        out_keys=[name, *(("next", state) for state in states)],
    )


def sequential(*modules: Any) -> Any:
    """Make a sequence of modules."""
    return TensorDictSequential(*modules)


def collect(policies: list[Any], rows: int, steps: int) -> TensorDictBase:
    """Return random sequences ``[rows, steps]`` with the states of the policies."""
    done = torch.rand(rows, steps, 1) < 0.02
    flags = torch.cat([torch.ones(rows, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    batch = TensorDict({"observation": torch.randn(rows, steps, SIZE), "is_init": flags})
    batch.batch_size = torch.Size([rows, steps])
    batch["next"] = TensorDict(
        {
            "observation": torch.randn(rows, steps, SIZE),
            "is_init": torch.zeros_like(flags),
            "reward": torch.randn(rows, steps, 1),
            "done": done,
            "terminated": done.clone(),
        },
        [rows, steps],
    )
    with torch.no_grad(), set_recurrent_mode(True):
        for policy in policies:
            out = policy(batch.clone())
            for key, value in out.items(True, True):
                if key not in batch.keys(True, True):
                    batch.set(key, value)
    following: Any = batch["next"]
    after = [key for key in following.keys() if str(key).endswith(("_h", "_c"))]
    for key in after:
        batch.set(key, shifted(batch["next", key], flags))
    return batch


def shifted(after: Tensor, flags: Tensor) -> Tensor:
    """Return the state before each step."""
    return after.roll(1, 1).masked_fill(flags.unsqueeze(-1), 0)


if __name__ == "__main__":
    main()
