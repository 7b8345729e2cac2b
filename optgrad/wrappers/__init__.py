"""Transformations around any other transformation."""

from optgrad.wrappers.filter_extra import filter_extra
from optgrad.wrappers.multi_steps import MultiSteps, MultiStepsState
from optgrad.wrappers.on_subtree import OnSubtreeState, on_subtree

__all__ = ["MultiSteps", "MultiStepsState", "OnSubtreeState", "filter_extra", "on_subtree"]
