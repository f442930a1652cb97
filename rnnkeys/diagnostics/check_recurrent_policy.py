"""The doctor: looks at a whole recurrent wiring and says what is wrong, with the line that cures.

One function, :func:`rnnkeys.check_recurrent_policy`; on the command line ``python -m rnnkeys
doctor``.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.envs import EnvBase

from ..modules.network import find_recurrent
from .batches import check_batch
from .environments import check_environment
from .losses import check_loss
from .policies import check_mode, check_modules
from .report import Finding as Finding
from .report import Report as Report
from .runs import Staleness as Staleness
from .runs import largest_difference, part_of
from .runs import staleness_by_step as staleness_by_step


def check_recurrent_policy(
    policy: nn.Module | None,
    env: EnvBase | None = None,
    batch: TensorDictBase | None = None,
    loss: nn.Module | None = None,
    *,
    steps: int = 32,
    max_staleness: float = 0.1,
) -> Report:
    """Look at a recurrent wiring and report what is wrong, each with the line that cures it.

    Whatever is given is looked at, by itself and together with the rest:

    - the policy: keys, modes, states that two modules share;
    - the environment: marks of starts, primers, keys that meet; the policy is rolled out in it and
      its states must arrive where they are read (so the environment is reset, and left in the midst
      of an episode);
    - the batch: marks, time last, whole sequences, stored states; the policy is run on it by
      sequences and by single steps, which must agree, and from the stored states, whose staleness
      is measured;
    - the loss or value estimator: next views marked, states that its networks miss, what cannot be
      right.

    Args:
        policy: what collects; None looks at the rest alone.
        env: the environment (or a batch of them) that it collects in, transforms included: where
            a collector appends them (``auto_register_policy_transforms=True``), its ``env``.
        batch: sequences as the loss gets them, ``[N]`` or ``[*, T]``: what ``buffer.sample()``
            returns, or what the collector yields. It is left as it was.
        loss: a TorchRL loss or value estimator, wired or not.
        steps: length of the rollout.
        max_staleness: largest mean difference, at the last step of segments, between what the
            policy makes of stored and of recomputed states, relative to its largest value.

    Returns:
        A report: empty, and so falsy, if nothing is wrong. It can be printed; ``as_dict()`` gives
        plain data.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> from torchrl.envs import GymEnv
        >>> policy = GRUModule(4, 8, in_key="observation", out_key="embed")
        >>> print(check_recurrent_policy(policy, GymEnv("CartPole-v1")))  # doctest: +ELLIPSIS
        2 wrong with the policy, the env:
        1. init-tracker: the environment provides no 'is_init', ...
            remedy: env = env.append_transform(get_env_transforms_from_module(policy))
        2. primer: the environment creates no state ['recurrent_state'] for GRUModule, ...
            remedy: env = env.append_transform(get_primers_from_module(policy))
    """
    given = {"policy": policy, "env": env, "batch": batch, "loss": loss}
    report = Report(looked_at=[name for name, thing in given.items() if thing is not None])
    ours = [] if policy is None else find_recurrent(policy)
    if policy is not None:
        check_modules(policy, ours, report)
    if env is not None:
        check_mode(ours, report)
    sound = not report
    rollout = None
    if policy is not None and env is not None and sound:
        rollout = check_environment(policy, ours, env, steps, report)
    inside = [] if loss is None else find_recurrent(loss)
    known = {id(one.module) for one in ours}
    everything = [*ours, *(one for one in inside if id(one.module) not in known)]
    runnable = batch is not None and check_batch(batch, everything, report)
    if loss is not None:
        check_loss(loss, inside, batch if runnable else None, report)
    if policy is not None and sound:
        if batch is not None and runnable:
            _check_runs(policy, batch, report, max_staleness)
        elif batch is None and rollout is not None:
            _check_runs(policy, rollout, report, None)
    return report


def _check_runs(
    policy: nn.Module, batch: TensorDictBase, report: Report, max_staleness: float | None
) -> None:
    """Run the policy in every way and compare; ``max_staleness`` None measures none."""
    part = part_of(batch)
    try:
        key, difference = largest_difference(policy, part)
    except Exception as error:  # whatever it is, the report has to say so
        report.add(
            "run",
            f"the policy cannot be run on the batch: {type(error).__name__}: {error}",
            "see the error: with set_recurrent_mode(True): policy(batch)",
        )
        return
    report.measured["single_step_difference"] = difference
    tolerance = _tolerance(policy)
    if not difference <= tolerance:
        report.add(
            "single-step",
            f"{key!r} by single steps differs from the same by sequences by {difference:.1e} of "
            f"its largest value (more than {tolerance:.0e}): something in the policy sees other "
            "steps, or another state",
            "look for what mixes steps (a convolution, attention or norm over time) and keep it "
            "out of the policy",
        )
        return
    states = [key for one in find_recurrent(policy) for key in one.state_keys]
    if max_staleness is None or not all(_is_stored_by_step(batch, key) for key in states):
        return
    found = staleness_by_step(policy, part)
    stale = report.measured["staleness"] = float(found.difference[found.is_last].mean())
    if not stale <= max_staleness:
        report.add(
            "staleness",
            f"stored states are those of an older policy: at the last step of sequences "
            f"{found.key!r} differs by {stale:.2f} of its largest value from what today's weights "
            f"make of the same steps (more than max_staleness={max_staleness})",
            "burn sequences in before learning from them, recompute their states, or replay what "
            "is younger (a smaller LazyTensorStorage)",
        )


def _is_stored_by_step(batch: TensorDictBase, key: NestedKey) -> bool:
    """Tell whether there is a state for every step; windows have one for all of theirs."""
    state, time = batch.get(key, None), batch.ndim - 1
    if state is None or batch.shape[time] < 2:
        return state is not None
    first = state.narrow(time, 0, 1)
    return not bool((state == first).all())


def _tolerance(policy: nn.Module) -> float:
    dtypes = {parameter.dtype.itemsize for parameter in policy.parameters()}
    return {8: 1e-9, 4: 1e-4}.get(min(dtypes, default=4), 5e-2)
