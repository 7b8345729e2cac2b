"""Transformations around any other transformation."""

from optgrad.wrappers.across_devices import across_devices
from optgrad.wrappers.filter_extra import filter_extra
from optgrad.wrappers.low_precision_state import LowPrecisionState, low_precision_state
from optgrad.wrappers.multi_steps import MultiSteps, MultiStepsState
from optgrad.wrappers.on_subtree import OnSubtreeState, on_subtree

__all__ = [
    "LowPrecisionState",
    "MultiSteps",
    "MultiStepsState",
    "OnSubtreeState",
    "across_devices",
    "filter_extra",
    "low_precision_state",
    "on_subtree",
]
