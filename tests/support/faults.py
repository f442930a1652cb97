"""The seeded faults: mistakes against the invariants of the package, and the tests that catch them.

A fault wraps a function with a stable meaning and spoils its arguments or its result. Where a
function or a test gets another name, its name is changed here; a fault without a test to catch it
is an invariant that no test checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rnnkeys.collectors
import rnnkeys.objectives
import rnnkeys.transforms  # noqa: F401  (imported here once, before processes are forked)
from tests.support.planting import seen_by

CELLS = "rnnkeys.cells:"
BACKENDS = "rnnkeys.backends.contract:"
LOOP = "rnnkeys.backends.loop:"
FUSED = "rnnkeys.backends.fused:"
FUSED_LSTM = "rnnkeys.backends.fused_lstm:"
NATIVE = "rnnkeys.backends.native:"
SEGMENTS = "rnnkeys.backends.packing:"
SCAN = "rnnkeys.backends.linear_recurrence:"
LINEAR_LAYER = "rnnkeys.backends.linear_layer:"
ACTORS = "rnnkeys.collectors.base:"
TRITON = "rnnkeys.backends.triton:"
ENTRIES = "rnnkeys.modules.entries:"
MODE = "rnnkeys.mode:"
STARTS = "rnnkeys.sequences.segment_starts:"
WIRING = "rnnkeys.objectives.wiring:"
VALID_STEPS = "rnnkeys.objectives.valid_steps:"
MASKS = "rnnkeys.sequences.masks:"
R2D2 = "rnnkeys.objectives.r2d2:"
BURN_IN = "rnnkeys.transforms.burn_in:"
WINDOWS = "rnnkeys.transforms.windows:"
STREAMS = "rnnkeys.transforms.streams:"
REFRESH = "rnnkeys.transforms.refresh:"
STATEFUL = "rnnkeys.deploy.stateful:"
TABLE = "rnnkeys.deploy.state_table:"


def contract(way: str, flags: str = "random") -> str:
    """One case of the contract test; ``way`` is a way to run time, a cell and a dtype."""
    return (
        f"tests/backends/test_contract.py::test_backend_equals_the_reference[{way}-plain-{flags}]"
    )


def scanned() -> str:
    """A case of the linear scan with decays of every step."""
    scan = "tests/backends/test_linear_scan.py::test_scan_equals_unrolling_with_gradients"
    return scan + "[(5, 2, 3)-real-False-0.1]"


R2D2_IN_NUMPY = (
    "tests/objectives/test_r2d2.py::test_r2d2_loss_and_priorities_equal_numpy[as in the paper-True]"
)


def exchange(gates: Tensor, first: int, second: int, count: int) -> Tensor:
    """Exchange two of ``count`` gates ``[..., count * H]``."""
    chunks = list(gates.chunk(count, -1))
    chunks[first], chunks[second] = chunks[second], chunks[first]
    return torch.cat(chunks, -1)


@seen_by(contract("loop-lstm-float64"), target=CELLS + "LongShortTermMemory.pointwise")
def lstm_gates_exchanged(original: Any, self: Any, gates_x: Tensor, gates_h: Tensor, state: Any):
    """LSTM: input and forget gate are exchanged."""
    return original(self, exchange(gates_x, 0, 1, 4), exchange(gates_h, 0, 1, 4), state)


@seen_by(contract("loop-gru-float64"), target=CELLS + "GatedRecurrentUnit.pointwise")
def gru_update_gate_inverted(
    original: Any, self: Any, gates_x: Tensor, gates_h: Tensor, state: Any
):
    """GRU: the update gate keeps the candidate in place of the state."""
    sign = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(state[0].shape[-1]).to(gates_x)
    return original(self, gates_x * sign, gates_h * sign, state)


@seen_by(contract("loop-gru-float64", "everywhere"), target=LOOP + "run_dense")
def loop_drops_a_reset(
    original: Any, cell: Any, weights: Any, x: Tensor, reset: Tensor, state: Any
):
    """loop: a reset at the second step is dropped."""
    reset = reset.clone()
    reset[1:2] = False
    return original(cell, weights, x, reset, state)


@seen_by(
    "tests/modules/test_leaks.py::"
    "test_values_not_finite_stay_in_their_segment[loop-gru-one step-nan]",
    target=LOOP + "select",
)
def loop_multiplies_by_zero(original: Any, where: Tensor, chosen: Any, other: Any):
    """loop: a reset multiplies the old state by zero, so that a NaN passes."""
    where = where.unsqueeze(-1)
    return tuple(where * a + ~where * b for a, b in zip(chosen, other, strict=True))


@seen_by(contract("scan-gru-float64", "two in a row"), target=FUSED + "cut_gradient")
def scan_gradient_passes_a_reset(original: Any, grads: Any, *rest: Any):
    """scan: the gradient passes a reset into the segment before."""
    original(tuple(grad.clone() for grad in grads), *rest)


@seen_by(contract("scan-lstm-float64", "none"), target=FUSED_LSTM + "lstm_backward")
def lstm_weight_gradient_zeroed(original: Any, *args: Any):
    """scan: the LSTM's recurrent weights get a gradient of zero."""
    grads = original(*args)
    return grads._replace(w_hh=torch.zeros_like(grads.w_hh))


@seen_by(contract("pad-gru-float64"), target=SEGMENTS + "read_segments")
def segments_start_late(original: Any, is_init: Tensor):
    """pad: segments start one step late."""
    return original(is_init.roll(1, 1))


@seen_by(
    contract("pad-gru-float64", "none"),
    contract("pad-gru-float64", "at the last step"),
    target=SEGMENTS + "read_segments",
)
def segments_remembered_by_shape(original: Any, is_init: Tensor):
    """pad: segments that are kept from an earlier batch are found by its shape alone."""
    if is_init.shape not in _SEGMENTS:
        _SEGMENTS[is_init.shape] = original(is_init)
    return _SEGMENTS[is_init.shape]


_SEGMENTS: dict[Any, Any] = {}


@seen_by(
    "tests/backends/test_native.py::test_native_cell_states_equal_a_loops_for_packed_rows",
    target=NATIVE + "compute_cell_states",
)
def native_cells_read_the_next_step(
    original: Any, weights: Any, x: Tensor, y: Tensor, h0: Tensor, *rest: Any
):
    """native: cell states are computed from the outputs of the wrong step."""
    return original(weights, x, y.roll(1, 0), h0, *rest)


@seen_by(scanned(), target=SCAN + "scan")
def linear_scan_drops_resets(original: Any, a: Any, b: Tensor, start: Tensor, reset: Tensor):
    """Linear scan: every reset is dropped."""
    return original(a, b, start, torch.zeros_like(reset))


@seen_by(scanned(), target=SCAN + "scan_backward")
def linear_scan_gradient_passes_a_reset(
    original: Any, grad: Tensor, a: Any, h: Tensor, start: Tensor, reset: Tensor, *rest: Any
):
    """Linear scan: the gradient passes a reset into the segment before."""
    return original(grad, a, h, start, torch.zeros_like(reset), *rest)


@seen_by(
    "tests/backends/test_linear_scan.py::"
    "test_scan_value_that_is_not_finite_does_not_pass_a_reset[nan-loop]",
    target="rnnkeys.backends.linear_steps:is_finite_at",
)
def linear_scan_lets_nan_pass(original: Any, h: Tensor, rows: Tensor):
    """Linear scan: a state that is not finite is multiplied by zero at a reset."""
    return True


@seen_by(
    "tests/cells/test_linear.py::test_linear_module_sequence_equals_single_steps[s6-7]",
    target=LINEAR_LAYER + "look_back",
)
def s6_window_passes_a_reset(original: Any, x: Tensor, stored: Any, reset: Tensor):
    """s6: the convolution reads inputs of the episode before."""
    first = torch.arange(len(reset)).unsqueeze(1) == 0
    return original(x, stored, first.expand_as(reset))


@seen_by(
    "tests/modules/test_modules.py::test_written_states_are_detached_unless_asked_for[scan-gru]",
    target=BACKENDS + "unroll_layers",
)
def states_not_detached(original: Any, *args: Any):
    """Written states carry a gradient although ``state_grad`` is False."""
    return original(*args[:5], args[5]._replace(state_grad=True), *args[6:])


@seen_by(
    "tests/support/triton_kernels.py::test_form_equals_the_reference[split-lstm-random]",
    target=TRITON + "unroll",
)
def triton_drops_resets(
    original: Any, cell: Any, weights: Any, x: Tensor, start: Any, is_init: Any, *rest: Any
):
    """triton: every reset is dropped."""
    return original(cell, weights, x, start, torch.zeros_like(is_init), *rest)


@seen_by(
    "tests/modules/test_modules.py::test_stored_nan_that_is_not_read_has_no_effect[False-gru]",
    target=ENTRIES + "fold_step",
)
def step_keeps_the_old_state(original: Any, spec: Any, data: Any, *rest: Any):
    """A single step at an episode start reads the state of the last episode."""
    return original(spec, data._replace(is_init=torch.zeros_like(data.is_init)), *rest)


@seen_by(
    "tests/modules/test_agents.py::test_qmix_has_the_loss_and_gradients_of_single_steps[shared-gru]",
    target=ENTRIES + "unfold_sequences",
)
def agents_exchanged(original: Any, entry: Tensor, lead: Any, shape: Any):
    """Agents: what one agent computes is written to another."""
    return original(entry.roll(1, 0) if len(shape) > len(lead) else entry, lead, shape)


@seen_by(
    "tests/test_mode.py::test_context_left_by_an_exception_restores_the_mode",
    target=MODE + "set_recurrent_mode.__exit__",
)
def mode_left_after_an_exception(original: Any, self: Any, kind: Any, *rest: Any):
    """The mode stays set when a block ends by an exception."""
    return original(self, kind, *rest) if kind is None else None


@seen_by(
    "tests/modules/test_primers.py::test_states_are_zeros_of_the_environments_batch",
    target="rnnkeys.modules.recurrent:make_primer",
)
def primer_of_another_dtype(original: Any, shapes: Any, dtype: Any = None, device: Any = None):
    """The primer makes float32 states whatever the parameters' dtype is."""
    return original(shapes, torch.float32, device)


@seen_by(
    "tests/objectives/test_r2d2.py::test_r2d2_done_without_a_flag_ends_an_episode",
    target=STARTS + "find_segment_starts",
)
def done_starts_no_segment(original: Any, tensordict: Any, init_key: Any):
    """A step after a done starts no segment unless its is_init flag is set."""
    return tensordict.get(init_key)


@seen_by(
    "tests/objectives/test_targets.py::test_returns_end_at_slices_without_done[GAE]",
    target=WIRING + "Wired._end_returns",
)
def returns_not_cut(original: Any, *args: Any):
    """Returns are summed over the start of the next segment."""


@seen_by(
    "tests/objectives/test_bad_batches.py::test_recurrent_loss_padding_has_no_effect[DDPG]",
    target=MASKS + "zero_masked",
)
def recurrent_loss_reads_padding(original: Any, batch: Any, mask: Tensor, **options: Any):
    """recurrent_loss: a NaN in padding reaches the gradient."""
    return batch


@seen_by(
    "tests/objectives/test_r2d2.py::test_r2d2_padding_has_no_effect_even_if_nan",
    target=MASKS + "zero_masked",
)
def r2d2_reads_padding(original: Any, batch: Any, mask: Tensor, **options: Any):
    """R2D2Loss: a NaN in padding reaches the gradient."""
    return batch


@seen_by(R2D2_IN_NUMPY, target=R2D2 + "R2D2Loss._compute_values")
def target_burned_in_online(original: Any, self: Any, parameters: Any, *rest: Any):
    """R2D2Loss: the target network runs with the online network's weights."""
    return original(self, self.value_network_params, *rest)


@seen_by(R2D2_IN_NUMPY, target=BURN_IN + "write_initial_states")
def burned_in_state_unused(original: Any, network: Any, windows: Any, learned: Any, steps: int):
    """R2D2Loss: the steps after the burn-in start from the stored state."""


@seen_by(R2D2_IN_NUMPY, target=R2D2 + "n_step_returns")
def returns_over_episodes(original: Any, rewards: Any, value: Any, ends: Tensor, *rest: Any):
    """R2D2Loss: rewards are summed over the end of an episode."""
    return original(rewards, value, torch.zeros_like(ends), *rest)


@seen_by(
    "tests/objectives/test_minibatches.py::test_minibatches_normalise_advantages_over_valid_steps",
    target=VALID_STEPS + "standardize",
)
def advantages_over_padding(
    original: Any, advantage: Tensor, mask: Tensor, *rest: Any, **options: Any
):
    """SequenceMinibatches: advantages are normalized over padding, too."""
    return original(advantage, torch.ones_like(mask), *rest, **options)


@seen_by(
    "tests/transforms/test_burn_in.py::test_burn_in_remaining_steps_equal_the_whole_sequence_by_hand[gru-True-0.0]",
    target=BURN_IN + "write_initial_states",
)
def burn_in_starts_late(original: Any, network: Any, windows: Any, learned: Any, steps: int):
    """BurnIn: the burn-in skips the first step."""
    return original(network, windows[:, 1:], learned, steps - 1)


@seen_by(
    "tests/transforms/test_windows.py::test_windows_state_is_the_one_entering_the_first_step[last]",
    target=WINDOWS + "Windows._gather",
)
def windows_store_the_next_state(original: Any, self: Any, steps: Any, *rest: Any):
    """Windows: the stored state is the one after the first step."""
    moved = {"recurrent_state": steps.get("recurrent_state").roll(-1, 0)}
    return original(self, steps.copy().update(moved), *rest)


@seen_by(
    "tests/transforms/test_windows.py::test_windows_residual_policy_gives_its_windows[10-4-drop-expected11]",
    target=STREAMS + "Cutter._find_spans",
)
def windows_off_by_one(original: Any, self: Any, *args: Any):
    """Windows: the first window of every episode starts one step late."""
    spans, keep, covered = original(self, *args)
    late = [(first + (first == 0 and end > 1), end) for first, end in spans]
    return late, keep, covered


@seen_by(
    "tests/transforms/test_refresh.py::"
    "test_refresh_buffer_holds_the_states_of_a_new_collection[window2-LazyTensorStorage]",
    target=REFRESH + "RefreshStates._run_windows",
)
def refresh_writes_the_wrong_step(
    original: Any, self: Any, stored: Any, index: Any, followers: Any
):
    """RefreshStates: a window starts from the state one step before its first step."""
    return original(self, stored, index, followers._replace(gap=(followers.gap - 1).clamp(min=1)))


@seen_by(
    "tests/deploy/test_stateful_policy.py::test_episode_over_in_vector_environments_equals_sequences[next_step-gru]",
    target=STATEFUL + "StatefulPolicy.episode_over",
)
def stateful_policy_restarts_early(original: Any, self: Any, done: Any):
    """StatefulPolicy: next-step environments restart one step early."""
    given, self.autoreset = self.autoreset, "same_step"
    original(self, done)
    self.autoreset = given


@seen_by(
    "tests/deploy/test_stateful_policy.py::test_call_with_ids_in_any_order_equals_sequences",
    target=TABLE + "StateTable.write",
)
def stateful_policy_shares_a_state(original: Any, self: Any, rows: Tensor, states: Any):
    """StatefulPolicy: states are written to environments that were not called."""
    return original(self, torch.arange(len(rows)), states)


@seen_by(
    "tests/transforms/test_previous.py::"
    "test_previous_action_and_reward_are_those_of_the_step_before[Choice]",
    target="rnnkeys.transforms.previous:PreviousActionReward._reset",
)
def previous_reward_survives_a_reset(original: Any, self: Any, tensordict: Any, reset: Any):
    """PreviousActionReward: an episode starts with the last reward of the one before."""
    reset = original(self, tensordict, reset)
    key = self.previous_reward_key
    return reset.set(key, torch.ones_like(reset.get(key)))


@seen_by(
    "tests/collectors/test_remote.py::test_trajectories_of_all_actors_have_different_numbers",
    target=ACTORS + "_TrajectoryNumbers.renumber",
)
def actors_share_trajectories(original: Any, self: Any, actor: int, own: Tensor):
    """Actors: trajectories of two actors have the same number."""
    return original(self, 0, own)
