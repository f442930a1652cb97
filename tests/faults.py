"""Faults that the tests have to catch; ``python -m scripts.check_faults`` plants them one by one.

A fault is a mistake that somebody could make. When the source that it changes moves, rewrite it: a
fault that is dropped is a test that nobody has seen fail. Its tests are few and fast, so that the
whole list runs in a minute or two.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One mistake, and the tests that see it.

    Attributes:
        name: the mistake in words.
        file: path of the changed file, from the root of the project.
        before: source that is there exactly once.
        after: what replaces it; must still be valid Python.
        tests: arguments of pytest that select the tests which have to fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def _reference(way: str, marks: str = "random", shape: str = "plain") -> tuple[str, ...]:
    """One case of the contract test; ``way`` is a way to run time, a cell and a dtype."""
    return (f"tests/backends/test_contract.py::test_equals_the_reference[{way}-{shape}-{marks}]",)


_CELLS = (
    Fault(
        "LSTM: input and forget gate swapped",
        "rnnkeys/cells.py",
        "i, f, g, o = (gates_x + gates_h).chunk(4, -1)",
        "f, i, g, o = (gates_x + gates_h).chunk(4, -1)",
        _reference("loop-lstm-float64"),
    ),
    Fault(
        "GRU: update gate keeps the candidate, not the state",
        "rnnkeys/cells.py",
        "return ((1 - z) * n + z * state[0],)",
        "return (z * n + (1 - z) * state[0],)",
        _reference("loop-gru-float64"),
    ),
    Fault(
        "GRU: reset gate before the recurrent bias",
        "rnnkeys/cells.py",
        "n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()",
        "n = ((x_n + h_n) * (x_r + h_r).sigmoid()).tanh()",
        _reference("loop-gru-float64"),
    ),
)

_OWN_CELLS = (
    Fault(
        "LayerNorm-LSTM: gates in torch's order",
        "rnnkeys/cells.py",
        "i, f, o, u = (gates_x + gates_h).chunk(4, -1)",
        "i, f, u, o = (gates_x + gates_h).chunk(4, -1)",
        _reference("loop-lstm_ln-float64"),
    ),
    Fault(
        "LayerNorm-LSTM: the norm of the input is used for the state",
        "rnnkeys/cells.py",
        'return self._norm("h", F.linear',
        'return self._norm("x", F.linear',
        _reference("loop-lstm_ln-float64"),
    ),
    Fault(
        "a step module's output takes the place of its first state",
        "rnnkeys/stacks.py",
        "return weights(gates_x, *(s.clone() for s in state[1:]))",
        "return weights(gates_x, state[0][..., :4], *state[2:])",
        (
            "tests/modules/test_custom_cells.py::"
            "test_sequences_equal_steps_with_every_gradient[step-loop-agents0]",
        ),
    ),
    Fault(
        "the trial of a step module runs on the module itself",
        "rnnkeys/stacks.py",
        "copy.deepcopy(self[layer]).eval()",
        "self[layer]",
        ("tests/modules/test_custom_cells.py::test_a_trial_of_a_step_module_leaves_no_trace",),
    ),
)

_SEGMENTS = (
    Fault(
        "a row does not start a segment",
        "rnnkeys/segments.py",
        "        marks[:, 0] = True\n",
        "",
        _reference("pad-gru-float64", "none"),
    ),
    Fault(
        "segments end one step early",
        "rnnkeys/segments.py",
        "self.lengths = np.diff(self.starts, append=marks.size)",
        "self.lengths = np.maximum(np.diff(self.starts, append=marks.size) - 1, 1)",
        _reference("pad-gru-float64"),
    ),
    Fault(
        "a kept plan is found by shape, not by marks",
        "rnnkeys/segments.py",
        "key = marks.shape, marks.tobytes(), is_init.device",
        "key = marks.shape, is_init.device",
        _reference("pad-gru-float64", "none") + _reference("pad-gru-float64", "at the last step"),
    ),
    Fault(
        "gradients of padding reach the last real step",
        "rnnkeys/segments.py",
        "grad.index_fill_(0, ctx.unused, 0.0)",
        "pass",
        _reference("vendor-lstm-float32"),
    ),
    Fault(
        "vendor: what a gap repeats is the output before a segment",
        "rnnkeys/segments.py",
        "return rows if self.is_dense else rows.index_fill_(0, self.padding, 0.0)",
        "return rows",
        ("tests/backends/test_native.py::test_shared_rows_need_no_workspace_that_is_known",),
    ),
    Fault(
        "vendor: outputs share memory with what the backward pass reads",
        "rnnkeys/backends/onednn.py",
        "return batches[0].clone(memory_format=torch.contiguous_format)",
        "return batches[0]",
        (
            "tests/modules/test_modules.py::test_an_activation_in_place_changes_no_state[False-True-1-pad-lstm]",
        ),
    ),
    Fault(
        "states are taken one step after the segments' starts",
        "rnnkeys/segments.py",
        "_take(state, self.starts[: self.sizes[0]])",
        "_take(state, (self.starts[: self.sizes[0]] + 1).clamp(max=self.source.numel() - 1))",
        _reference("pad-gru-float64"),
    ),
    Fault(
        "a segment with a stored state goes on in another's row",
        "rnnkeys/layouts.py",
        "return max(rows, int(carried.sum()))",
        "return rows",
        ("tests/backends/test_packing.py::test_segments_that_share_rows_have_gaps_between_them",),
    ),
    Fault(
        "segments that share a row have no gap between them",
        "rnnkeys/layouts.py",
        "bisect.insort(left, (free - length - 1, row))",
        "bisect.insort(left, (free - length, row))",
        ("tests/backends/test_packing.py::test_segments_that_share_rows_have_gaps_between_them",),
    ),
    Fault(
        "segments go to the emptiest of the rows that hold them",
        "rnnkeys/layouts.py",
        "free, row = left.pop(k)",
        "free, row = left.pop()",
        ("tests/backends/test_packing.py::test_shared_rows_are_as_short_as_segments_allow",),
    ),
    Fault(
        "a state that has a gradient counts as zeros",
        "rnnkeys/segments.py",
        "if torch.is_grad_enabled() and any(state.requires_grad for state in states):",
        "if False:",
        ("tests/backends/test_native.py::test_a_state_with_a_gradient_shares_no_row",),
    ),
)

_LOOP = (
    Fault(
        "loop: a reset is dropped",
        "rnnkeys/backends/loop.py",
        "if reset is not None and t:",
        "if reset is not None and t > 1:",
        _reference("loop-gru-float64", "everywhere"),
    ),
    Fault(
        "loop: a row starts from zeros, not from its stored state",
        "rnnkeys/backends/loop.py",
        "start = tuple(s[0] for s in reset_state)",
        "start = tuple(s[0] * 0 for s in reset_state)",
        _reference("loop-gru-float64"),
    ),
)

_SCAN = (
    Fault(
        "fused: the recurrent bias is forgotten",
        "rnnkeys/backends/ops.py",
        "bias = b_ih + b_hh",
        "bias = b_ih",
        _reference("scan-lstm-float64"),
    ),
    Fault(
        "fused: a reset is dropped",
        "rnnkeys/backends/fused.py",
        "    if resets is not None and t:\n",
        "    if resets is not None and t > 1:\n",
        _reference("scan-lstm-float64", "everywhere"),
    ),
    Fault(
        "fused: the gradient passes a reset",
        "rnnkeys/backends/fused.py",
        "        grad.masked_fill_(where, 0)\n",
        "",
        _reference("scan-gru-float64", "two in a row"),
    ),
    Fault(
        "fused: the gradient that arrives at the cell state is zeroed",
        "rnnkeys/backends/fused_lstm.py",
        "if grad is not None:",
        "if grad is not None and sum_t is dh_t:",
        _reference("scan-lstm-float64"),
    ),
    Fault(
        "fused: the forget gate does not scale the gradient",
        "rnnkeys/backends/fused_lstm.py",
        "            dc_t.mul_(f[k])\n",
        "",
        _reference("scan-lstm-float64", "none"),
    ),
    Fault(
        "fused: GRU's recurrent bias has the gradient of the input's",
        "rnnkeys/backends/fused_gru.py",
        "torch.mul(by_n, r, out=by_h_n)",
        "by_h_n.copy_(by_n)",
        _reference("scan-gru-float64"),
    ),
    Fault(
        "fused: reset states have no gradient",
        "rnnkeys/backends/ops.py",
        "of_x, of_reset = d_x if wants[0] else None, d_reset if wants[1] else None",
        "of_x, of_reset = d_x if wants[0] else None, None",
        _reference("scan-gru-float64", "everywhere"),
    ),
    Fault(
        "fused: without a backward pass chunks run from the last to the first",
        "rnnkeys/backends/fused.py",
        "return list(chunks(sizes, width))[::-1]",
        "return list(chunks(sizes, width))",
        (
            "tests/backends/test_ops.py::test_states_do_not_depend_on_what_is_kept[lstm-packed-False]",
        ),
    ),
    Fault(
        "fused: a chunk of steps begins with the states of the step before",
        "rnnkeys/backends/fused.py",
        "return after[begin - rows : end - rows]",
        "return after[begin:end]",
        (
            "tests/backends/test_contract.py::test_equals_the_reference_where_time_is_long[scan-gru-none]",
        ),
    ),
)

_PAD = (
    Fault(
        "vendor: recovered cell states miss the state before",
        "rnnkeys/backends/vendor.py",
        "previous = c_now.addcmul_(f_now, previous[: c_now.shape[0]])",
        "previous = c_now",
        ("tests/backends/test_native.py::test_states_that_are_hidden_are_computed[False-random]",),
    ),
    Fault(
        "vendor: the recovery reads the output of the same step",
        "rnnkeys/backends/vendor.py",
        "return torch.cat([start, *(s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True))])",
        "return torch.cat(steps)",
        ("tests/backends/test_native.py::test_states_that_are_hidden_are_computed[False-random]",),
    ),
    Fault(
        "vendor: gradients are differentiated twice in silence",
        "rnnkeys/backends/onednn.py",
        "if torch.is_grad_enabled():\n        raise",
        "if False:\n        raise",
        (
            "tests/backends/test_ops.py::test_a_second_derivative_is_refused_by_name[random-episodes-vendor-lstm]",
        ),
    ),
    Fault(
        "vendor: a gradient stops between two blocks",
        "rnnkeys/backends/onednn.py",
        "h, c, last = ran.h, ran.c, ran.c.detach()",
        "h, c, last = ran.h, ran.c.detach(), ran.c.detach()",
        (
            "tests/backends/test_contract.py::test_equals_the_reference_where_time_is_long"
            "[vendor-lstm-one long among short]",
        ),
    ),
    Fault(
        "vendor: a gradient stops between two pieces of rows that segments share",
        "rnnkeys/backends/onednn.py",
        "Ran(*ran), (d_y_k, d_h, d_c)",
        "Ran(*ran), (d_y_k, d_h, None)",
        (
            "tests/backends/test_native.py::test_shared_rows_equal_the_reference[pieces-random-True]",
        ),
    ),
    Fault(
        "vendor: torch refuses a second derivative without a remedy",
        "rnnkeys/backends/onednn.py",
        "y.register_hook(lambda _: refuse_second_order())",
        "pass",
        (
            "tests/backends/test_ops.py::test_a_second_derivative_is_refused_by_name[none-random-vendor-lstm]",
        ),
    ),
    Fault(
        "memory is given back after every pass",
        "rnnkeys/backends/__init__.py",
        "        keep_freed_memory()\n",
        "",
        ("tests/backends/test_native.py::test_a_pass_takes_the_memory_that_the_last_one_freed",),
    ),
    Fault(
        "vendor: states in a wrong place are believed",
        "rnnkeys/backends/workspace.py",
        "error = np.abs(i * g + f * before - after)",
        "error = np.zeros(1)",
        ("tests/backends/test_native.py::test_a_wrong_place_of_hidden_states_is_noticed",),
    ),
    Fault(
        "oneDNN gets weights that it multiplies slowly",
        "rnnkeys/backends/products.py",
        "return weight if weight.is_contiguous() or weight.t().is_contiguous() else",
        "return weight if weight.ndim == 2 else",
        (
            "tests/backends/test_native.py::test_products_with_part_of_a_weight_are_those_with_a_copy",
        ),
    ),
    Fault(
        "vendor: a gap leaves the forget gate open",
        "rnnkeys/backends/onednn.py",
        "[_SHUT, _SHUT, 0, -_SHUT]",
        "[_SHUT, 0, 0, -_SHUT]",
        ("tests/backends/test_native.py::test_shared_rows_equal_the_reference[whole-random-True]",),
    ),
    Fault(
        "vendor: large weights open gaps",
        "rnnkeys/backends/onednn.py",
        "_SHUT = -3e38",
        "_SHUT = -1e4",
        ("tests/backends/test_native.py::test_large_weights_do_not_open_gaps[bias_ih_l0]",),
    ),
    Fault(
        "vendor: a gap repeats the input before it",
        "rnnkeys/backends/onednn.py",
        "    wide.index_fill_(0, plan.padding, 0)\n",
        "",
        (
            "tests/backends/test_native.py::test_a_state_that_no_output_shows_stays_in_its_episode[3.4e+38]",
        ),
    ),
    Fault(
        "vendor: a gap does not show the state that passes it",
        "rnnkeys/backends/onednn.py",
        "[_SHUT, _SHUT, 0, -_SHUT]",
        "[_SHUT, _SHUT, 0, 0]",
        ("tests/backends/test_native.py::test_biases_that_open_gaps_are_noticed",),
    ),
    Fault(
        "vendor: several gradients at once fail without a remedy",
        "rnnkeys/backends/onednn.py",
        "        _refuse_several(grads[0])\n",
        "",
        (
            "tests/backends/test_ops.py::"
            "test_several_gradients_at_once_equal_those_one_by_one_or_are_refused[episodes]",
        ),
    ),
    Fault(
        "a forked child waits for a lock for ever",
        "rnnkeys/segments.py",
        'if hasattr(os, "register_at_fork"):',
        "if False:",
        (
            "tests/backends/test_packing.py::test_a_child_that_is_forked_while_a_thread_plans_can_plan",
        ),
    ),
    Fault(
        "layers with a projection share rows, which only the vendor's kernel clears",
        "rnnkeys/backends/__init__.py",
        "if layers[0].w_hr is not None:",
        "if False:",
        ("tests/backends/test_native.py::test_layers_with_a_projection_share_no_rows[False]",),
    ),
    Fault(
        "vendor: what is not finite passes a gap",
        "rnnkeys/backends/onednn.py",
        "if not _all_zero(y, plan.gaps):",
        "if False:",
        ("tests/backends/test_native.py::test_what_is_not_finite_stays_in_its_episode[nan]",),
    ),
    Fault(
        "vendor: a gradient that is not finite passes a gap",
        "rnnkeys/backends/onednn.py",
        "if _all_zero(grads[0], plan.gaps):",
        "if True:",
        (
            "tests/backends/test_native.py::test_a_gradient_that_is_not_finite_stays_in_its_episode[nan]",
        ),
    ),
    Fault(
        "vendor: the last steps of pieces give their states to segments' starts",
        "rnnkeys/backends/onednn.py",
        "index - first if first else index",
        "index - begin if begin else index",
        ("tests/backends/test_native.py::test_shared_rows_tell_states_at_starts[pieces-True]",),
    ),
)

_LAYERS = (
    Fault(
        "states of lower layers are those of the top one",
        "rnnkeys/backends/__init__.py",
        "enumerate(zip(*history, strict=True))",
        "enumerate(zip(*[history[-1]] * len(history), strict=True))",
        _reference("loop-lstm-float64", shape="three layers"),
    ),
    Fault(
        "states that nobody asked a gradient of carry one",
        "rnnkeys/backends/__init__.py",
        "torch.is_grad_enabled() and options.state_grad",
        "torch.is_grad_enabled()",
        (
            "tests/modules/test_modules.py::test_written_states_are_detached_unless_asked_for[scan-gru]",
        ),
    ),
    Fault(
        "a state that is not stored is a stale number, not NaN",
        "rnnkeys/backends/__init__.py",
        'return state.masked_fill(~starts[:, :, None, None], float("nan"))',
        "return state",
        ("tests/modules/test_modules.py::test_states_may_be_stored_at_starts_only[scan-gru]",),
    ),
)

_LEAKS = (
    Fault(
        "loop: resets multiply instead of selecting",
        "rnnkeys/backends/loop.py",
        "torch.where(where, a, b) for a, b",
        "where * a + ~where * b for a, b",
        (
            "tests/modules/test_leaks.py::test_what_is_not_finite_stays_in_its_segment"
            "[loop-gru-one step-nan]",
        ),
    ),
    Fault(
        "fused: a reset multiplies the gradient by zero",
        "rnnkeys/backends/fused.py",
        "grad.masked_fill_(where, 0)",
        "grad.mul_(~where)",
        (
            "tests/modules/test_leaks.py::test_an_incoming_gradient_that_is_not_finite_stays_in_its_segment"
            "[scan-gru-one step-nan]",
        ),
    ),
    Fault(
        "a single step multiplies a stale state by zero",
        "rnnkeys/entries.py",
        ".masked_fill(fresh, 0) for s in data.states",
        ".mul(~fresh) for s in data.states",
        (
            "tests/modules/test_modules.py::test_a_stale_state_that_is_not_a_number_does_not_pass[False-gru]",
        ),
    ),
)

_MODULES = (
    Fault(
        "agents: time is put back in the wrong place",
        "rnnkeys/entries.py",
        "return unfolded.movedim(time + agents, time) if agents else unfolded",
        "return unfolded.reshape(*shape, *entry.shape[2:])",
        ("tests/modules/test_modules.py::test_sequences_equal_steps[dtype0-[B, T, A]-scan-gru]",),
    ),
    Fault(
        "a single step feeds every layer with the input",
        "rnnkeys/backends/step.py",
        "        x = state[0]\n        after.append(state)",
        "        x = state[0] if layer == len(layers) - 1 else state[0] * 0\n"
        "        after.append(state)",
        ("tests/modules/test_modules.py::test_sequences_equal_steps[dtype0-[B, T]-scan-gru]",),
    ),
    Fault(
        "the output of a single step shares memory with the state",
        "rnnkeys/backends/step.py",
        "return x.clone(), tuple(",
        "return x, tuple(",
        (
            "tests/modules/test_modules.py::test_an_activation_in_place_changes_no_state[True-False-1-loop-gru]",
        ),
    ),
    Fault(
        "a module of one step changes the states of other steps",
        "rnnkeys/stacks.py",
        "*(s.clone() for s in state[1:])",
        "*state[1:]",
        ("tests/modules/test_custom_cells.py::test_a_module_may_change_its_state_in_place[pad]",),
    ),
    Fault(
        "padding adds to the returns of the steps before it",
        "rnnkeys/objectives/wiring.py",
        "ends = ends | (mask[..., :-1] & ~mask[..., 1:])",
        "pass",
        ("tests/objectives/test_targets.py::test_padding_changes_no_target[GAE]",),
    ),
    Fault(
        "IQL learns from padding",
        "rnnkeys/objectives/wiring.py",
        "    if isinstance(loss, IQLLoss) and not is_compiling():\n",
        "    if False:\n",
        (
            "tests/objectives/test_recurrent_loss.py::test_iql_learns_nothing_from_masked_steps[False]",
        ),
    ),
    Fault(
        "the next view of a critic starts from zeros in silence",
        "rnnkeys/objectives/refusals.py",
        "                _refuse_states_never_stored(loss, tensordict, one)\n",
        "                pass\n",
        (
            "tests/objectives/test_policy_gradients.py::test_a_critic_whose_states_nobody_collected_is_refused[GAE]",
        ),
    ),
    Fault(
        "a done that no mark follows ends no slice of a burn-in",
        "rnnkeys/transforms/burn_in.py",
        "        tensordict = set_segment_starts(tensordict, self._init_keys)\n",
        "",
        ("tests/transforms/test_burn_in.py::test_a_done_that_no_mark_follows_ends_a_slice",),
    ),
    Fault(
        "episodes of a checkpoint and new ones have the same numbers",
        "rnnkeys/transforms/windows.py",
        'self._episodes = state["episodes"]',
        "pass",
        ("tests/transforms/test_windows.py::test_episodes_of_a_checkpoint_are_numbered_on",),
    ),
    Fault(
        "states are written in autocast's dtype, not the primer's",
        "rnnkeys/recurrent.py",
        "return tuple(entries.as_dtype(s, dtype) for s in states)",
        "return states",
        (
            "tests/modules/test_modules.py::"
            "test_autocast_computes_in_its_dtype_and_keeps_states_in_the_parameters[True-gru]",
        ),
    ),
    Fault(
        "layers run that have been replaced",
        "rnnkeys/recurrent.py",
        "if layers is not self._layers.module:",
        "if False:",
        (
            "tests/modules/test_modules.py::"
            "test_layers_that_replace_others_are_those_that_run[add_module-True-gru]",
        ),
    ),
    Fault(
        "dropout follows the mode of the module around the layers",
        "rnnkeys/layers.py",
        'if self._attributes["training"] else 0.0',
        "",
        ("tests/modules/test_modules.py::test_dropout_follows_the_mode_of_the_layers[True-gru]",),
    ),
    Fault(
        "tangents are lost where nothing has a gradient",
        "rnnkeys/backends/scan.py",
        "return forward_ad._current_level >= 0 or any(",
        "return any(",
        (
            "tests/modules/test_modules.py::test_forward_derivatives_equal_backward_ones[True-scan-gru]",
        ),
    ),
    Fault(
        "a copy reads the parameters of the original",
        "rnnkeys/recurrent.py",
        "        super().__setstate__(state)\n        self._look_at(self.layers)\n",
        "        super().__setstate__(state)\n",
        ("tests/modules/test_modules.py::test_a_copy_reads_its_own_parameters[gru]",),
    ),
    Fault(
        "the mode is not restored",
        "rnnkeys/mode.py",
        "recurrent_mode_state_manager.set_mode(stack.pop())",
        "stack.pop()",
        ("rnnkeys/mode.py",),
    ),
)

_MISUSE = (
    Fault(
        "an argument that contradicts the layers given is ignored",
        "rnnkeys/arguments.py",
        "if wanted not in (default, has):",
        "if wanted is nn:",
        (
            "tests/modules/test_misuse.py::test_layers_that_contradict_another_argument[num_layers-gru]",
        ),
    ),
    Fault(
        "a time dimension in another place is taken for a batch",
        "rnnkeys/entries.py",
        'if "time" in names[:-1]:',
        'if "time" in names[:-2]:',
        ("tests/modules/test_misuse.py::test_a_time_dimension_that_is_not_the_last_one[gru]",),
    ),
    Fault(
        "one state without the other counts as none",
        "rnnkeys/entries.py",
        "    if not present:\n        return None\n",
        "    if len(present) < len(keys):\n        return None\n",
        ("tests/modules/test_misuse.py::test_one_state_without_the_other[h-step]",),
    ),
    Fault(
        "keys that are assigned later are not read",
        "rnnkeys/recurrent.py",
        "return tuple(self.in_keys[1 : 1 + len(self.cell.state_names)])",
        "return tuple(self.DEFAULT_IN_KEYS)",
        ("tests/modules/test_misuse.py::test_keys_may_be_assigned_later[gru]",),
    ),
    Fault(
        "nested states do not follow the reset of their group",
        "rnnkeys/transforms/primers.py",
        "self.reset_key = _reset_key(parent._filtered_reset_keys, _groups(self.shapes))",
        "pass",
        (
            "tests/modules/test_primers.py::"
            "test_groups_that_end_in_other_places_follow_the_reset_that_counts[nested_1]",
        ),
    ),
    Fault(
        "two modules overwrite each other's state in silence",
        "rnnkeys/transforms/primers.py",
        "if one != other:",
        "if not one:",
        (
            "tests/modules/test_primers.py::test_two_modules_that_overwrite_each_others_state_are_warned_of",
        ),
    ),
    Fault(
        "states are made before starts are marked",
        "rnnkeys/transforms/primers.py",
        "return _compose(*trackers, *([] if primers is None else [primers]))",
        "return _compose(*([] if primers is None else [primers]), *trackers)",
        ("tests/modules/test_primers.py::test_starts_are_marked_before_states_are_made[gru]",),
    ),
)

_TARGETS = (
    Fault(
        "the next view is not marked",
        "rnnkeys/starts.py",
        "        marked.set(next_key(key), _next_marks(tensordict, key, starts))\n",
        "",
        ("tests/objectives/test_targets.py::test_next_values[DQN double delayed TD0-flat]",),
    ),
    Fault(
        "a step that follows a done starts nothing",
        "rnnkeys/starts.py",
        "return marks | torch.cat([torch.zeros_like(done.narrow(time, 0, 1)), follows], time)",
        "return marks",
        (
            "tests/objectives/test_targets.py::"
            "test_prioritized_slices_are_marked_although_their_sampler_marks_none[DDPG]",
        ),
    ),
    Fault(
        "returns run on into the slice behind",
        "rnnkeys/objectives/wiring.py",
        "    _mark_ends(loss, marked, wiring.init_keys, mask)\n",
        "",
        (
            "tests/objectives/test_targets.py::test_returns_stop_at_slices_that_nobody_truncated[GAE]",
        ),
    ),
    Fault(
        "TD3 cuts the critic's state away",
        "rnnkeys/objectives/wiring.py",
        "    _keep_cut_keys(loss)\n",
        "",
        (
            "tests/objectives/test_targets.py::test_the_critic_keeps_its_state_in_the_actor_loss_too[TD3]",
        ),
    ),
)

_DOCTOR = (
    Fault(
        "a row's first step is not marked in the next view",
        "rnnkeys/starts.py",
        "first = torch.ones_like(starts.narrow(time, 0, 1))",
        "first = torch.zeros_like(starts.narrow(time, 0, 1))",
        ("tests/transforms/test_next_init.py::test_marks_rows_of_a_batch",),
    ),
    Fault(
        "a sampler marks the next view of slices one step late",
        "rnnkeys/transforms/next_init.py",
        "starts = lengths.cumsum(0) - lengths",
        "starts = (lengths.cumsum(0) - lengths + 1).clamp_max(int(lengths.sum()) - 1)",
        ("tests/transforms/test_next_init.py::test_samplers_of_slices_shorter_than_asked[slices]",),
    ),
    Fault(
        "a wired loss leaves its marks in the batch",
        "rnnkeys/starts.py",
        "    marked = tensordict.copy()\n    if",
        "    marked = tensordict\n    if",
        ("tests/objectives/test_recurrent_loss.py::test_the_batch_stays_as_it_was[DDPG]",),
    ),
    Fault(
        "the doctor sees marks in the next view where there are none",
        "rnnkeys/doctor/batches.py",
        "return bool((ahead | ~starts).narrow(time, 1, steps).all())",
        "return True",
        ("tests/diagnostics/test_check_recurrent_policy.py::test_finds[next view not marked]",),
    ),
    Fault(
        "the doctor's single steps carry the state through starts",
        "rnnkeys/doctor/runs.py",
        "step.set(key, torch.where(wide, fallback, carried))",
        "step.set(key, carried)",
        ("tests/diagnostics/test_check_recurrent_policy.py::test_each_part_alone",),
    ),
    Fault(
        "staleness is measured from the state that was just made",
        "rnnkeys/doctor/runs.py",
        "        single = run_from_stored(policy, batch, recurrent)\n        key =",
        "        single = whole\n        key =",
        ("tests/diagnostics/test_check_recurrent_policy.py::test_finds[stale states]",),
    ),
    Fault(
        "the picture of the memory's reach counts age from the start",
        "rnnkeys/plots.py",
        ".norm(dim=-1).flip(0).cpu()",
        ".norm(dim=-1).cpu()",
        ("tests/diagnostics/test_plots.py::test_reach_is_the_gradient_by_age",),
    ),
)

_MINIBATCHES = (
    Fault(
        "a loss learns from advantages that are not finite",
        "rnnkeys/objectives/refusals.py",
        "            refuse_not_finite(tensordict, key, mask)\n",
        "            pass\n",
        (
            "tests/objectives/test_lost_causes.py::test_what_is_not_finite_is_refused_where_it_counts[ClipPPOLoss-advantage-nan]",
        ),
    ),
    Fault(
        "what is not finite is refused behind a mask, too",
        "rnnkeys/objectives/refusals.py",
        "        bad &= mask\n",
        "        pass\n",
        ("tests/objectives/test_minibatches.py::test_what_is_not_finite_is_refused",),
    ),
    Fault(
        "a loss does not look at what it would learn from",
        "rnnkeys/objectives/wiring.py",
        "        refuse_values(loss, tensordict)\n",
        "        pass\n",
        (
            "tests/objectives/test_lost_causes.py::test_nothing_to_learn_from_is_refused[ReinforceLoss]",
        ),
    ),
    Fault(
        "sequences are cut one step late",
        "rnnkeys/objectives/minibatches.py",
        "cuts |= (where - origin) % self.seq_len == 0",
        "cuts |= (where - origin) % self.seq_len == 1",
        ("tests/objectives/test_minibatches.py::test_minibatches_have_the_size_asked_for",),
    ),
    Fault(
        "advantages are normalised over masked steps too",
        "rnnkeys/objectives/minibatches.py",
        "chosen = advantage[valid]",
        "chosen = advantage.flatten()",
        (
            "tests/objectives/test_minibatches.py::test_advantages_are_normalised_over_unmasked_steps",
        ),
    ),
    Fault(
        "refreshed states run on into the next episode",
        "rnnkeys/objectives/minibatches.py",
        "torch.where(keep, stored, before)",
        "before",
        ("tests/objectives/test_minibatches.py::test_states_are_refreshed_between_epochs",),
    ),
    Fault(
        "a copy that fills a sequence up runs on from the step before",
        "rnnkeys/objectives/minibatches.py",
        "            _mark_filling(batch, self.init_key, chosen.length)\n",
        "",
        (
            "tests/objectives/test_policy_gradients.py::"
            "test_ratios_of_the_first_epoch_are_one[7-discrete-gru-shared]",
        ),
    ),
    Fault(
        "a critic without states starts from zeros in silence",
        "rnnkeys/objectives/refusals.py",
        "            refuse_lost_memory(tensordict, one, str(type(loss).__name__))\n",
        "            pass\n",
        (
            "tests/objectives/test_policy_gradients.py::"
            "test_a_critic_whose_states_nobody_collected_is_refused[GAE]",
        ),
    ),
)

_SEQUENCES = (
    Fault(
        "windows: what waits is covered by no window",
        "rnnkeys/transforms/windows.py",
        "return [(first + a, first + b) for a, b in spans], keep, covered - keep",
        "return [(first + a, first + b) for a, b in spans], keep, 0",
        (
            "tests/transforms/test_windows.py::test_batches_that_cut_episodes_change_no_window[last]",
        ),
    ),
    Fault(
        "windows: the state is the one after the first step",
        "rnnkeys/transforms/windows.py",
        "windows.set(key, value[steps[:, 0]])",
        "windows.set(key, value[steps[:, 1]])",
        (
            "tests/transforms/test_windows.py::test_the_state_is_the_one_that_enters_the_first_step[last]",
        ),
    ),
    Fault(
        "windows: fillers are not done",
        "rnnkeys/transforms/windows.py",
        'filler = key[0] == "next" and key[-1] in _ENDS',
        "filler = False",
        ("tests/transforms/test_windows.py::test_fillers_are_done_and_masked_and_nothing_else",),
    ),
    Fault(
        "burn-in: a start at the cut is run over",
        "rnnkeys/transforms/burn_in.py",
        "torch.where(reset, first, entering)",
        "entering",
        (
            "tests/transforms/test_burn_in.py::"
            "test_what_is_left_of_rows_equals_the_whole_by_hand[gru-True-0.4]",
        ),
    ),
    Fault(
        "burn-in: the state is taken one step late",
        "rnnkeys/transforms/burn_in.py",
        "entering = after.select(time, steps - 1)",
        "entering = after.select(time, steps)",
        (
            "tests/transforms/test_burn_in.py::"
            "test_what_is_left_of_rows_equals_the_whole_by_hand[gru-True-0.0]",
        ),
    ),
)

_AS_IN_NUMPY = (
    "tests/objectives/test_r2d2.py::test_loss_and_priorities_equal_numpys[as in the paper-True]",
)
_AGENTS = (
    Fault(
        "agents: one agent's steps are taken for another's",
        "rnnkeys/entries.py",
        "            entry = entry.movedim(time, time + agents)",
        "            pass",
        (
            "tests/modules/test_agents.py::"
            "test_what_happens_to_one_agent_reaches_no_other[gru-auto-observation]",
        ),
    ),
    Fault(
        "masks: a NaN at a masked step reaches the gradient of a wired loss",
        "rnnkeys/objectives/wiring.py",
        "tensordict = zero_masked(tensordict, mask, finite=False)",
        "pass",
        (
            "tests/objectives/test_bad_batches.py::"
            "test_what_is_masked_reaches_nothing_in_losses_of_torchrl[DDPG]",
        ),
    ),
    Fault(
        "masks: the weight of a masked window counts",
        "rnnkeys/objectives/r2d2.py",
        "loss * torch.where(mask, weights, 0.0)",
        "loss * weights",
        (
            "tests/objectives/test_bad_batches.py::"
            "test_whatever_stands_at_masked_steps_changes_nothing[weights-4]",
        ),
    ),
    Fault(
        "agents: a trajectory must end for all of them at once",
        "rnnkeys/entries.py",
        "-1).any(-1) if is_init.ndim > rank",
        "-1).all(-1) if is_init.ndim > rank",
        (
            "tests/modules/test_agents.py::"
            "test_agents_that_end_apart_remember_what_each_saw_in_its_own_episode[gru]",
        ),
    ),
    Fault(
        "agents: one agent that starts anew restarts all",
        "rnnkeys/entries.py",
        "    if marks.shape == shape:\n        return marks\n",
        "    if marks.shape == shape:\n"
        "        return marks.any(-1, True).expand(shape) if shape[len(lead):] else marks\n",
        (
            "tests/modules/test_agents.py::"
            "test_agents_that_end_apart_remember_what_each_saw_in_its_own_episode[gru]",
        ),
    ),
    Fault(
        "agents: steps of one agent are written to another",
        "rnnkeys/entries.py",
        "unfolded = entry.reshape(*lead[:-1]",
        "unfolded = entry.roll(1, 0).reshape(*lead[:-1]",
        (
            "tests/modules/test_agents.py::test_qmix_has_the_loss_and_gradients_of_single_steps[shared-gru]",
        ),
    ),
    Fault(
        "agents: a word is heard all the time",
        "tutorials/password.py",
        "word * told.unsqueeze(-1)",
        "word",
        ("tests/test_tutorial_qmix.py::test_an_agent_is_told_its_word_once_and_no_other_one",),
    ),
    Fault(
        "agents: one word opens the door",
        "tutorials/password.py",
        "== self.password).all(-1",
        "== self.password).any(-1",
        ("tests/test_tutorial_qmix.py::test_only_all_words_right_open_the_door[1]",),
    ),
)

_STATEFUL = (
    Fault(
        "stateful policy: next-step environments restart one step early",
        "rnnkeys/stateful.py",
        'over = self._ended.clone() if self.autoreset == "next_step" else done',
        "over = done",
        (
            "tests/deploy/test_stateful_policy.py::"
            "test_vector_environments_restart_where_episodes_do[next_step-gru]",
        ),
    ),
    Fault(
        "stateful policy: states are written to environments that were not asked",
        "rnnkeys/stateful.py",
        "held[index[written]] = after[written].to(held.dtype)",
        "held[: len(index)] = after.to(held.dtype)",
        (
            "tests/deploy/test_stateful_policy.py::test_environments_may_be_called_in_any_order_and_number",
        ),
    ),
)

_R2D2 = (
    Fault(
        "refresh: a window starts from the end of the one before, not from where it starts",
        "rnnkeys/transforms/refresh.py",
        "after[at, gap[index][leads] - 1]",
        "after[at, -1]",
        (
            "tests/transforms/test_refresh.py::"
            "test_a_buffer_holds_what_a_fresh_collection_would[window2-LazyTensorStorage]",
        ),
    ),
    Fault(
        "R2D2: a terminal state is bootstrapped from",
        "rnnkeys/objectives/r2d2.py",
        "value = torch.where(terminated, 0.0, value)",
        "value = torch.where(terminated, value, value)",
        _AS_IN_NUMPY,
    ),
    Fault(
        "R2D2: rewards are summed over the end of an episode",
        "rnnkeys/objectives/r2d2.py",
        "whole = torch.where(ends[:, :-1], ",
        "whole = torch.where(ends[:, :-1] & False, ",
        _AS_IN_NUMPY,
    ),
    Fault(
        "R2D2: the target network starts from the online network's state",
        "rnnkeys/objectives/r2d2.py",
        "target = self._unroll(self.target_value_network_params, windows, ends)",
        "target = self._unroll(self.value_network_params, windows, ends)",
        _AS_IN_NUMPY,
    ),
    Fault(
        "R2D2: what is masked has a part in the gradient",
        "rnnkeys/objectives/r2d2.py",
        "windows = zero_masked(windows, mask, integers=True)",
        "pass",
        ("tests/objectives/test_r2d2.py::test_what_is_masked_reaches_nothing_not_even_a_nan",),
    ),
    Fault(
        "R2D2: a window that starts an episode is burned in, too",
        "rnnkeys/transforms/burn_in.py",
        "marks[:, steps] |= goes_on",
        "marks[:, steps] |= goes_on | True",
        (
            "tests/objectives/test_r2d2.py::test_loss_and_priorities_equal_numpys"
            "[starts in the burn-in-True]",
        ),
    ),
    Fault(
        "R2D2 tutorial: a resumed run has forgotten its priorities",
        "tutorials/window_replay.py",
        "self.buffer.update_priority(torch.arange(len(priorities)), priorities)",
        "pass",
        ("tests/test_tutorial_r2d2.py::test_resume_goes_on_with_what_was_saved",),
    ),
    Fault(
        "R2D2 tutorial: windows start from stored states though zeros were asked for",
        "tutorials/window_replay.py",
        "windows.update({key: torch.zeros_like(",
        "windows.copy().update({key: torch.zeros_like(",
        ("tests/test_tutorial_r2d2.py::test_states_are_zeros_as_stored_or_refreshed",),
    ),
    Fault(
        "rescaling: the inverse subtracts what is nearly equal",
        "rnnkeys/objectives/rescaling.py",
        "return y.sign() * s * (s + 2)",
        "return y.sign() * ((s + 1) ** 2 - 1)",
        ("tests/objectives/test_r2d2.py::test_rescaling_is_undone_without_cancellation[0.001]",),
    ),
)

_EXPORT = (
    Fault(
        "an exported step forgets its states",
        "rnnkeys/export.py",
        "data.set(key, torch.zeros(*batch, 1,",
        "data.set(key, torch.ones(*batch, 1,",
        (
            "tests/deploy/test_export_step.py::test_the_batch_is_of_any_size_and_states_are_returned",
        ),
    ),
)

_POLICY_TUTORIALS = (
    Fault(
        "PPO collects without the critic's memory",
        "tutorials/ppo_networks.py",
        "TensorDictSequential(self.actor, *noise, *memories)",
        "TensorDictSequential(self.actor, *noise)",
        ("tests/test_policy_tutorials.py::test_ppo_learns_from_what_was_played",),
    ),
    Fault(
        "noise goes on over the end of an episode",
        "tutorials/lasting_noise.py",
        'torch.where(tensordict.get("is_init"), fresh, lasting)',
        "lasting",
        ("tests/test_policy_tutorials.py::test_noise_starts_anew_with_an_episode",),
    ),
    Fault(
        "noise that lasts grows",
        "tutorials/lasting_noise.py",
        "math.sqrt(1 - self.correlation**2)",
        "1",
        ("tests/test_policy_tutorials.py::test_noise_outlasts_a_step_and_no_ratio_tells",),
    ),
    Fault(
        "a return runs on into the next episode",
        "tutorials/recurrent_ppo.py",
        "self.so_far = self.so_far.masked_fill(done[:, t], 0)",
        "pass",
        ("tests/test_policy_tutorials.py::test_ppo_notes_the_returns_of_whole_episodes",),
    ),
    Fault(
        "REINFORCE plays the likeliest action only",
        "tutorials/recurrent_reinforce.py",
        "@set_exploration_type(ExplorationType.RANDOM)\n",
        "",
        ("tests/test_policy_tutorials.py::test_episodes_are_whole_and_masked_behind_their_end",),
    ),
)

_SAC = (
    Fault(
        "SAC learns from the burn-in",
        "tutorials/recurrent_sac.py",
        "steps >= self.settings.burn_in",
        "steps >= 0",
        ("tests/test_tutorial_sac.py::test_nothing_is_learned_from_the_burn_in",),
    ),
    Fault(
        "SAC's actor starts from other states than it had",
        "tutorials/recurrent_sac.py",
        "if key not in critics]",
        'if key not in [*critics, "actor_h"]]',
        ("tests/test_tutorial_sac.py::test_the_actor_starts_from_the_states_it_had",),
    ),
)


def _at_a_glance(form: str) -> tuple[str, ...]:
    """One interpreted problem in one form of the Triton kernels."""
    return (f"tests/backends/test_triton_interpreted.py::test_one_problem_at_a_glance[{form}]",)


_TRITON = (
    Fault(
        "triton: two gates swapped where they are split",
        "rnnkeys/backends/triton/pieces.py",
        "first, third = tl.split(even)",
        "third, first = tl.split(even)",
        _at_a_glance("split"),
    ),
    Fault(
        "triton: programs arrive and do not wait",
        "rnnkeys/backends/triton/pieces.py",
        'scope="gpu") < target:',
        'scope="gpu") < 0:',
        _at_a_glance("split"),
    ),
    Fault(
        "triton: a segment's length off by one",
        "rnnkeys/backends/triton/ordering.py",
        "torch.where(first, end - t, 0)",
        "torch.where(first, end - t - 1, 0)",
        _at_a_glance("split"),
    ),
    Fault(
        "triton: a reset dropped by the kernel of one step",
        "rnnkeys/backends/triton/pieces.py",
        "return (tl.load(is_init + step, mask=mask, other=0) != 0) | (t == 0)",
        "return (tl.load(is_init + step, mask=mask, other=0) > 1) | (t == 0)",
        _at_a_glance("stepwise"),
    ),
)

_PRECISION = (
    Fault(
        "precision: torch's high and medium swapped",
        "rnnkeys/precision.py",
        '"high": "high-prec", "medium": "fast"',
        '"high": "fast", "medium": "high-prec"',
        (
            "tests/backends/test_precision.py::test_every_order_of_precedence_resolves_as_in_torchrl[Hopper]",
        ),
    ),
    Fault(
        "precision: a block forgets what was set before",
        "rnnkeys/precision.py",
        "_torchrl._GLOBAL_OVERRIDE = self._saved.pop()",
        "_torchrl._GLOBAL_OVERRIDE = None",
        (
            "tests/backends/test_precision.py::"
            "test_a_block_puts_back_what_was_set_before_even_after_an_error",
        ),
    ),
    Fault(
        "precision: the library's flag is not put back",
        "rnnkeys/precision.py",
        "            flags.fp32_precision = before\n",
        "            pass\n",
        (
            "tests/backends/test_precision.py::test_the_library_runs_at_the_mode_and_is_put_back[highest]",
        ),
    ),
)

_ACTORS = (
    Fault(
        "actors: streams of two actors are joined",
        "tutorials/actors.py",
        "windows = self._of_actor[actor]",
        "windows = next(iter(self._of_actor.values()))",
        ("tests/test_actors.py::test_windows_join_only_what_one_actor_collected",),
    ),
    Fault(
        "actors: episodes of two actors have one number",
        "tutorials/actors.py",
        "* self.MOST_ACTORS + actor",
        "* self.MOST_ACTORS",
        ("tests/test_actors.py::test_no_two_episodes_have_the_same_number",),
    ),
    Fault(
        "actors: one that took the place of another gets no weights",
        "tutorials/actors.py",
        "        self.versions[actor] = 0\n",
        "",
        (
            "tests/test_actors.py::"
            "test_a_dead_actor_is_replaced_by_one_with_other_episodes_and_the_last_weights",
        ),
    ),
    Fault(
        "actors: one that took the place of another plays its episodes again",
        "tutorials/actors.py",
        "[seed, actor, life]",
        "[seed, actor]",
        (
            "tests/test_actors.py::"
            "test_a_dead_actor_is_replaced_by_one_with_other_episodes_and_the_last_weights",
        ),
    ),
    Fault(
        "actors: the quickest starves the others",
        "tutorials/actors.py",
        "for future in self.asked:",
        "for future in reversed(self.asked):",
        ("tests/test_actors.py::test_batches_come_in_the_order_in_which_they_are_ready",),
    ),
    Fault(
        "actors: deaths add up over the whole run",
        "tutorials/actors.py",
        "            self.failures[actor] = 0\n",
        "",
        ("tests/test_actors.py::test_deaths_with_batches_in_between_do_not_add_up",),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *(*_TRITON, *_PRECISION),
    *(*_POLICY_TUTORIALS, *_SAC, *_EXPORT, *_ACTORS),
    *(*_CELLS, *_OWN_CELLS, *_SEGMENTS, *_LOOP, *_SCAN, *_PAD),
    *(
        *_LAYERS,
        *_LEAKS,
        *_MODULES,
        *_MISUSE,
        *_TARGETS,
        *_DOCTOR,
        *_SEQUENCES,
        *_AGENTS,
        *_STATEFUL,
        *_R2D2,
        *_MINIBATCHES,
    ),
)
