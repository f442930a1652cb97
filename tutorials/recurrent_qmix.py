"""QMIX with recurrent agents that learn to remember a password together, in one file.

    python recurrent_qmix.py                        # learns in less than a minute on one CPU core
    python recurrent_qmix.py --cell feed_forward    # the feed-forward baseline does not learn
    python recurrent_qmix.py --own                  # each agent has weights of its own
    python recurrent_qmix.py --resume runs/recurrent_qmix/checkpoint.pt --frames 80000

Each of three agents hears one word of a password, at the first step and never again. Some steps
later all have to say their word, and are rewarded if all are right. docs/agents.md has the keys.

A run writes learning_curve.csv and .png, checkpoint.pt, with the weights of the best evaluation,
and result.json, with their returns in new episodes. Ctrl-C and SIGTERM stop it after its round.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.data.tensor_specs import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, TransformedEnv
from torchrl.modules import EGreedyModule, MultiAgentMLP, QMixer, QValueModule
from torchrl.objectives import LossModule, QMixerLoss, SoftUpdate, ValueEstimators
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.environments import evaluate_policy
from rnnkeys.objectives import recurrent_loss

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer

FIXED = ("agents", "words", "own", "cell", "hidden_size", "seed")  # --resume keeps them
SELECTION_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used
TEST_EPISODES = 20


@dataclass
class Args:
    agents: int = 3  # agents, each with a word to remember
    words: int = 2  # words that exist
    own: bool = False  # each agent has weights of its own; otherwise all share theirs
    cell: CellName = "gru"  # kind of recurrent layer
    hidden_size: int = 64  # size of the hidden state
    frames: int = 16_000  # environment steps in the whole run, more than warmup
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of environments and networks: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 32  # environments that are stepped together
    batch_frames: int = 256  # frames that are collected in a round
    updates: int = 4  # gradient steps in a round
    warmup: int = 2_000  # frames collected before the first gradient step, also after --resume
    capacity: int = 100_000  # frames in the replay buffer, at least num_envs * slice_len
    slices: int = 32  # sequences in a batch
    slice_len: int = 16  # steps in a sequence
    gamma: float = 0.99  # discount
    lmbda: float = 0.95  # lambda of the TD(lambda) returns
    learning_rate: float = 3e-3  # Adam's first; it falls linearly to 0 at the last frame
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this norm
    tau: float = 0.02  # share of the online network in each update of the target network
    epsilon: float = 0.05  # last probability of a random action; the first is 1
    epsilon_frames: int = 8_000  # frames over which that probability falls
    eval_every: int = 1_000  # frames between two evaluations
    eval_episodes: int = 128  # episodes in an evaluation
    output: str = "runs/recurrent_qmix"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # log through TorchRL, too


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    shortest = args.num_envs * args.slice_len  # frames of one sequence of each environment
    limits = {name: (0, 1) for name in ("gamma", "lmbda", "tau", "epsilon")}
    limits |= {name: (shortest, math.inf) for name in ("warmup", "capacity")}
    limits["frames"] = (max(shortest, args.warmup) + 1, math.inf)
    runs.check_ranges(args, words=(2, math.inf), **limits)
    if args.batch_frames % args.num_envs:
        raise runs.RunError("--batch-frames: expected a multiple of --num-envs")
    return args, checkpoint


class Password(EnvBase):
    """Doors that open if all agents say their word, many doors at once.

    Agents see float32 ``[num_envs, agents, words + 1]``: their word, as a one-hot vector at the
    first step and as zeros later, and 1 when they are asked. ``"state"``, float32
    ``[num_envs, agents * words + 1]``, always contains all words; only the mixer reads it.
    """

    WAIT = (2, 5)  # steps between hearing a word and saying it: the least and the most

    def __init__(
        self, num_envs: int, agents: int = 3, words: int = 2, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        batch, group = self.batch_size, torch.Size([num_envs, agents])
        observation = Unbounded(torch.Size([*group, words + 1]), device=device)
        state = Unbounded(torch.Size([num_envs, agents * words + 1]), device=device)
        action = Categorical(words, group, device=device)
        observations = Composite(observation=observation, shape=group)
        self.observation_spec = Composite(agents=observations, state=state, shape=batch)
        self.action_spec = Composite(agents=Composite(action=action, shape=group), shape=batch)
        self.reward_spec = Unbounded(torch.Size([num_envs, 1]), device=device)
        self.words, self.draws = words, torch.Generator(device)
        self.password, self.wait = action.zero(), torch.zeros(num_envs, 1, device=device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        which = None if tensordict is None else tensordict.get("_reset", None)
        starts = torch.ones_like(self.wait).bool() if which is None else which
        for entry, low, high in ((self.password, 0, self.words - 1), (self.wait, *self.WAIT)):
            draw = torch.empty_like(entry).random_(low, high + 1, generator=self.draws)
            entry.copy_(torch.where(starts, draw, entry))
        return self._observe(starts)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        asked = self.wait == 0
        right = (tensordict["agents", "action"] == self.password).all(-1, keepdim=True)
        self.wait -= 1
        out = self._observe(torch.zeros_like(asked))
        return out.update({"reward": (asked & right).float(), "done": asked, "terminated": asked})

    def _observe(self, starts: Tensor) -> TensorDict:
        word = nn.functional.one_hot(self.password, self.words).float()
        asked = (self.wait == 0).float()
        everybody = asked.unsqueeze(1).expand(*word.shape[:2], 1)
        heard = torch.cat([word * starts.unsqueeze(-1), everybody], -1)
        agents = TensorDict({"observation": heard}, word.shape[:2])
        state = torch.cat([word.flatten(1), asked], -1)
        return TensorDict({"agents": agents, "state": state}, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self.draws.manual_seed(seed or 0)


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    return TransformedEnv(Password(num_envs, args.agents, args.words, args.device))


def make_layer(args: Args, group: str) -> TensorDictModuleBase:
    """Make a recurrent layer of all agents, or of one: agents that share it have own states."""
    return recurrent_module(
        args.cell,
        args.words + 1,
        args.hidden_size,
        in_key=(group, "observation"),
        out_key=(group, "hidden"),
        state_key=(group, "state"),
    )


def make_policy(args: Args) -> TensorDictSequential:
    """Each agent: observation -> recurrent layer -> a value for each word -> the best word."""
    layers = [make_layer(args, "agents")]  # reads and writes [*batch, agents, ...]
    if args.own:
        names = [f"agent_{number}" for number in range(args.agents)]
        seen: list[Any] = [(name, "observation") for name in names]
        hidden: list[Any] = [(name, "hidden") for name in names]
        split = TensorDictModule(lambda x: x.unbind(-2), [("agents", "observation")], seen)
        stack = TensorDictModule(lambda *x: torch.stack(x, -2), hidden, [("agents", "hidden")])
        layers = [split, *(make_layer(args, name) for name in names), stack]
    sizes, options = (args.hidden_size, args.words, args.agents), {"share_params": not args.own}
    head = MultiAgentMLP(
        *sizes, centralized=False, num_cells=[32], activation_class=nn.ReLU, **options
    )
    best = QValueModule(
        action_space="categorical",
        action_value_key=("agents", "action_value"),
        out_keys=[("agents", key) for key in ("action", "action_value", "chosen_action_value")],
    )
    values = TensorDictModule(head, [("agents", "hidden")], [("agents", "action_value")])
    return TensorDictSequential([*layers, values, best]).to(args.device)


def make_loss(args: Args, policy: TensorDictSequential) -> LossModule:
    """QMIX: a mixer combines the agents' values to the team's value, which the reward teaches.

    See "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning",
    Rashid et al., 2018 (arXiv:1803.11485).
    """
    state_size = args.agents * args.words + 1
    mixer = TensorDictModule(
        QMixer((state_size,), mixing_embed_dim=32, n_agents=args.agents, device=args.device),
        in_keys=[("agents", "chosen_action_value"), "state"],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(policy, mixer, action_space="categorical", delay_value=True)
    several = args.gamma * args.lmbda > 0  # steps in a target
    kind = ValueEstimators.TDLambda if several else ValueEstimators.TD0
    options = {"lmbda": args.lmbda} if several else {}
    loss.make_value_estimator(kind, gamma=args.gamma, **options)
    return recurrent_loss(loss)  # correct next values where episodes and sequences end


def evaluate(args: Args, policy: TensorDictSequential, episodes: int, seed: int) -> Tensor:
    env = make_env(args, episodes).append_transform(get_env_transforms_from_module(policy))
    return evaluate_policy(env, policy, seed + args.seed)


class Learner:
    """The networks, and a gradient step on them."""

    def __init__(self, args: Args) -> None:
        torch.manual_seed(args.seed)
        self.args, self.policy = args, make_policy(args)
        self.explore: Any = EGreedyModule(
            make_env(args, 1).full_action_spec_unbatched,
            eps_end=args.epsilon,
            annealing_num_steps=args.epsilon_frames,
            action_key=("agents", "action"),
        ).to(args.device)
        self.loss = make_loss(args, self.policy)
        self.target = SoftUpdate(self.loss, tau=args.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), args.learning_rate, eps=1e-5)

    def learn(self, batch: TensorDictBase, progress: float) -> float:
        """Take one gradient step on sequences ``[slices, slice_len]``, and return the loss."""
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * max(0, 1 - progress)
        loss = self.loss(batch)["loss"]
        if not loss.isfinite():
            raise runs.RunError(f"the entry 'loss' is {loss.item()} after {progress:.0%} of frames")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        return loss.item()


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Collect and learn until the run is finished or stopped, and test the best weights."""
    torch.set_num_threads(args.threads)
    env = make_env(args, args.num_envs)
    learner = Learner(args)
    policy, explore = learner.policy, learner.explore
    modules = {"loss": learner.loss, "optimizer": learner.optimizer, "explore": explore}
    run = runs.Run(args, checkpoint, f"Password, {args.cell}, seed {args.seed}", **modules)
    env.append_transform(RewardSum())
    env.append_transform(get_env_transforms_from_module(policy))  # is_init, initial states
    env.set_seed(args.seed + run.frames)  # other episodes and draws after --resume
    torch.manual_seed(args.seed + run.frames)
    actor = TensorDictSequential([policy, explore])
    collector = Collector(env, actor, frames_per_batch=args.batch_frames, storing_device="cpu")
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity, ndim=2),
        sampler=SliceSampler(slice_len=args.slice_len, traj_key="stream", cache_values=True),
        batch_size=args.slices * args.slice_len,
    )
    # The loss computes values, and the states after each step, itself.
    computed = {unravel_key(key) for key in policy.out_keys} - {("agents", "action")}
    read: list[Any] = ["is_init", *learner.loss.in_keys]
    keys = {unravel_key(key) for key in read} - computed
    streams = torch.arange(args.num_envs).unsqueeze(-1)

    warm = run.frames + args.warmup
    bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
    with bar, runs.catch_signals() as stop:
        while run.frames < args.frames and not stop.is_set():
            data: Any = collector.next()
            run.count(data)
            explore.step(data.numel())
            replay.extend(data.select(*keys).set("stream", streams.expand(data.shape)))
            for _ in range(args.updates if run.frames >= warm else 0):
                batch = replay.sample().reshape(-1, args.slice_len).to(args.device)
                run.losses.append(learner.learn(batch, run.frames / args.frames))
            if run.frames % args.eval_every < data.numel() or run.frames >= args.frames:
                returns = evaluate(args, policy, args.eval_episodes, SELECTION_SEED)
                run.record(returns, policy, epsilon=explore.eps.item())
                run.save()
            bar.set_postfix({**run.summarize(), "epsilon": explore.eps.item()}, refresh=False)
            bar.update(min(run.frames, args.frames) - bar.n)
    collector.shutdown()
    run.save()
    if stop.is_set() or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    policy.load_state_dict(run.best["policy"])
    print(run.finish(evaluate(args, policy, TEST_EPISODES, TEST_SEED)))


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(*read_args(argv))
    except runs.RunError as error:
        print(f"recurrent_qmix.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
