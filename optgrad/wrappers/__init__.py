"""Transformations around any other transformation."""

from optgrad.wrappers.across_devices import across_devices
from optgrad.wrappers.filter_extra import filter_extra
from optgrad.wrappers.multi_steps import MultiSteps, MultiStepsState
from optgrad.wrappers.on_subtree import OnSubtreeState, on_subtree

__all__ = [
    "MultiSteps",
    "MultiStepsState",
    "OnSubtreeState",
    "across_devices",
    "filter_extra",
    "on_subtree",
]
