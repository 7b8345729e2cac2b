"""Transformations around any other transformation."""

from optgrad.wrappers.multi_steps import MultiSteps, MultiStepsState

__all__ = ["MultiSteps", "MultiStepsState"]
