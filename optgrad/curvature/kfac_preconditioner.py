"""K-FAC's preconditioner alone."""

from collections.abc import Collection
from typing import Any, NamedTuple

import chex
import optax

from optgrad.core import checks, linalg, transforms
from optgrad.curvature import kfac_factors, kfac_layers, trial

STATISTICS_COST = 1.0  # gradient equivalents: a forward pass, and a backward one to the layers


class ScaleByKFACState(NamedTuple):
    """Kronecker factors of all layers."""

    count: chex.Array  # number of updates, int32 ()
    rejected: chex.Array  # updates that were zero since they were not finite, int32 ()
    cost: chex.Array  # gradient equivalents of all steps so far, shape ()
    damping: chex.Array  # λ, shape ()
    curvature: kfac_factors.Curvature  # factors and inverses, of in² and out² numbers a layer

    def diagnostics(self) -> dict[str, chex.Array]:
        """Costs and damping."""
        return {
            "gradient_equivalents": self.cost,
            "rejected_steps": self.rejected,
            "damping": self.damping,
        }


def scale_by_kfac(
    damping: float | optax.Schedule = 1e-3,
    *,
    decay: float | optax.Schedule = 0.95,
    period: int = 10,
    layers: Collection[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC's preconditioned gradient Ā⁻¹GS⁻¹, without momentum, clip or learning rate.

    Leaves that belong to no layer keep their gradient. See `kfac`, whose arguments these are.
    """
    check_arguments(damping, decay, period)

    def init(params: optax.Params) -> ScaleByKFACState:
        own = kfac_layers.blocks(params, kfac_layers.find_layers(params, layers))
        start = trial.scalar(transforms.hyperparameter_at(damping, trial.zero_count()))
        return ScaleByKFACState(
            count=trial.zero_count(),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
            damping=start,
            curvature=kfac_factors.init(own, start),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByKFACState,
        params: optax.Params | None = None,
        *,
        kfac_stats: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleByKFACState]:
        del extra
        params = transforms.require_params(params)
        found = kfac_layers.find_layers(params, layers)
        own = kfac_layers.blocks(params, found)
        strength = trial.scalar(transforms.hyperparameter_at(damping, state.count))
        curvature = kfac_factors.update(
            state.curvature,
            kfac_factors.require_statistics(kfac_stats, own),
            strength,
            transforms.hyperparameter_at(decay, state.count),
            state.count % period == 0,
        )
        grads = kfac_layers.blocks(updates, found)
        direction = transforms.cast_like(kfac_factors.precondition(curvature.inverses, grads), own)
        finite = linalg.all_finite((direction, curvature))
        new = ScaleByKFACState(
            count=optax.safe_increment(state.count),
            rejected=trial.counted_unless(finite, state.rejected),
            cost=state.cost + 1.0 + STATISTICS_COST,
            damping=strength,
            curvature=linalg.where(finite, curvature, state.curvature),
        )
        remaining = kfac_layers.rest(updates, found)
        scaled = kfac_layers.joined(found, direction, remaining, params)
        return trial.taken(finite, scaled), new

    return transforms.transformation(init, update)


def check_arguments(damping: Any, decay: Any, period: Any) -> None:
    """Refuses what is out of range."""
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)
    checks.check_in_range("decay", decay, 0.0, 1.0, high_open=True)
    checks.check_count("period", period, 1)
