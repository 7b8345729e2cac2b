"""Optimizers that know about curvature, gradient variance and step size, for optax."""

from optgrad import baselines
from optgrad.core.oracles import gradient_variance, per_example_grads, value_grad_and_variance
from optgrad.dissecting_adam import (
    adam_sign,
    adam_star,
    adam_star_mb,
    m_ssd,
    m_svag,
    m_svag_mb,
    scale_by_adam_sign,
    scale_by_adam_star,
    scale_by_adam_star_mb,
    scale_by_m_ssd,
    scale_by_m_svag,
    scale_by_m_svag_mb,
    scale_by_ssd,
    scale_by_svag,
    ssd,
    svag,
)
from optgrad.registry import Method, Tunable, create, get_method, inject, methods, register

__version__ = "0.1.0"

__all__ = [
    "Method",
    "Tunable",
    "adam_sign",
    "adam_star",
    "adam_star_mb",
    "baselines",
    "create",
    "get_method",
    "gradient_variance",
    "inject",
    "m_ssd",
    "m_svag",
    "m_svag_mb",
    "methods",
    "per_example_grads",
    "register",
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
    "value_grad_and_variance",
]
