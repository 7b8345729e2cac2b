"""Balles & Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic Gradients"."""

from optgrad.dissecting_adam.ssd import scale_by_ssd, ssd  # isort: skip
from optgrad.dissecting_adam.m_ssd import m_ssd, scale_by_m_ssd  # isort: skip
from optgrad.dissecting_adam.svag import scale_by_svag, svag  # isort: skip
from optgrad.dissecting_adam.m_svag import m_svag, scale_by_m_svag  # isort: skip
from optgrad.dissecting_adam.m_svag_mb import m_svag_mb, scale_by_m_svag_mb  # isort: skip
from optgrad.dissecting_adam.adam_star import adam_star, scale_by_adam_star  # isort: skip
from optgrad.dissecting_adam.adam_star_mb import adam_star_mb, scale_by_adam_star_mb  # isort: skip
from optgrad.dissecting_adam.adam_sign import adam_sign, scale_by_adam_sign  # isort: skip

__all__ = [
    "adam_sign",
    "adam_star",
    "adam_star_mb",
    "m_ssd",
    "m_svag",
    "m_svag_mb",
    "scale_by_adam_sign",
    "scale_by_adam_star",
    "scale_by_adam_star_mb",
    "scale_by_m_ssd",
    "scale_by_m_svag",
    "scale_by_m_svag_mb",
    "scale_by_ssd",
    "scale_by_svag",
    "ssd",
    "svag",
]
