"""Why does my recurrent policy not learn? REINFORCE with a GRU, right and wrong, in one file.

    python recurrent_reinforce.py                           # learns CartPole-v1
    python recurrent_reinforce.py --broken                  # the mistake: does not
    python recurrent_reinforce.py --observation auto        # learns without velocities, too
    python recurrent_reinforce.py --cell feed_forward       # the feed-forward baseline
    python recurrent_reinforce.py --resume runs/recurrent_reinforce/checkpoint.pt

A round plays one episode in each of ``--num-envs`` environments, computes how much better each step
turned out than the critic expected, and makes the actions of good steps more likely: one gradient
step on whole episodes. ``--broken`` learns from the same steps, each alone and with a zero state,
although the policy played them with its recurrent state: see docs/why_my_rnn_does_not_learn.md.

The environment is any of Gymnasium's with discrete actions. A run writes to its --output folder
learning_curve.csv and .png, with a row for each episode; checkpoint.pt, with everything that
--resume needs; and, at the end, result.json, with the returns of the last weights in new episodes.
Ctrl-C and SIGTERM stop a run after its current round.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor
from torchrl.objectives import ReinforceLoss
from torchrl.objectives.value import TD1Estimator
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

FIXED = (  # arguments that --resume cannot change
    *("env", "seed", "num_envs", "observation", "hide"),
    *("cell", "num_layers", "hidden_size", "broken"),
)
WINDOW = 100  # episodes whose mean return decides that the task is learned
TEST_EPISODES = 20
TEST_SEED = 200_000_000  # of the episodes that training has not used


@dataclass
class Args:
    env: str = "CartPole-v1"  # Gymnasium's name of an environment with discrete actions
    observation: Literal["all", "auto"] = "all"  # auto: no velocities in CartPole-v1
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    max_episode_steps: int = 10_000  # later steps are cut off, if the environment allows them
    cell: CellName = "gru"  # kind of recurrent layer
    num_layers: int = 2  # layers in the policy, and as many in the critic
    hidden_size: int = 64  # size of the hidden state
    broken: bool = False  # learn from single steps with a zero state: the mistake
    episodes: int = 4_000  # episodes to learn from, at most
    target: float = 475.0  # stop when the mean return of the last 100 episodes reaches it
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of the networks: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 16  # episodes in a round, played side by side
    gamma: float = 0.99  # discount
    learning_rate: float = 5e-3  # Adam's
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    output: str = "runs/recurrent_reinforce"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # log through TorchRL, too


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    runs.check_ranges(args, gamma=(0, 1))
    if args.broken and args.cell == "feed_forward":
        raise runs.RunError("--broken: a feed-forward network has no states to lose")
    return args, checkpoint


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    """Make environments that this process steps together."""
    limit = f"gymnasium.wrappers:TimeLimit(max_episode_steps={args.max_episode_steps})"
    hide, scale = args.hide, (1.0,)
    if args.env == "CartPole-v1" and args.observation == "auto" and not hide:
        hide, scale = (1, 3), (1 / 2.4, 1 / 0.2095)  # positions / their limits
    return make_gym_env(
        args.env,
        num_envs,
        wrappers=[limit],
        hide=hide,
        scale=scale,
        discrete_actions=True,
        device=args.device,
    )


def make_networks(args: Args, env: TransformedEnv) -> tuple[Any, TensorDictSequential]:
    """Make the policy and the critic, which predicts returns: each has its own recurrent layers."""
    spec = env.observation_spec["observation"]
    if spec.ndim != 2:
        raise runs.RunError(f"--env is {args.env}, with images: expected vectors as observations")

    def make_network(name: str, output: str, output_size: int) -> TensorDictSequential:
        layers = recurrent_module(
            args.cell,
            spec.shape[-1],
            args.hidden_size,
            args.num_layers,
            in_key="observation",
            out_key=f"{name}_hidden",
            state_key=f"{name}_state",
        )
        head = nn.Linear(args.hidden_size, output_size)
        modules = [layers, TensorDictModule(head, [f"{name}_hidden"], [output])]
        return TensorDictSequential(modules).to(args.device)

    policy = ProbabilisticActor(
        make_network("policy", "logits", env.action_spec.shape[-1]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
    )
    return policy, make_network("critic", "state_value", 1)


@torch.no_grad()
@set_exploration_type(ExplorationType.RANDOM)
def play(env: TransformedEnv, policy: TensorDictModuleBase) -> tuple[TensorDictBase, Tensor]:
    """Play one episode in each environment, side by side.

    Returns:
        The episodes, ``[num_envs, T]``, with a valid mask: steps after the end of an episode, while
        others continue, are padding. And the returns of the episodes, ``[num_envs]``.
    """
    step = env.reset()
    running = torch.ones(step.shape, dtype=torch.bool, device=step.device)
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


def as_single_steps(batch: TensorDictBase) -> TensorDictBase:
    """Make the mistake: a batch of steps ``[N, 1]``, each of which starts from a zero state."""
    steps: Any = batch.reshape(-1, 1)
    for key in [key for key in steps.keys() if key.startswith(("policy_state", "critic_state"))]:
        steps[key] = torch.zeros_like(steps[key])
    steps["is_init"] = torch.ones_like(steps["is_init"])
    return steps


def mean_of_last(returns: Sequence[float]) -> float:
    last = returns[-WINDOW:]
    return sum(last) / max(len(last), 1)


def is_finished(args: Args, returns: Sequence[float]) -> bool:
    is_learned = len(returns) >= WINDOW and mean_of_last(returns) >= args.target
    return is_learned or len(returns) >= args.episodes


def write_records(args: Args, returns: list[float], seconds: list[float]) -> None:
    """Write learning_curve.csv and draw learning_curve.png."""
    count = range(1, len(returns) + 1)
    means = [mean_of_last(returns[:i]) for i in count]
    with Path(args.output, "learning_curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["episode", "seconds", "return", f"mean_of_last_{WINDOW}"])
        writer.writerows(zip(count, seconds, returns, means, strict=True))
    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    ax.plot(count, returns, ".", ms=2, color="tab:gray", label="an episode")
    ax.plot(count, means, label=f"mean of the last {WINDOW}")
    ax.axhline(args.target, color="tab:green", ls="--", lw=1, label="target")
    ax.set(title=f"{args.env}, {args.cell}, seed {args.seed}", xlabel="episodes", ylabel="return")
    ax.legend(fontsize="small")
    fig.savefig(Path(args.output, "learning_curve.png"), dpi=120)


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Play and learn until the run is finished or stopped, and test the last weights."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    policy, critic = make_networks(args, env)
    # The critic's layers play along, so that its states are stored with every step, too.
    actor = TensorDictSequential([policy, critic])
    env.append_transform(get_env_transforms_from_module(actor))  # is_init flags, initial states
    # These two calls are all that recurrent layers need from the losses.
    loss_module = recurrent_loss(ReinforceLoss(policy, critic))
    advantage = recurrent_loss(TD1Estimator(gamma=args.gamma, value_network=critic))
    minibatches = SequenceMinibatches(normalize_advantage=True)
    optimizer = torch.optim.Adam(loss_module.parameters(), args.learning_rate)
    returns, seconds = [], []
    if checkpoint:
        with runs.explain_resume_errors():
            loss_module.load_state_dict(checkpoint["loss"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            returns, seconds = checkpoint["returns"], checkpoint["seconds"]
    logger = get_logger(args.logger, args.output, "log")

    runs.make_folder(args.output, resumed=bool(checkpoint))
    start = time.perf_counter() - (seconds[-1] if seconds else 0)
    bar = tqdm(total=args.episodes, initial=len(returns), unit=" episodes")
    with bar, runs.catch_signals() as stop:
        while not is_finished(args, returns) and not stop.is_set():
            # A resumed run plays the same rounds as one that was not interrupted.
            env.set_seed(args.seed + len(returns))
            torch.manual_seed(args.seed + len(returns))
            episodes, new_returns = play(env, actor)
            advantage(episodes)
            [batch] = minibatches(episodes)
            out = loss_module(as_single_steps(batch) if args.broken else batch)
            loss = out["loss_actor"] + out["loss_value"]
            if not loss.isfinite():
                raise runs.RunError(f"'loss_actor' + 'loss_value' is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), args.max_grad_norm)
            optimizer.step()

            returns += new_returns.tolist()
            seconds += [round(time.perf_counter() - start, 2)] * len(new_returns)
            bar.set_postfix(mean_of_last=mean_of_last(returns), loss=loss.item(), refresh=False)
            bar.update(len(new_returns))
            if logger is not None:
                metrics = {"return": new_returns.mean().item(), "loss": loss.item()}
                logger.log_metrics(metrics, step=len(returns))
            modules = {"loss": loss_module.state_dict(), "optimizer": optimizer.state_dict()}
            state = {"args": asdict(args), "returns": returns, "seconds": seconds, **modules}
            runs.save_checkpoint(args.output, state)

    write_records(args, returns, seconds)
    if not is_finished(args, returns):
        print(
            f"Stopped after {len(returns)} episodes. Continue: --resume {args.output}/checkpoint.pt"
        )
        return
    test_env = make_env(args, TEST_EPISODES)
    test_env.append_transform(get_env_transforms_from_module(policy))
    test_returns = evaluate_policy(test_env, policy, TEST_SEED + args.seed)
    result = {
        "test_return": test_returns.mean().item(),
        "test_returns": test_returns.tolist(),
        "last_100": mean_of_last(returns),
        "episodes": len(returns),
        "seconds": seconds[-1],
        "args": asdict(args),
    }
    Path(args.output, "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{len(returns)} episodes, mean return {mean_of_last(returns):.1f} over the last {WINDOW}. "
        f"Without exploration: {test_returns.mean():.1f} over {TEST_EPISODES} new episodes. "
        f"Picture: {args.output}/learning_curve.png"
    )


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(*read_args(argv))
    except (runs.RunError, EnvError) as error:
        print(f"recurrent_reinforce.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
