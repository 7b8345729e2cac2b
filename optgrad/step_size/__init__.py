"""The step-size rules that H. Yao, "Learning to Accelerate by … Step-size Planning", reviews."""

from optgrad.step_size.polyak import polyak  # isort: skip
from optgrad.step_size.sps import sps  # isort: skip
from optgrad.step_size.l4 import l4  # isort: skip
from optgrad.step_size.l4_momentum import l4_momentum  # isort: skip
from optgrad.step_size.l4_adam import l4_adam  # isort: skip
from optgrad.step_size.lossgrad import lossgrad  # isort: skip
from optgrad.step_size.idbd import idbd  # isort: skip
from optgrad.step_size.vsgd import vsgd  # isort: skip
from optgrad.step_size.vsgd_fd import vsgd_fd  # isort: skip
from optgrad.step_size.delta_bar_delta import delta_bar_delta  # isort: skip

__all__ = [
    "delta_bar_delta",
    "idbd",
    "l4",
    "l4_adam",
    "l4_momentum",
    "lossgrad",
    "polyak",
    "sps",
    "vsgd",
    "vsgd_fd",
]
