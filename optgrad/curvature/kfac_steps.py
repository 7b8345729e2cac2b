"""From K-FAC's direction to a step: fixed coefficients, or those of the quadratic model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, linalg, oracles, transforms, trees
from optgrad.curvature import kfac_layers, kfac_model, trial

_OMEGA = 0.95  # the damping's factor for each step between two adaptations (the paper's 19/20)


class Proposal(NamedTuple):
    """All that a step may be made of."""

    layers: tuple[kfac_layers.Layer, ...]
    params: optax.Params
    grad: optax.Updates  # of all parameters
    direction: kfac_layers.Blocks  # V, the layers' preconditioned gradient
    velocity: kfac_layers.Blocks  # their momentum, or their previous step if adaptive
    others: optax.Updates  # the fallback's updates of the other leaves
    damping: chex.Array  # λ, shape ()

    def joined(self, blocks: kfac_layers.Blocks, others: optax.Updates) -> optax.Updates:
        """A tree like the parameters."""
        return kfac_layers.joined(self.layers, blocks, others, self.params)


class Functions(NamedTuple):
    """What the quadratic model and its test need."""

    value_fn: Callable[[Any], chex.Array]  # params -> loss
    outputs_fn: Callable[[Any], Any]  # params -> z
    out_loss_fn: Callable[[Any], chex.Array]  # z -> loss


class Step(NamedTuple):
    """What is added to the parameters, and what the next step needs to know."""

    updates: optax.Updates  # in the parameters' types, zero if not accepted
    accepted: chex.Array  # bool ()
    velocity: kfac_layers.Blocks  # as in the proposal
    damping: chex.Array  # λ of the next step, shape ()
    step_size: chex.Array  # weight of V, shape ()
    momentum: chex.Array  # weight of the previous step, shape ()


def fixed(
    proposal: Proposal,
    *,
    learning_rate: chex.Numeric,
    momentum: chex.Numeric,
    kl_clip: chex.Numeric,
) -> Step:
    r"""−α times the momentum of V; each V is shortened before it enters.

    By :math:`\nu = \min(1, \sqrt{\kappa/(\alpha^2\sum V\cdot g)})`: α²ΣV·g is twice the
    Kullback–Leibler divergence of the step αV in the model. Not taken if it is not finite; without
    layers all is left to the fallback.
    """
    direction, old = proposal.direction, proposal.velocity
    rate = trial.scalar(learning_rate)
    along = trees.inner_products((direction, kfac_layers.blocks(proposal.grad, proposal.layers)))[0]
    length = rate * jnp.sqrt(jnp.maximum(jnp.sum(along), 0.0))  # V·g < 0 is rounding
    limit = jnp.sqrt(trial.scalar(kl_clip))
    shrink = jnp.where(length > limit, limit / jnp.where(length > limit, length, 1.0), 1.0)
    velocity = averages.update_sum(old, linalg.scale(shrink, direction), momentum)
    updates = transforms.cast_like(
        proposal.joined(linalg.scale(-rate, velocity), proposal.others), proposal.params
    )
    accepted = linalg.all_finite((updates, velocity)) if proposal.layers else jnp.asarray(True)
    return Step(
        trial.taken(accepted, updates),
        accepted,
        linalg.where(accepted, velocity, old),
        proposal.damping,
        rate * shrink,
        trial.scalar(momentum),
    )


def adaptive(
    proposal: Proposal, value: Any, functions: Functions, count: chex.Array, every: int
) -> Step:
    r"""αΔ + μδ₀ of least model value, with Δ = −V and the previous step δ₀, on trial.

    The fallback's update of the other leaves is a third direction, which may be shortened.

    Args:
      proposal: of the directions.
      value: the loss at the parameters, or None.
      functions: of the batch.
      count: number of this step, from 1.
      every: λ is adapted whenever this divides the number, and after a rejection.
    """
    params, velocity, others = proposal.params, proposal.velocity, proposal.others
    value_fn = functions.value_fn
    value = transforms.require_value(value_fn(params) if value is None else value)
    nothing, still = linalg.zeros_like(others), linalg.zeros_like(velocity)
    opposite = linalg.scale(-1.0, proposal.direction)
    directions = [proposal.joined(blocks, nothing) for blocks in (opposite, velocity)]
    has_others = bool(jax.tree.leaves(others))
    if has_others:
        directions.append(proposal.joined(still, others))
    model = kfac_model.minimize(
        functions.outputs_fn,
        functions.out_loss_fn,
        params,
        proposal.grad,
        directions,
        damping=proposal.damping,
        has_update=has_others,
    )
    alpha, mu = model.coefficients[:2]
    step = linalg.axpy(alpha, opposite, linalg.scale(mu, velocity))
    others = linalg.scale(model.coefficients[-1], others)  # unused where there are none
    found = trial.attempt(value_fn, params, proposal.joined(step, others), value, model.decrease)
    change = 1 / _OMEGA**every
    ratio = jnp.where(found.accepted, found.ratio, -1.0)
    adapted = trial.rescaled_damping(proposal.damping, ratio, up=change, down=change)
    due = (count % every == 0) | ~found.accepted
    return Step(
        found.updates,
        found.accepted,
        transforms.cast_like(linalg.where(found.accepted, step, still), velocity),
        jnp.where(due & jnp.isfinite(value), adapted, proposal.damping),
        alpha,
        mu,
    )


def adaptive_cost(proposal: Proposal, has_value: bool) -> float:
    """Gradient equivalents of it: derivatives of the outputs along directions, and the losses."""
    directions = 3 if jax.tree.leaves(proposal.others) else 2
    return directions + oracles.VALUE_COST * (1 if has_value else 2)


# --- the default fallback ----------------------------------------------------------------------


class HeavyBallState(NamedTuple):
    """Of the default fallback."""

    count: chex.Array  # number of updates, int32 ()
    velocity: optax.Updates  # momentum, a tree like the other leaves


def heavy_ball(
    learning_rate: optax.ScalarOrSchedule, momentum: float | optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum, both as K-FAC's own."""

    def init(params: optax.Params) -> HeavyBallState:
        return HeavyBallState(trial.zero_count(), averages.zeros_like_average(params))

    def update(
        updates: optax.Updates, state: HeavyBallState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, HeavyBallState]:
        del params
        kept = transforms.hyperparameter_at(momentum, state.count)
        rate = trial.scalar(transforms.hyperparameter_at(learning_rate, state.count))
        velocity = averages.update_sum(state.velocity, updates, kept)
        new = HeavyBallState(optax.safe_increment(state.count), velocity)
        return linalg.scale(-rate, velocity), new

    return optax.GradientTransformation(init, update)
