"""Why does my recurrent policy not learn? REINFORCE with a GRU of two layers, right and wrong.

    python tutorials/recurrent_reinforce.py                          # learns CartPole-v1
    python tutorials/recurrent_reinforce.py --broken                 # the mistake: does not
    python tutorials/recurrent_reinforce.py --observation positions  # without velocities
    python tutorials/recurrent_reinforce.py --observation positions --memoryless   # cannot

Every round plays one episode in each of ``--num-envs`` environments, works out how much better each
step went than expected, and makes the actions of good steps more likely: one gradient step on
whole episodes, side by side. ``--broken`` does the same on single steps, each from a zero state,
although they were played with the memory of all steps before.
``docs/why_my_rnn_does_not_learn.md`` explains.

A run leaves learning_curve.csv, learning_curve.png and result.json in its --output folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from command_line import StopOnInterrupt, add_options, check_ranges, option
from environments import make_env
from evaluation import Evaluation
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor
from torchrl.objectives import ReinforceLoss
from torchrl.objectives.value import TD1Estimator
from tqdm import tqdm

from rnnkeys import GRUModule, get_env_transforms_from_module
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

ENV = "CartPole-v1"
SIZES = {"all": 4, "positions": 2}
WINDOW = 100  # episodes whose mean return tells how good the policy is
TEST_EPISODES = 20
TEST_SEED = 200_000_000


@dataclass
class Settings:
    """What a run can be told; each entry is an option of the command line."""

    observation: str = option("all", "what the policy sees of the state", list(SIZES))
    broken: bool = option(False, "learn from single steps with a zero state: the mistake")
    memoryless: bool = option(False, "a linear layer in place of the GRU")
    episodes: int = option(4_000, "episodes to learn from, at most")
    target: float = option(475.0, "stop when the last 100 episodes reach this mean return")
    seed: int = option(0, "start of all random numbers", least=0)
    output: str = option("runs/recurrent_reinforce", "folder for all that the run leaves")
    num_envs: int = option(16, "episodes in a round, played side by side")
    hidden_size: int = option(64, "size of both layers of the GRU")
    gamma: float = option(0.99, "discount")
    learning_rate: float = option(5e-3, "Adam's")
    max_grad_norm: float = option(0.5, "longer gradients are cut to this length")
    threads: int = option(1, "CPU threads of torch")


def make_networks(settings: Settings) -> tuple[Any, TensorDictSequential]:
    """Make the policy, and the critic that says what return to expect: each has its own memory."""
    memory = make_memory(settings, "policy")
    head = TensorDictModule(nn.Linear(settings.hidden_size, 2), ["policy"], ["logits"])
    policy = ProbabilisticActor(
        TensorDictSequential(memory, head), in_keys=["logits"], distribution_class=OneHotCategorical
    )
    value = TensorDictModule(nn.Linear(settings.hidden_size, 1), ["critic"], ["state_value"])
    return policy, TensorDictSequential(make_memory(settings, "critic"), value)


def make_memory(settings: Settings, name: str) -> TensorDictModuleBase:
    """Make two layers that remember or, for comparison, two that cannot."""
    size, hidden = SIZES[settings.observation], settings.hidden_size
    if settings.memoryless:
        layers = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, hidden))
        return TensorDictModule(nn.Sequential(layers, nn.Tanh()), ["observation"], [name])
    return GRUModule(
        input_size=size,
        hidden_size=hidden,
        num_layers=2,
        in_keys=["observation", f"{name}_state"],
        out_keys=[name, ("next", f"{name}_state")],
    )


class Learner:
    """Policy, critic, loss and optimiser."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.policy, self.critic = make_networks(settings)
        # What plays: all that remembers, so that the critic's states are stored with each step too.
        self.both = TensorDictSequential(self.policy, self.critic[0])
        loss = ReinforceLoss(self.policy, self.critic)
        # TD(1): the advantage of a step is the return that came after it, minus the critic's guess.
        estimator = TD1Estimator(gamma=settings.gamma, value_network=self.critic)
        # These two calls are all that memory asks of the losses.
        self.loss = loss if settings.memoryless else recurrent_loss(loss)
        self.advantage = estimator if settings.memoryless else recurrent_loss(estimator)
        self.minibatches = SequenceMinibatches(normalize_advantage=True)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), settings.learning_rate)

    def learn(self, episodes: TensorDictBase) -> None:
        """Take one gradient step on episodes ``[num_envs, T]``."""
        self.advantage(episodes)
        [batch] = self.minibatches(episodes)
        if self.settings.broken:
            batch = as_single_steps(batch)
        out = self.loss(batch)
        self.optimizer.zero_grad()
        (out["loss_actor"] + out["loss_value"]).backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()


def as_single_steps(batch: TensorDictBase) -> TensorDictBase:
    """Make the mistake: a batch of steps ``[N, 1]``, none of which knows what came before it."""
    steps = batch.reshape(-1, 1)
    for key in ("policy_state", "critic_state"):
        steps[key] = torch.zeros_like(steps[key])
    steps["is_init"] = torch.ones_like(steps["is_init"])
    return steps


@torch.no_grad()
@set_exploration_type(ExplorationType.RANDOM)
def play(env: TransformedEnv, policy: TensorDictModuleBase) -> tuple[TensorDictBase, Tensor]:
    """Play one episode in each environment, side by side.

    Returns:
        The episodes, ``[num_envs, T]``, with a mask over what was played after the end of an
        episode while others still went on; and their returns, ``[num_envs]``.
    """
    step = env.reset()
    running = torch.ones(step.shape, dtype=torch.bool)
    steps, masks = [], []
    while running.any():
        done_step, step = env.step_and_maybe_reset(policy(step))
        steps.append(done_step)
        masks.append(running)
        running = running & ~done_step["next", "done"].squeeze(-1)
    episodes: Any = torch.stack(steps, 1)
    mask = torch.stack(masks, 1)
    episodes["collector"] = TensorDict(mask=mask, batch_size=mask.shape)
    return episodes, (episodes["next", "reward"].squeeze(-1) * mask).sum(1)


class Records:
    """The return of every episode, and the files that tell of them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.returns: list[float] = []
        self.seconds: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, returns: Tensor, seconds: float) -> None:
        self.returns += returns.tolist()
        self.seconds += [seconds] * len(returns)

    def recent(self, end: int | None = None) -> float:
        last = self.returns[:end][-WINDOW:]
        return sum(last) / len(last) if last else 0.0

    def write(self, test: Tensor) -> None:
        with (self.folder / "learning_curve.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["episode", "seconds", "return", f"mean_of_last_{WINDOW}"])
            for i, (seconds, value) in enumerate(zip(self.seconds, self.returns, strict=True), 1):
                writer.writerow([i, round(seconds, 2), value, round(self.recent(i), 2)])
        result = {
            "episodes": len(self.returns),
            "steps": int(sum(self.returns)),
            "seconds": round(self.seconds[-1], 1),
            "last_100": self.recent(),
            "test_returns": test.tolist(),
            "settings": asdict(self.settings),
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        self.draw()

    def draw(self) -> None:
        count = range(1, len(self.returns) + 1)
        fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        ax.plot(count, self.returns, ".", ms=2, color="tab:gray", label="an episode")
        ax.plot(count, [self.recent(i) for i in count], label=f"mean of the last {WINDOW}")
        ax.axhline(self.settings.target, color="tab:green", ls="--", lw=1)
        ax.set(xlabel="episodes", ylabel="return", ylim=(0, 515))
        ax.legend(loc="best", fontsize="small")
        ax.grid(alpha=0.3)
        fig.savefig(self.folder / "learning_curve.png", dpi=120)
        plt.close(fig)


def train(settings: Settings, records: Records, stop: StopOnInterrupt) -> Learner:
    """Play and learn until the target is reached, the episodes are used up, or Ctrl-C."""
    torch.manual_seed(settings.seed)
    learner = Learner(settings)
    env = make_env(ENV, settings.observation, settings.num_envs)
    env.append_transform(get_env_transforms_from_module(learner.both))
    env.set_seed(settings.seed)
    start = time.perf_counter()
    with tqdm(total=settings.episodes, unit=" episodes") as bar:
        while len(records.returns) < settings.episodes and not stop.asked:
            episodes, returns = play(env, learner.both)
            records.add(returns, time.perf_counter() - start)
            bar.update(len(returns))
            bar.set_postfix_str(f"mean of the last {WINDOW}: {records.recent():.0f}")
            if len(records.returns) >= WINDOW and records.recent() >= settings.target:
                break
            learner.learn(episodes)
    env.close()
    return learner


def read_settings(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Settings)
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.broken and settings.memoryless:
        parser.error("--broken with --memoryless: without a memory there is none to forget")
    try:
        check_ranges(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    settings = read_settings(argv)
    torch.set_num_threads(settings.threads)
    records = Records(Path(settings.output), settings)
    with StopOnInterrupt() as stop:
        learner = train(settings, records, stop)
    test = Evaluation(make_env(ENV, settings.observation, TEST_EPISODES), learner.policy)
    returns = test(TEST_SEED + settings.seed)
    records.write(returns)
    print(
        f"{len(records.returns)} episodes in {records.seconds[-1]:.0f} s; mean of the last "
        f"{WINDOW}: {records.recent():.1f}; without exploration: {returns.mean():.1f} over "
        f"{TEST_EPISODES} fresh episodes. Picture: {records.folder / 'learning_curve.png'}"
    )


if __name__ == "__main__":
    main()
