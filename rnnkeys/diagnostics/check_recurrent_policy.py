"""Check a whole recurrent wiring, and report every problem with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase

from ..checks import Problem
from ..keys import next_key
from ..modules.network import RecurrentNetwork
from .batches import find_data_problems
from .environments import check_environment
from .losses import find_collecting_layers, find_wiring_problems
from .policies import find_mode_problems, find_module_problems
from .report import Report
from .runs import (
    evaluating,
    largest_difference,
    relative_difference,
    run_from_stored,
    select_part,
    staleness_by_step,
)


def check_recurrent_policy(
    policy: nn.Module | None,
    env: EnvBase | None = None,
    batch: TensorDictBase | None = None,
    loss: nn.Module | None = None,
    *,
    steps: int = 32,
    max_staleness: float | None = None,
) -> Report:
    """Check a recurrent wiring and report every problem with its remedy.

    Whatever is given is checked, by itself and together with the rest:

    - the policy: keys, modes, modules that share the keys of their states;
    - the environment: ``is_init`` flags, primers, keys. The policy runs in it, and its states must
      arrive where they are read. (The environment is reset, and left inside an episode.)
    - the batch: flags, time last and contiguous, stored states. The policy runs on it as sequences
      and in single steps, which must agree, and the staleness of its states is measured;
    - the loss or value estimator: flags of the ``next`` tensordict, states that its networks miss,
      losses that cannot be right.

    Args:
        policy: the policy that collects; None checks the rest alone.
        env: the environment that it collects in (or a batch of them), with its transforms. Where a
            collector appends them (``auto_register_policy_transforms=True``), the collector's
            ``env``.
        batch: sequences ``[N]`` or ``[*, T]`` as the loss gets them, from ``buffer.sample()`` or a
            collector. It stays as it is.
        loss: a TorchRL loss or value estimator, wired or not.
        steps: length of the rollout.
        max_staleness: report states whose staleness (:class:`rnnkeys.diagnostics.Staleness`, the
            mean at the last step of segments) is larger. By default it is only measured: states
            age in every right wiring, as soon as weights change.

    Returns:
        A report: empty, and so falsy, if nothing is wrong. It can be printed; ``as_dict()`` returns
        plain data.

    Raises:
        ValueError: if nothing is given.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> from torchrl.envs import GymEnv
        >>> policy = GRUModule(4, 8, in_key="observation", out_key="embed")
        >>> print(check_recurrent_policy(policy, GymEnv("CartPole-v1")))  # doctest: +ELLIPSIS
        2 problems with the policy, the env:
        1. init-tracker: The environment provides no 'is_init', ...
            remedy: env = env.append_transform(get_env_transforms_from_module(policy))
        2. primer: The environment creates no state ['recurrent_state'] for GRUModule, ...
            remedy: env = env.append_transform(get_primers_from_module(policy))
    """
    given = {"policy": policy, "env": env, "batch": batch, "loss": loss}
    if all(thing is None for thing in given.values()):
        raise ValueError("Nothing to check: pass a policy, an env, a batch or a loss. [argument]")
    report = Report(looked_at=[name for name, thing in given.items() if thing is not None])
    network = None if policy is None else RecurrentNetwork(policy)
    rollout = None
    if policy is not None and network is not None:
        report.add(find_module_problems(policy, list(network.layers)))
        if env is not None:
            report.add(find_mode_problems(list(network.layers)))
        if env is not None and not report:
            rollout = check_environment(policy, network, env, steps, report)
    is_sound = not report or rollout is not None
    runnable = batch is not None and _check_batch(batch, network, loss, report)
    if loss is not None:
        layers = list(RecurrentNetwork(loss).layers)
        report.add(find_wiring_problems(loss, layers, batch if runnable else None))
    data = batch if runnable else rollout if batch is None else None
    if network is not None and data is not None and is_sound and not _has_lost_states(report):
        # A rollout that was made outside of no_grad has entries with gradients.
        _check_runs(network, data.detach(), report, batch is not None, max_staleness)
    return report


def _has_lost_states(report: Report) -> bool:
    return bool({"state-lost", "init-flags", "episode-state"} & set(report.checks()))


def _check_batch(
    batch: TensorDictBase,
    network: RecurrentNetwork | None,
    loss: nn.Module | None,
    report: Report,
) -> bool:
    """Check a batch; returns whether sequences can be run on it."""
    layers = [] if network is None else list(network.layers)
    known = {key for layer in layers for key in layer.state_keys}
    collecting = [] if loss is None else find_collecting_layers(loss)
    layers += [layer for layer in collecting if not known & set(layer.state_keys)]
    return report.add(find_data_problems(batch, layers))


def _check_runs(
    network: RecurrentNetwork,
    batch: TensorDictBase,
    report: Report,
    is_stored: bool,
    max_staleness: float | None,
) -> None:
    """Run the policy in every way, and compare."""
    part = select_part(batch)
    try:
        with evaluating(network.network):
            key, difference = largest_difference(network, part)
    except Exception as error:  # the report names it, whatever it is
        report.add([_run_failed(error)])
        return
    report.measured["single_step_difference"] = difference
    tolerance = _tolerance(network.network)
    if not difference <= tolerance:
        report.add([_steps_differ(key, difference, tolerance)])
        return
    has_states = all(_is_stored_by_step(part, key) for key in network.state_keys)
    if not is_stored or not network.state_keys or not has_states:
        return
    report.add(_find_collection_problems(network, part, tolerance))
    found = staleness_by_step(network.network, part)
    stale = report.measured["staleness"] = float(found.difference[found.is_last].mean())
    if max_staleness is not None and not stale <= max_staleness:
        report.add([_is_stale(found.key, stale, max_staleness)])


def _run_failed(error: Exception) -> Problem:
    return Problem(
        "run",
        f"The policy cannot be run on the batch: {type(error).__name__}: {error}",
        "See the error: with set_recurrent_mode(True): policy(batch)",
    )


def _steps_differ(key: object, difference: float, tolerance: float) -> Problem:
    return Problem(
        "single-step",
        f"{key!r} in single steps differs from the same as a sequence by {difference:.1e} of its "
        f"largest value (more than {tolerance:.0e}): a part of the policy reads other steps, or "
        "another state.",
        "Find the module that mixes steps (a convolution, attention or norm over time), and keep "
        "it out of the policy.",
    )


def _is_stale(key: object, stale: float, max_staleness: float) -> Problem:
    return Problem(
        "staleness",
        f"The stored states are those of an older policy: at the last step of sequences {key!r} "
        f"differs by {stale:.2f} of its largest value from what the current weights compute (more "
        f"than max_staleness={max_staleness}).",
        "Burn sequences in before learning from them (BurnIn, R2D2Loss), recompute their states "
        "(RefreshStates), or replay younger data (a smaller buffer).",
    )


def _find_collection_problems(
    network: RecurrentNetwork, batch: TensorDictBase, tolerance: float
) -> Iterator[Problem]:
    """Yield a problem if states are those of a run in recurrent mode over the environments."""
    keys = [key for key in network.state_keys if batch.get(next_key(key), None) is not None]
    if batch.ndim < 2 or batch.shape[0] < 2 or not keys:
        return
    with evaluating(network.network):
        single = run_from_stored(network, batch)
        # Without names: one of them may say that time is no longer the last dimension.
        moved = batch.transpose(0, 1)
        moved.names = [None] * moved.ndim
        # With the flags as they are: a done of one environment ends nothing in the next one.
        across = network.run_sequences(moved).transpose(0, 1)
    for key in map(next_key, keys):
        stored = batch.get(key)
        off, off_across = (relative_difference(run.get(key), stored) for run in (single, across))
        if off > tolerance >= off_across:
            yield Problem(
                "collected-in-recurrent-mode",
                f"The states {key!r} are those of a run over the environments of the batch, as if "
                "each were a time step after the one before it.",
                "Collect outside of set_recurrent_mode(True): enter it only around calls on "
                "sequences.",
            )
            return


def _is_stored_by_step(batch: TensorDictBase, key: Any) -> bool:
    """Return whether there is a state for every step; windows have one for all of theirs."""
    state = batch.get(key, None)
    time = batch.ndim - 1
    if state is None or batch.shape[time] < 2:
        return state is not None
    return not bool((state == state.narrow(time, 0, 1)).all())


def _tolerance(policy: nn.Module) -> float:
    sizes = {parameter.dtype.itemsize for parameter in policy.parameters()}
    return {8: 1e-9, 4: 1e-4}.get(min(sizes, default=4), 5e-2)
