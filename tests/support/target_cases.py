"""Losses with recurrent networks, data for them, and what their next values must be.

Every case makes a loss whose target parameters differ from the online ones, and whose online ones
differ from those that collected, and knows which next values the oracle expects of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    SliceSampler,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import Compose, EnvBase, InitTracker, StepCounter, TransformedEnv
from torchrl.modules import (
    DistributionalQValueModule,
    ProbabilisticActor,
    QMixer,
    QValueModule,
    TanhNormal,
)
from torchrl.objectives import (
    CrossQLoss,
    DDPGLoss,
    DiscreteSACLoss,
    DistributionalDQNLoss,
    DQNLoss,
    IQLLoss,
    QMixerLoss,
    SACLoss,
    SoftUpdate,
    TD3BCLoss,
    TD3Loss,
    ValueEstimators,
)
from torchrl.objectives.sac import compute_rsample_log_prob
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator

from rnnkeys import get_primers_from_module
from tests.support import target_oracle as oracle

# Their signatures say less than they take.
Seq: Any = TensorDictSequential
Mod: Any = TensorDictModule

OBS, HIDDEN, ACTIONS, AGENTS, ATOMS = 3, 6, 3, 2, 7
_ENTROPY: Any = -1.0
LENGTHS = (5, 1, 4, 9, 1, 1, 6, 2, 12, 3)


def _size(*dims: int) -> torch.Size:
    return torch.Size(dims)


class ShortEpisodes(EnvBase):
    """Random observations and rewards; episodes of lengths 1 to 12 that end in both ways."""

    def __init__(self, kind: str, lead: tuple[int, ...] = ()) -> None:
        batch = torch.Size(lead)
        super().__init__(batch_size=batch)
        self.kind = kind
        obs = Unbounded(_size(*batch, OBS), dtype=torch.get_default_dtype())
        self.observation_spec = Composite(observation=obs, shape=batch)
        if kind == "agents":
            many = Unbounded(_size(*batch, AGENTS, OBS), dtype=torch.get_default_dtype())
            group = Composite(observation=many, shape=_size(*batch, AGENTS))
            self.observation_spec = Composite(agents=group, state=obs, shape=batch)
        self.action_spec = self._actions(batch)
        self.reward_spec = Unbounded(_size(*batch, 1), dtype=torch.get_default_dtype())
        self.count = torch.zeros(*batch, 1, dtype=torch.long)
        # Environments of a batch are out of step with each other.
        self.episode = torch.arange(self.count.numel()).mul(3).reshape(self.count.shape)

    def _actions(self, batch: torch.Size) -> Composite:
        if self.kind == "continuous":
            dtype = torch.get_default_dtype()
            return Composite(action=Bounded(-1, 1, _size(*batch, 2), dtype=dtype), shape=batch)
        if self.kind == "agents":
            each = Categorical(ACTIONS, shape=_size(*batch, AGENTS))
            group = Composite(action=each, shape=_size(*batch, AGENTS))
            return Composite(agents=group, shape=batch)
        return Composite(action=Categorical(ACTIONS, shape=batch), shape=batch)

    def _observe(self) -> TensorDict:
        return self.observation_spec.rand()

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        which = None if tensordict is None else tensordict.get("_reset", None)
        which = torch.ones_like(self.count).bool() if which is None else which
        self.episode = self.episode + which
        self.count = self.count.masked_fill(which, 0)
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.count = self.count + 1
        over = self.count >= torch.tensor(LENGTHS)[self.episode % len(LENGTHS)]
        out = self._observe()
        terminated = over & (self.episode % 2 == 0)
        out.update({"reward": torch.randn(self.count.shape), "done": over})
        return out.update({"terminated": terminated, "truncated": over & ~terminated})

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


@dataclass
class Setup:
    """A loss, what collects for it, and the networks that expected values are worked out with."""

    loss: Any
    policy: Any
    networks: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How to make a loss, and the next values it must bootstrap from."""

    name: str
    kind: str
    make: Callable[[Any, str], Setup]
    expect: Callable[[Setup, TensorDictBase, Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


def recurrent(library: Any, cell: str, key: Any = "observation", name: str = "actor", **kw: Any):
    """Make a recurrent module of a library, with keys of its own unless names are the same."""
    group, out = ((), f"{name}_embed") if isinstance(key, str) else (key[:-1], f"{name}_embed")

    def nest(one: str) -> Any:
        return (*group, one) if group else one

    states = [f"{name}_h", f"{name}_c"][: 2 if cell == "lstm" else 1]
    kind = library.LSTMModule if cell == "lstm" else library.GRUModule
    width = kw.pop("width", OBS)
    return kind(
        input_size=width,
        hidden_size=HIDDEN,
        num_layers=kw.pop("num_layers", 1),
        in_keys=[key, *map(nest, states)],
        out_keys=[nest(out), *(("next", *group, s) for s in states)],
        **kw,
    )


def _net(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    parts = [one for layer in layers for one in (layer, nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def _q_network(library: Any, cell: str) -> Any:
    return Seq(
        recurrent(library, cell),
        Mod(_net(HIDDEN, 8, ACTIONS), ["actor_embed"], ["action_value"]),
        QValueModule(action_space="categorical"),
    )


def _critic(library: Any, cell: str, name: str, width: int = 1, action: int = 2) -> Any:
    """Q(o, a): a recurrent layer over observations, then a head that reads the action too."""
    embed = f"{name}_embed"
    head = Mod(_Concat(_net(HIDDEN + action, 8, width)), [embed, "action"], ["state_action_value"])
    return Seq(recurrent(library, cell, name=name), head)


class _Concat(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *entries: Tensor) -> Tensor:
        return self.net(torch.cat(entries, -1))


def _value(library: Any, cell: str, name: str = "value") -> Any:
    head = Mod(_net(HIDDEN, 8, 1), [f"{name}_embed"], ["state_value"])
    return Seq(recurrent(library, cell, name=name), head)


def _actor(library: Any, cell: str, name: str = "actor") -> Any:
    head = Mod(_net(HIDDEN, 8, 2), [f"{name}_embed"], ["raw"])
    squash = Mod(nn.Tanh(), ["raw"], ["action"])
    return Seq(recurrent(library, cell, name=name), head, squash)


def _random_actor(library: Any, cell: str) -> Any:
    spread = NormalParamExtractor()
    body = Seq(
        recurrent(library, cell),
        Mod(_net(HIDDEN, 8, 4), ["actor_embed"], ["raw"]),
        Mod(spread, ["raw"], ["loc", "scale"]),
    )
    return ProbabilisticActor(
        body, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=False
    )


def _finish(loss: Any, policy: Any, **networks: Any) -> Setup:
    """Move online and target parameters apart, from each other and from those that collect."""
    policy = copy.deepcopy(policy)
    delayed = any(name.startswith("target_") for name, _ in loss.named_children())
    updater = SoftUpdate(loss, eps=0.5) if delayed else None
    with torch.no_grad():
        for parameter in loss.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if updater is not None:
        updater.step()
    return Setup(loss, policy, networks)


def make_dqn(library: Any, cell: str, double: bool, delay: bool, estimator: Any) -> Setup:
    network = _q_network(library, cell)
    loss = DQNLoss(network, action_space="categorical", double_dqn=double, delay_value=delay)
    loss.make_value_estimator(estimator, gamma=0.9)
    return _finish(loss, network, value=network)


def expect_dqn(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, network = setup.loss, setup.networks["value"]
    root = oracle.with_params(network, loss.value_network_params, batch, starts)
    view = oracle.next_view(batch, root)
    target = oracle.with_params(network, loss.target_value_network_params, view, starts)
    values = target.get("action_value")
    chooser = values
    if loss.double_dqn:
        online = oracle.with_params(network, loss.value_network_params, view, starts)
        chooser = online.get("action_value")
    return values.gather(-1, oracle.greedy(chooser))


class _Atoms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net(HIDDEN, 8, ATOMS * ACTIONS)

    def forward(self, embed: Tensor) -> Tensor:
        return self.net(embed).unflatten(-1, (ATOMS, ACTIONS)).log_softmax(-2)


def make_c51(library: Any, cell: str) -> Setup:
    support = torch.linspace(-2, 2, ATOMS)
    network = Seq(
        recurrent(library, cell),
        Mod(_Atoms(), ["actor_embed"], ["action_value"]),
        DistributionalQValueModule(action_space="categorical", support=support),
    )
    network.register_buffer("support", support)
    vars(network)["action_space"] = "categorical"
    loss = DistributionalDQNLoss(network, gamma=0.9, delay_value=True)
    return _finish(loss, network, value=network)


def next_distribution(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    """Return ``[*, T, ATOMS]``: probabilities under the target net of the online net's action."""
    loss, network = setup.loss, setup.networks["value"]
    view = oracle.next_view(batch)
    online = oracle.with_params(network, loss.value_network_params, view, starts)
    target = oracle.with_params(network, loss.target_value_network_params, view, starts)
    action = online.get("action").reshape(*batch.batch_size, 1, 1)
    probs = target.get("action_value").exp()
    return probs.gather(-1, action.expand(*probs.shape[:-1], 1)).squeeze(-1)


def expect_c51(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    probs = next_distribution(setup, batch, starts)
    return (probs * torch.linspace(-2, 2, ATOMS)).sum(-1, keepdim=True)


def _actor_and_critic(library: Any, cell: str, shared: bool) -> tuple[Any, Any]:
    actor = _actor(library, cell)
    critic = _critic(library, cell, "actor" if shared else "critic")
    if shared:
        critic.module[0] = actor.module[0]
    return actor, critic


def make_ddpg(library: Any, cell: str, shared: bool, estimator: Any = ValueEstimators.TD0) -> Setup:
    actor, critic = _actor_and_critic(library, cell, shared)
    policy = copy.deepcopy(Seq(actor, critic))
    loss = DDPGLoss(actor, critic, delay_actor=True, delay_value=True)
    loss.make_value_estimator(estimator, gamma=0.9)
    return _finish(loss, policy, actor=actor, critic=critic)


def expect_ddpg(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, nets = setup.loss, setup.networks
    view = oracle.next_view(batch)
    acted = oracle.with_params(nets["actor"], loss.target_actor_network_params, view, starts)
    view.set("action", acted.get("action"))
    valued = oracle.with_params(nets["critic"], loss.target_value_network_params, view, starts)
    return valued.get("state_action_value")


def make_td3(library: Any, cell: str, shared: bool, kind: Any = TD3Loss) -> Setup:
    actor, critic = _actor_and_critic(library, cell, shared)
    policy = copy.deepcopy(Seq(actor, critic))
    loss = kind(actor, critic, bounds=(-1.0, 1.0), policy_noise=0.3)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return _finish(loss, policy, actor=actor, critic=critic)


def expect_td3(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, nets = setup.loss, setup.networks
    action = batch.get("action")
    noise = (torch.randn_like(action) * loss.policy_noise).clamp(-loss.noise_clip, loss.noise_clip)
    view = oracle.next_view(batch)
    acted = oracle.with_params(nets["actor"], loss.target_actor_network_params, view, starts)
    view.set("action", (acted.get("action") + noise).clamp(-1, 1))
    params = loss.target_qvalue_network_params
    values = oracle.ensemble(nets["critic"], params, view, starts, "state_action_value")
    return values.min(0).values


def make_sac(library: Any, cell: str, shared: bool = False, with_value: bool = False) -> Setup:
    actor = _random_actor(library, cell)
    critic = _critic(library, cell, "actor" if shared else "critic")
    parts = [actor, critic]
    value = _value(library, cell) if with_value else None
    parts += [] if value is None else [value]
    policy = copy.deepcopy(Seq(*parts))
    # Beside a value network each critic learns from a part of the batch, which would cut slices.
    number = 1 if with_value else 2
    loss = SACLoss(actor, critic, value, target_entropy=_ENTROPY, num_qvalue_nets=number)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return _finish(loss, policy, actor=actor, critic=critic, value=value)


def _drawn(setup: Setup, view: TensorDictBase, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the next action as the loss does, from the same random numbers."""
    loss, actor = setup.loss, setup.networks["actor"]
    params = oracle.with_params(actor, loss.actor_network_params, view, starts)
    action, log_prob = compute_rsample_log_prob(actor.build_dist_from_params(params))
    return action.detach(), log_prob.detach()


def expect_sac(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, nets = setup.loss, setup.networks
    view = oracle.next_view(batch)
    action, log_prob = _drawn(setup, view, starts)
    view.set("action", action)
    params = loss.target_qvalue_network_params
    if isinstance(loss, CrossQLoss):
        params = loss.qvalue_network_params
    values = oracle.ensemble(nets["critic"], params, view, starts, "state_action_value")
    return values.min(0).values - loss._alpha * log_prob.unsqueeze(-1)


def expect_value_network(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    """The next value is the value network's, with target parameters."""
    view = oracle.next_view(batch)
    params = setup.loss.target_value_network_params
    return oracle.with_params(setup.networks["value"], params, view, starts).get("state_value")


def make_crossq(library: Any, cell: str) -> Setup:
    actor, critic = _random_actor(library, cell), _critic(library, cell, "critic")
    policy = copy.deepcopy(Seq(actor, critic))
    loss = CrossQLoss(actor, critic, target_entropy=_ENTROPY)
    return _finish(loss, policy, actor=actor, critic=critic)


def make_iql(library: Any, cell: str) -> Setup:
    actor, critic = _random_actor(library, cell), _critic(library, cell, "critic")
    value = _value(library, cell)
    policy = copy.deepcopy(Seq(actor, critic, value))
    loss = IQLLoss(actor, critic, value_network=value)
    return _finish(loss, policy, actor=actor, critic=critic, value=value)


def make_discrete_sac(library: Any, cell: str) -> Setup:
    body = Seq(
        recurrent(library, cell),
        Mod(_net(HIDDEN, 8, ACTIONS), ["actor_embed"], ["logits"]),
    )
    actor = ProbabilisticActor(
        body, in_keys=["logits"], distribution_class=torch.distributions.Categorical
    )
    critic = Seq(
        recurrent(library, cell, name="critic"),
        Mod(_net(HIDDEN, 8, ACTIONS), ["critic_embed"], ["action_value"]),
    )
    policy = copy.deepcopy(Seq(actor, critic))
    loss = DiscreteSACLoss(
        actor, critic, action_space="categorical", num_actions=ACTIONS, target_entropy=_ENTROPY
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return _finish(loss, policy, actor=actor, critic=critic)


def expect_discrete_sac(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, nets = setup.loss, setup.networks
    view = oracle.next_view(batch)
    acted = oracle.with_params(nets["actor"], loss.actor_network_params, view, starts)
    log_prob = acted.get("logits").log_softmax(-1)
    params = loss.target_qvalue_network_params
    values = oracle.ensemble(nets["critic"], params, view, starts, "action_value").min(0).values
    return (log_prob.exp() * (values - loss._alpha * log_prob)).sum(-1, keepdim=True)


def _agents(library: Any, cell: str, own: bool) -> list[Any]:
    """Agents that share the weights of one layer, or each with a layer, and keys, of its own."""
    if not own:
        return [recurrent(library, cell, key=("agents", "observation"), name="local")]
    names = [f"agent_{number}" for number in range(AGENTS)]
    layers = [recurrent(library, cell, key=(one, "observation"), name="local") for one in names]
    apart, together = [(one, "observation") for one in names], [(n, "local_embed") for n in names]
    return [
        Mod(_Apart(), [("agents", "observation")], apart),
        *layers,
        Mod(_Together(), together, [("agents", "local_embed")]),
    ]


class _Apart(nn.Module):
    def forward(self, entry: Tensor) -> tuple[Tensor, ...]:
        return entry.unbind(-2)


class _Together(nn.Module):
    def forward(self, *entries: Tensor) -> Tensor:
        return torch.stack(entries, -2)


def make_qmix(library: Any, cell: str, own: bool = False) -> Setup:
    local = Seq(
        *_agents(library, cell, own),
        Mod(_net(HIDDEN, 8, ACTIONS), [("agents", "local_embed")], [("agents", "action_value")]),
        QValueModule(
            action_value_key=("agents", "action_value"),
            out_keys=[
                ("agents", "action"),
                ("agents", "action_value"),
                ("agents", "chosen_action_value"),
            ],
            action_space="categorical",
        ),
    )
    mixer = Mod(
        QMixer(state_shape=(OBS,), mixing_embed_dim=4, n_agents=AGENTS, device="cpu"),
        in_keys=[("agents", "chosen_action_value"), "state"],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(local, mixer, action_space="categorical", delay_value=True)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return _finish(loss, local, local=local, mixer=mixer)


def expect_qmix(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    loss, nets = setup.loss, setup.networks
    root = oracle.with_params(nets["local"], loss.local_value_network_params, batch, starts)
    view = oracle.next_view(batch, root)
    local = oracle.with_params(nets["local"], loss.target_local_value_network_params, view, starts)
    mixed = oracle.with_params(nets["mixer"], loss.target_mixer_network_params, local, starts)
    return mixed.get("chosen_action_value")


def make_estimator(library: Any, cell: str, kind: Any, **options: Any) -> Setup:
    value = _value(library, cell)
    policy = copy.deepcopy(Seq(_actor(library, cell), value))
    estimator = kind(value_network=value, gamma=0.9, **options)
    return _finish(_Networks(estimator, value), policy, value=value)


class _Networks(nn.Module):
    """Shows an estimator's network, which it hides, to what moves parameters."""

    def __init__(self, estimator: Any, value: nn.Module) -> None:
        super().__init__()
        self.estimator, self.value = estimator, value


def make_bare_estimator(library: Any, cell: str, kind: Any, **options: Any) -> Setup:
    setup = make_estimator(library, cell, kind, **options)
    setup.loss = setup.loss.estimator
    return setup


def expect_shifted(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    """In one shifted call the next state is the one after the step, from the root's own run."""
    value = setup.networks["value"]
    view = oracle.next_view(batch, oracle.run(value, batch, starts))
    # A next observation that is inserted is flagged like its root.
    done, terminated = (batch.get(("next", k)).squeeze(-1) for k in ("done", "terminated"))
    put_in = done & ~terminated
    put_in[..., -1] = True
    stored = batch.get("next")
    flagged = (put_in & starts)[..., None, None]
    for key in ("value_h", "value_c"):
        if stored.get(key, None) is not None:
            view.set(key, torch.where(flagged, stored.get(key), view.get(key)))
    return oracle.run(value, view, torch.ones_like(starts)).get("state_value")


def expect_estimator(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    view = oracle.next_view(batch)
    return oracle.run(setup.networks["value"], view, starts).get("state_value")


def _dqn(double: bool, delay: bool, estimator: Any) -> Case:
    form = ("double " if double else "") + ("delayed " if delay else "")
    return Case(
        f"DQN {form}{estimator.name}",
        "discrete",
        lambda lib, cell: make_dqn(lib, cell, double, delay, estimator),
        expect_dqn,
    )


def _estimator(kind: Any, name: str = "", **options: Any) -> Case:
    return Case(
        f"{kind.__name__}{name}",
        "continuous",
        lambda lib, cell: make_bare_estimator(lib, cell, kind, **options),
        expect_shifted if options.get("shifted") else expect_estimator,
    )


_TD0, _TD1, _TDL = ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda

CASES = [
    _dqn(False, False, _TD0),
    _dqn(False, True, _TD0),
    _dqn(True, True, _TD0),
    _dqn(False, True, _TDL),
    _dqn(True, True, _TDL),
    _dqn(False, True, _TD1),
    Case("C51", "discrete", make_c51, expect_c51),
    Case("DDPG", "continuous", lambda lib, cell: make_ddpg(lib, cell, False), expect_ddpg),
    Case("DDPG shared", "continuous", lambda lib, cell: make_ddpg(lib, cell, True), expect_ddpg),
    Case("DDPG TDLambda", "continuous", lambda a, b: make_ddpg(a, b, False, _TDL), expect_ddpg),
    Case("TD3", "continuous", lambda lib, cell: make_td3(lib, cell, False), expect_td3),
    Case("TD3 shared", "continuous", lambda lib, cell: make_td3(lib, cell, True), expect_td3),
    Case("TD3+BC", "continuous", lambda a, b: make_td3(a, b, False, TD3BCLoss), expect_td3),
    Case("SAC", "continuous", make_sac, expect_sac),
    Case("SAC shared", "continuous", lambda lib, cell: make_sac(lib, cell, True), expect_sac),
    Case(
        "SAC with value",
        "continuous",
        lambda lib, cell: make_sac(lib, cell, with_value=True),
        expect_value_network,
    ),
    Case("discrete SAC", "discrete", make_discrete_sac, expect_discrete_sac),
    Case("CrossQ", "continuous", make_crossq, expect_sac),
    Case("IQL", "continuous", make_iql, expect_value_network),
    Case("QMIX", "agents", make_qmix, expect_qmix),
    _estimator(TD0Estimator),
    _estimator(TD1Estimator),
    _estimator(TDLambdaEstimator, lmbda=0.8),
    _estimator(GAE, lmbda=0.8),
    _estimator(GAE, " shifted", lmbda=0.8, shifted=True, shifted_budget=64),
    _estimator(GAE, " without vmap", lmbda=0.8, deactivate_vmap=True),
    Case("QMIX own weights", "agents", partial(make_qmix, own=True), expect_qmix),
]


def collect(case: Case, policy: Any, frames: int, batch: tuple[int, ...] = ()) -> TensorDictBase:
    """Collect with a real collector; its second batch starts in the midst of episodes."""
    with warnings.catch_warnings():
        # The shared cases let two networks keep their state under one key, on purpose.
        warnings.filterwarnings("ignore", "Two modules with parameters of their own")
        primer = get_primers_from_module(policy)
    assert primer is not None
    compose: Any = Compose
    wrap: Any = TransformedEnv
    env = wrap(ShortEpisodes(case.kind, batch), compose(InitTracker(), StepCounter(), primer))
    make: Any = Collector
    collector = make(env, policy, frames_per_batch=frames, total_frames=-1)
    batches = iter(collector)
    next(batches)
    data = next(batches).clone()
    collector.shutdown()
    return data


def sampled(data: TensorDictBase, steps: int, sampler: Any) -> TensorDictBase:
    """Put data in a real replay buffer and sample from it."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(data)), sampler=sampler, batch_size=steps
    )
    buffer.extend(data)
    batch: Any = buffer.sample()
    for _ in range(100):
        if _starts_inside_an_episode(batch):
            break
        batch = buffer.sample()
    return batch


def _starts_inside_an_episode(batch: TensorDictBase) -> bool:
    """Whether some slice starts inside an episode, where a stored state must be read."""
    starts = oracle.starts_of(batch)
    return bool((starts & (batch.get("step_count").reshape(starts.shape) > 0)).any())


def flat(case: Case, policy: Any) -> TensorDictBase:
    data = collect(case, policy, 80)
    batch = sampled(data, 48, SliceSampler(slice_len=6, strict_length=False))
    # SAC with a value network splits a batch in two halves.
    even: Any = batch[: len(batch) // 2 * 2]
    return even


def windows(case: Case, policy: Any) -> TensorDictBase:
    data = collect(case, policy, 80)
    return sampled(data, 32, SliceSampler(slice_len=4)).reshape(-1, 4)


def single_steps(case: Case, policy: Any) -> TensorDictBase:
    data = collect(case, policy, 40)
    return sampled(data, 8, SliceSampler(slice_len=1)).reshape(-1, 1)


def straight(case: Case, policy: Any) -> TensorDictBase:
    return collect(case, policy, 48, (2,))


DATA = {"flat": flat, "[B, T]": windows, "T = 1": single_steps, "collector": straight}
