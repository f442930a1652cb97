"""Recurrent MAPPO and IPPO on a task of VMAS where agents remember a goal; one file.

    python recurrent_mappo.py                        # a centralized critic with a state of its own
    python recurrent_mappo.py --algorithm ippo       # each agent has a critic
    python recurrent_mappo.py --cell feed_forward    # the feed-forward baseline does not learn
    python recurrent_mappo.py --own                  # each agent has weights of its own
    python recurrent_mappo.py --resume runs/recurrent_mappo/checkpoint.pt --frames 600000

It needs rnnkeys[tutorials,marl]. Each of three agents sees its goal at the first step of an
episode and never again; velocities are hidden throughout. The team is rewarded for coming closer to
the goals. docs/mappo.md explains the wiring.

A run writes learning_curve.csv and .png, checkpoint.pt, with the weights of the best evaluation,
and result.json, with their returns in new episodes. Ctrl-C and SIGTERM stop it after its round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    AddStateIndependentNormalScale,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.envs.libs.vmas import VmasEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
from torchrl.objectives.value import MultiAgentGAE
from tqdm import tqdm
from vmas.simulator.core import Agent, Landmark, World
from vmas.simulator.scenario import BaseScenario

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

FIXED = ("algorithm", "agents", "own", "cell", "hidden_size", "steps", "seed")
SELECTION_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used
TEST_EPISODES = 256
OBSERVATION_SIZE = 5  # position, goal or zeros, whether the goal is shown


@dataclass
class Args:
    algorithm: Literal["mappo", "ippo"] = "mappo"  # one critic of all, or one for each agent
    agents: int = 3  # agents, each with a goal to remember
    own: bool = False  # each agent has weights of its own; otherwise all share theirs
    cell: CellName = "gru"  # kind of recurrent layer
    hidden_size: int = 64  # size of the hidden state
    frames: int = 300_000  # environment steps in the whole run
    seed: int = 0  # of all random numbers
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 128  # environments that are stepped together
    steps: int = 40  # steps of an episode, and of a rollout
    sequences: int = 32  # episodes in a minibatch
    epochs: int = 6  # passes over a rollout
    gamma: float = 0.95  # discount
    lmbda: float = 0.9  # lambda of GAE
    learning_rate: float = 1e-3  # Adam's first; it falls linearly to 0 at the last frame
    clip: float = 0.2  # range of the ratio
    entropy: float = 0.001  # weight of the entropy bonus
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    eval_every: int = 30_000  # frames between two evaluations
    output: str = "runs/recurrent_mappo"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # log through TorchRL, too


class Recall(BaseScenario):
    """Agents that have to reach goals which they saw at the first step."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        """Make a world of discs; ``agents`` is their number."""
        world = World(batch_dim, device)
        for number in range(kwargs["agents"]):
            agent = Agent(name=f"agent_{number}", collide=False, u_multiplier=3.0)
            agent.goal = Landmark(name=f"goal_{number}", collide=False)
            world.add_agent(agent)
            world.add_landmark(agent.goal)
        self.age = torch.zeros(batch_dim, 1, device=device)
        self.distance = torch.zeros(batch_dim, device=device)
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Draw positions and goals of one environment, or of all."""
        which = slice(None) if env_index is None else env_index
        for entity in self.world.entities:
            position = torch.rand_like(entity.state.pos[which]) * 2 - 1
            entity.set_pos(position, batch_index=env_index)
        self.age[which] = 0
        self.distance[which] = self._measure()[which]

    def _measure(self) -> Tensor:
        """Return the mean distance of agents to their goals, ``[num_envs]``."""
        gaps = [agent.state.pos - agent.goal.state.pos for agent in self.world.agents]
        return torch.stack(gaps).norm(dim=-1).mean(0)

    def post_step(self) -> None:
        """Compute the reward of the team: how much closer it came."""
        distance = self._measure()
        self.gain, self.distance = self.distance - distance, distance
        self.age += 1

    def reward(self, agent: Agent) -> Tensor:
        """Return the reward, the same for all agents, ``[num_envs]``."""
        return self.gain

    def observation(self, agent: Agent) -> Tensor:
        """Return what an agent sees, ``[num_envs, 5]``."""
        shown = (self.age == 0).float()
        return torch.cat([agent.state.pos, agent.goal.state.pos * shown, shown], -1)


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    env = VmasEnv(Recall(), num_envs=num_envs, max_steps=args.steps, agents=args.agents)
    return TransformedEnv(env)


def make_network(
    args: Args, group: str, name: str, outputs: int, out_key: str, size: int = OBSERVATION_SIZE
) -> list[TensorDictModuleBase]:
    """Make a recurrent layer and a head, from a group's observation to its ``out_key``."""
    layer = recurrent_module(
        args.cell,
        size,
        args.hidden_size,
        in_key=(group, "observation"),
        out_key=(group, name),
        state_key=(group, f"{name}_state"),
    )
    head = MLP(args.hidden_size, outputs, num_cells=[64], activation_class=nn.Tanh)
    return [layer, TensorDictModule(head, [(group, name)], [(group, out_key)])]


def make_networks(args: Args, *network: Any) -> list[TensorDictModuleBase]:
    """Make a network of each agent's own observation, with shared or separate weights."""
    if not args.own:
        return make_network(args, "agents", *network)
    groups, out_key = [f"agent_{number}" for number in range(args.agents)], network[-1]
    seen: Any = [(group, "observation") for group in groups]
    written: Any = [(group, out_key) for group in groups]
    split = TensorDictModule(lambda x: x.unbind(-2), [("agents", "observation")], seen)
    stack = TensorDictModule(lambda *x: torch.stack(x, -2), written, [("agents", out_key)])
    return [split, *(m for group in groups for m in make_network(args, group, *network)), stack]


def make_actor(args: Args, env: TransformedEnv) -> ProbabilisticActor:
    """Make the policy: each agent acts on its own observations and its own state."""
    spec: Any = env.full_action_spec_unbatched["agents", "action"]
    actions = spec.shape[-1]
    scale = AddStateIndependentNormalScale(actions, init_value=-0.5)
    keys: Any = [("agents", "loc"), ("agents", "scale")]
    return ProbabilisticActor(
        TensorDictSequential(
            *make_networks(args, "actor", actions, "mean"),
            TensorDictModule(scale, [("agents", "mean")], keys),
        ),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low[0], "high": spec.space.high[0]},
        return_log_prob=True,
    )


def make_critic(args: Args) -> TensorDictSequential:
    """MAPPO: one state, of what all agents see together. IPPO: one state for each agent."""
    if args.algorithm == "ippo":
        return TensorDictSequential(*make_networks(args, "critic", 1, "state_value"))
    joint, values = ("team", "observation"), ("team", "values")
    size = args.agents * OBSERVATION_SIZE
    return TensorDictSequential(
        TensorDictModule(lambda x: x.flatten(-2), [("agents", "observation")], [joint]),
        *make_network(args, "team", "critic", args.agents, "values", size),
        TensorDictModule(lambda x: x.unsqueeze(-1), [values], [("agents", "state_value")]),
    )


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def evaluate(args: Args, actor: Any, episodes: int, seed: int) -> Tensor:
    """Play without exploration, and return the team's return in each episode."""
    with torch.random.fork_rng():
        env = make_env(args, episodes).append_transform(get_env_transforms_from_module(actor))
        env.set_seed(seed + args.seed)
        rollout = env.rollout(args.steps, actor)
    return rollout["next", "agents", "reward"].sum(1).mean((1, 2))


class Learner:
    """The networks, and gradient steps on them."""

    def __init__(self, args: Args) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.actor = make_actor(args, make_env(args, 1))
        critic = make_critic(args)
        self.policy = TensorDictSequential(self.actor, critic)  # collects the critic's states, too
        make_loss = {"mappo": MAPPOLoss, "ippo": IPPOLoss}[args.algorithm]
        self.loss: Any = make_loss(
            self.actor, critic, clip_epsilon=args.clip, entropy_coeff=args.entropy
        )
        self.advantage: Any = MultiAgentGAE(
            gamma=args.gamma, lmbda=args.lmbda, value_network=critic
        )
        self.advantage.set_keys(value=("agents", "state_value"), reward=("agents", "reward"))
        self.loss.set_keys(
            action=("agents", "action"),
            sample_log_prob=("agents", "action_log_prob"),
            value=("agents", "state_value"),
            reward=("agents", "reward"),
        )
        recurrent_loss(self.advantage)  # values of the steps as they follow each other
        recurrent_loss(self.loss)
        self.minibatches = SequenceMinibatches(
            args.sequences * args.steps, args.steps, epochs=args.epochs, networks=self.policy
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), args.learning_rate, eps=1e-5)

    def learn(self, rollout: TensorDictBase, progress: float) -> list[float]:
        """Take the gradient steps of all epochs on a rollout ``[num_envs, steps]``."""
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * max(0, 1 - progress)
        with torch.no_grad():
            self.advantage(rollout)
        losses = []
        for batch in self.minibatches(rollout):
            terms = self.loss(batch)
            loss: Any = sum(value for key, value in terms.items() if key.startswith("loss_"))
            if not loss.isfinite():
                raise runs.RunError(f"the loss is {loss.item()} after {progress:.0%} of frames")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Collect and learn until the run is finished or stopped, and test the best weights."""
    torch.set_num_threads(args.threads)
    learner = Learner(args)
    modules = {"loss": learner.loss, "optimizer": learner.optimizer}
    title = f"Recall, {args.algorithm}, {args.cell}, seed {args.seed}"
    run = runs.Run(args, checkpoint, title, **modules)
    env = make_env(args, args.num_envs)
    env.append_transform(RewardSum([("agents", "reward")], [("agents", "episode_reward")]))
    env.append_transform(get_env_transforms_from_module(learner.policy))
    torch.manual_seed(args.seed + run.frames)  # other episodes after --resume
    size = args.num_envs * args.steps
    collector = Collector(env, learner.policy, frames_per_batch=size)
    bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
    with bar, runs.catch_signals() as stop:
        while run.frames < args.frames and not stop.is_set():
            data: Any = collector.next()
            run.count(data)
            done = data["next", "done"].squeeze(-1)
            run.returns.extend(data["next", "agents", "episode_reward"][done].mean((1, 2)).tolist())
            run.losses.extend(learner.learn(data, run.frames / args.frames))
            if run.frames % args.eval_every < size or run.frames >= args.frames:
                returns = evaluate(args, learner.actor, TEST_EPISODES, SELECTION_SEED)
                run.record(returns, learner.actor)
                run.save()
            bar.set_postfix(run.summarize(), refresh=False)
            bar.update(min(run.frames, args.frames) - bar.n)
    collector.shutdown()
    run.save()
    if stop.is_set() or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    learner.actor.load_state_dict(run.best["policy"])
    print(run.finish(evaluate(args, learner.actor, TEST_EPISODES, TEST_SEED)))


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
        runs.check_ranges(args, gamma=(0, 1), lmbda=(0, 1))
        train(args, checkpoint)
    except runs.RunError as error:
        print(f"recurrent_mappo.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
