"""The second-order methods of the survey slides, J. Duda, "Improving convergence of SGD"."""

from optgrad.curvature.nonlinear_cg import nonlinear_cg, scale_by_nonlinear_cg  # isort: skip
from optgrad.curvature.bfgs import bfgs, scale_by_bfgs  # isort: skip
from optgrad.curvature.newton import newton, scale_by_newton  # isort: skip
from optgrad.curvature.damped_newton import damped_newton, scale_by_damped_newton  # isort: skip
from optgrad.curvature.saddle_free_newton import saddle_free_newton, scale_by_saddle_free_newton  # isort: skip
from optgrad.curvature.truncated_newton import scale_by_truncated_newton, truncated_newton  # isort: skip
from optgrad.curvature.hessian_free import hessian_free  # isort: skip
from optgrad.curvature.gauss_newton import gauss_newton, scale_by_gauss_newton  # isort: skip
from optgrad.curvature.levenberg_marquardt import levenberg_marquardt  # isort: skip
from optgrad.curvature.runge_kutta import runge_kutta  # isort: skip
from optgrad.curvature.implicit_euler import implicit_euler  # isort: skip
from optgrad.curvature.lanczos_saddle_free import lanczos_saddle_free, scale_by_lanczos_saddle_free  # isort: skip
from optgrad.curvature.krylov_subspace_descent import krylov_subspace_descent  # isort: skip
from optgrad.curvature.tonga import scale_by_tonga, tonga  # isort: skip
from optgrad.curvature.inverse_diag_covariance import scale_by_inverse_diag_covariance  # isort: skip
from optgrad.curvature.kfac import kfac  # isort: skip
from optgrad.curvature.kfac_preconditioner import scale_by_kfac  # isort: skip
from optgrad.curvature.natural_gradient import natural_gradient, scale_by_natural_gradient  # isort: skip
from optgrad.curvature.fast_natural_newton import fast_natural_newton, scale_by_fast_natural_newton  # isort: skip
from optgrad.curvature.diagonal_gauss_newton import (
    diagonal_gauss_newton,
    scale_by_diagonal_gauss_newton,
)  # isort: skip

__all__ = [
    "bfgs",
    "damped_newton",
    "diagonal_gauss_newton",
    "fast_natural_newton",
    "gauss_newton",
    "hessian_free",
    "implicit_euler",
    "kfac",
    "krylov_subspace_descent",
    "lanczos_saddle_free",
    "levenberg_marquardt",
    "natural_gradient",
    "newton",
    "nonlinear_cg",
    "runge_kutta",
    "saddle_free_newton",
    "scale_by_bfgs",
    "scale_by_damped_newton",
    "scale_by_diagonal_gauss_newton",
    "scale_by_fast_natural_newton",
    "scale_by_gauss_newton",
    "scale_by_inverse_diag_covariance",
    "scale_by_kfac",
    "scale_by_lanczos_saddle_free",
    "scale_by_natural_gradient",
    "scale_by_newton",
    "scale_by_nonlinear_cg",
    "scale_by_saddle_free_newton",
    "scale_by_tonga",
    "scale_by_truncated_newton",
    "tonga",
    "truncated_newton",
]
