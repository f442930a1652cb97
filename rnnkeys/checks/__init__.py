"""Checks of batches, networks and losses: one check and one text for each mistake.

A check yields :class:`Problem`; :func:`raise_first` raises the first one. The call
``set_value_checks(False)`` switches off the checks that read values. ``docs/errors.md`` lists all
checks by name.
"""

from __future__ import annotations

from .actions import find_action_mask_problems as find_action_mask_problems
from .actions import find_action_problems as find_action_problems
from .actions import find_action_shape_problems as find_action_shape_problems
from .actions import find_one_hot_problems as find_one_hot_problems
from .arguments import as_float as as_float
from .arguments import as_int as as_int
from .arguments import check_choice as check_choice
from .entries import find_done_problems as find_done_problems
from .entries import find_empty_mask_problems as find_empty_mask_problems
from .entries import find_finite_problems as find_finite_problems
from .entries import find_init_problems as find_init_problems
from .entries import find_loss_mask_problems as find_loss_mask_problems
from .entries import find_mask_problems as find_mask_problems
from .entries import find_meta_problems as find_meta_problems
from .entries import find_multi_step_problems as find_multi_step_problems
from .entries import find_next_problems as find_next_problems
from .entries import find_step_problems as find_step_problems
from .entries import find_tensor_problems as find_tensor_problems
from .entries import find_type_problems as find_type_problems
from .problem import Problem as Problem
from .problem import raise_first as raise_first
from .problem import warn_caller as warn_caller
from .state_keys import RecurrentLayer as RecurrentLayer
from .state_keys import find_shared_key_problems as find_shared_key_problems
from .state_keys import read_state_keys as read_state_keys
from .switch import can_read_values as can_read_values
from .switch import set_value_checks as set_value_checks
from .switch import should_read_values as should_read_values
from .switch import suspend_value_checks as suspend_value_checks
from .switch import value_checks_enabled as value_checks_enabled
