"""Transformations around any other transformation."""

from optgrad.wrappers.across_devices import across_devices
from optgrad.wrappers.filter_extra import filter_extra
from optgrad.wrappers.guard import (
    GuardState,
    NonFiniteStepsError,
    check_guard,
    guard,
)
from optgrad.wrappers.low_precision_state import LowPrecisionState, low_precision_state
from optgrad.wrappers.monitor import MonitorState, monitor, monitored
from optgrad.wrappers.multi_steps import MultiSteps, MultiStepsState
from optgrad.wrappers.on_subtree import OnSubtreeState, on_subtree

__all__ = [
    "GuardState",
    "LowPrecisionState",
    "MonitorState",
    "MultiSteps",
    "MultiStepsState",
    "NonFiniteStepsError",
    "OnSubtreeState",
    "across_devices",
    "check_guard",
    "filter_extra",
    "guard",
    "low_precision_state",
    "monitor",
    "monitored",
    "on_subtree",
]
