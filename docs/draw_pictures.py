"""Draw the pictures of docs/recurrent_state_lifecycle.md.

    python docs/draw_pictures.py

The first is a drawing; the others show a policy that has learned CartPole without velocities for
two or three minutes on one core.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardScaling, StepCounter, TransformedEnv
from torchrl.modules import EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators

from rnnkeys import (
    LSTMModule,
    get_env_transforms_from_module,
    plot_episode_states,
    plot_state_staleness,
)
from rnnkeys.objectives import recurrent_loss

FOLDER = Path(__file__).parent / "pictures"
WRITE, MOVE, READ = "#cfe8cf", "#e3e3e3", "#cfdcf2"


def draw_lifecycle() -> Figure:
    """Draw where a state is written, moved, reset, stored, sampled and read."""
    figure = Figure(figsize=(11, 6.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 110)
    axes.set_ylim(0, 62)
    axes.axis("off")

    def box(x: float, y: float, text: str, color: str, width: float = 19, height: float = 10):
        axes.text(
            x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, zorder=3
        )
        patch = {"facecolor": color, "edgecolor": "0.35", "linewidth": 1}
        axes.add_patch(_rectangle(x, y, width, height, patch))

    def arrow(start: tuple[float, float], end: tuple[float, float], bend: float = 0):
        style = {
            "arrowstyle": "->",
            "color": "0.3",
            "connectionstyle": f"arc3,rad={bend}",
        }
        axes.annotate("", xy=end, xytext=start, arrowprops=style)

    def title(y: float, text: str):
        axes.text(3, y, text, fontsize=11, weight="bold")

    title(58.5, "Collection: single steps")
    box(3, 42, "reset\nprimer: h = 0\nInitTracker: is_init", WRITE)
    box(31, 42, "policy\nreads h (0 where is_init)\nwrites ('next', h)", READ)
    box(59, 42, "env.step, step_mdp\nh = ('next', h)", MOVE)
    box(87, 42, "replay buffer\nstores is_init, h, ('next', h)", MOVE, width=21)
    arrow((22, 47), (31, 47))
    arrow((50, 47), (59, 47))
    arrow((78, 47), (87, 47))
    arrow((68, 52), (41, 52), bend=0.25)
    arrow((66, 42), (12.5, 42), bend=-0.22)
    axes.text(54.5, 53.2, "next step", fontsize=8, ha="center", color="0.25")
    axes.text(39, 34.8, "done", fontsize=8, ha="center", color="0.25")

    title(30, "Learning: sequences (set_recurrent_mode(True), entered by losses)")
    box(87, 15, "sampler\ncuts slices,\nflags starts in is_init", WRITE, width=21)
    box(59, 15, "recurrent_loss\nflags the same starts in\n('next', is_init)", WRITE)
    box(28, 20, "root: each segment\nstarts from its h", READ, width=22, height=7)
    box(28, 9, "next: each segment\nstarts from its ('next', h)", READ, width=22, height=7)
    box(3, 20, "values, log-probabilities", MOVE, height=7)
    box(3, 9, "next values: targets", MOVE, height=7)
    arrow((97.5, 42), (97.5, 25))
    arrow((87, 20), (78, 20))
    arrow((59, 21), (50, 23.5))
    arrow((59, 19), (50, 12.5))
    arrow((28, 23.5), (22, 23.5))
    arrow((28, 12.5), (22, 12.5))
    arrow((39, 20), (39, 16))
    axes.text(
        40,
        5.2,
        "('next', h): as stored; for DQN and QMIX (arrow)\nas the pass over the root has written "
        "it, detached",
        fontsize=8,
        color="0.25",
        ha="left",
    )
    for x, color, text in ((3, WRITE, "writes"), (17, MOVE, "moves"), (31, READ, "reads")):
        axes.add_patch(_rectangle(x, 2, 3, 2.6, {"facecolor": color, "edgecolor": "0.35"}))
        axes.text(x + 4, 3.3, text, fontsize=8.5, va="center")
    return figure


def _rectangle(x: float, y: float, width: float, height: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.15", **style)


def make_policy(env: GymEnv) -> Any:
    """Make a network: positions -> LSTM -> a value for each action -> the best action."""
    parts: Any = TensorDictSequential
    positions = TensorDictModule(lambda o: o[..., [0, 2]] * 4, ["observation"], ["positions"])
    return parts(
        positions,
        LSTMModule(2, 32, in_key="positions", out_key="embed"),
        TensorDictModule(nn.Linear(32, 2), ["embed"], ["action_value"]),
        QValueModule(spec=env.action_spec),
    )


def learn(updates: int = 1500) -> dict[str, Any]:
    """Train a policy; return it, a rollout, and batches stored at several times of the training."""
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1")
    policy = make_policy(env)
    wrapped: Any = TransformedEnv(env, get_env_transforms_from_module(policy))
    wrapped.append_transform(RewardScaling(0.0, 0.1))
    wrapped.append_transform(StepCounter())
    explore: Any = TensorDictSequential
    acting = explore(policy, EGreedyModule(env.action_spec, eps_init=0.3, eps_end=0.3))
    options: Any = {"delay_value": True, "double_dqn": True, "loss_function": "smooth_l1"}
    loss = recurrent_loss(DQNLoss(policy, action_space=env.action_spec, **options))
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.99, lmbda=0.9)
    target = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam(loss.parameters(), 2e-3)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20_000),
        sampler=SliceSampler(slice_len=20, strict_length=False),
        batch_size=640,
    )
    make: Any = Collector
    collector = make(wrapped, acting, frames_per_batch=200, total_frames=-1)
    kept: dict[str, Any] = {}
    for step, data in zip(range(updates // 10), collector, strict=False):
        buffer.extend(data.reshape(-1))
        if step == updates // 10 - 1:
            kept["stored just now"] = data.clone()
        if step == updates // 10 - 6:
            kept["stored 50 updates ago"] = data.clone()
        if step == updates // 20:
            kept[f"stored {updates // 2 - 10} updates ago"] = data.clone()
        if step == updates // 10 - 1:
            break
        for _ in range(10):
            optimizer.zero_grad()
            loss(buffer.sample())["loss"].backward()
            optimizer.step()
            target.step()
    rollout = wrapped.rollout(150, policy, break_when_any_done=False)
    collector.shutdown()
    batches = {name: _slices(kept[name]) for name in reversed(list(kept))}
    return {"policy": policy, "rollout": rollout.detach(), "batches": batches}


def _slices(data: Any) -> Any:
    """Cut a batch in slices of 25 steps that start anywhere."""
    return data.reshape(-1, 25)


def main() -> None:
    """Draw all pictures."""
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    FOLDER.mkdir(exist_ok=True)
    draw_lifecycle().savefig(FOLDER / "recurrent_state_lifecycle.png", dpi=110)
    learned = learn()
    states = plot_episode_states(learned["rollout"], learned["policy"])
    states.savefig(FOLDER / "episode_states.png", dpi=90)
    staleness = plot_state_staleness(learned["policy"], learned["batches"])
    staleness.savefig(FOLDER / "state_staleness.png", dpi=90)


if __name__ == "__main__":
    main()
