"""H. Yao, "Learning to Accelerate by the Methods of Step-size Planning"."""

from optgrad.step_size_planning.csawg import csawg
from optgrad.step_size_planning.csawg_repeated import csawg_repeated

__all__ = ["csawg", "csawg_repeated"]
