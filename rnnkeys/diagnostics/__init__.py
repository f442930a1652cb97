"""Diagnostics of a recurrent wiring: ``check_recurrent_policy`` and plots."""

from .check_recurrent_policy import check_recurrent_policy as check_recurrent_policy
from .plots import plot_episode_states as plot_episode_states
from .plots import plot_state_staleness as plot_state_staleness
from .report import Report as Report
from .runs import Staleness as Staleness
from .runs import staleness_by_step as staleness_by_step
