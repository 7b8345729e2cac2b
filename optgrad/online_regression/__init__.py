"""J. Duda, "SGD momentum optimizer with step estimation by online parabola model", and sequels."""

from optgrad.online_regression.ogr1d import ogr1d  # isort: skip
from optgrad.online_regression.ogr1ds import ogr1ds  # isort: skip
from optgrad.online_regression.ogr1dc import ogr1dc  # isort: skip
from optgrad.online_regression.adaptive_sgd import adaptive_sgd  # isort: skip
from optgrad.online_regression.adaptive_sgd_c import adaptive_sgd_c  # isort: skip
from optgrad.online_regression.auto import auto, mean_position  # isort: skip
from optgrad.online_regression.ogr_diagonal import ogr_diagonal  # isort: skip
from optgrad.online_regression.ogr_full import ogr_full  # isort: skip
from optgrad.online_regression.ogr_subspace import ogr_subspace  # isort: skip
from optgrad.online_regression.ogr_diagonal_subspace import ogr_diagonal_subspace  # isort: skip
from optgrad.online_regression.momentum_sgd_hybrid import (  # isort: skip
    momentum_sgd_hybrid,
    scale_by_momentum_sgd_hybrid,
)

__all__ = [
    "adaptive_sgd",
    "adaptive_sgd_c",
    "auto",
    "mean_position",
    "momentum_sgd_hybrid",
    "ogr1d",
    "ogr1dc",
    "ogr1ds",
    "ogr_diagonal",
    "ogr_diagonal_subspace",
    "ogr_full",
    "ogr_subspace",
    "scale_by_momentum_sgd_hybrid",
]
