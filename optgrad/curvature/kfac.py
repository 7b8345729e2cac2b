"""Kronecker-factored approximate curvature."""

from collections.abc import Collection
from typing import Any, NamedTuple

import chex
import optax

from optgrad.core import averages, checks, linalg, oracles, shards, transforms
from optgrad.curvature import kfac_factors, kfac_layers, kfac_steps, trial
from optgrad.curvature.kfac_preconditioner import STATISTICS_COST, check_arguments, scale_by_kfac
from optgrad.registry import Method, Tunable, register


class KFACState(NamedTuple):
    """Kronecker factors, momentum and the fallback's state."""

    count: chex.Array  # number of updates, int32 ()
    rejected: chex.Array  # updates that were zero: not finite, or a loss that would increase
    cost: chex.Array  # gradient equivalents of all steps so far, shape ()
    damping: chex.Array  # λ, shape ()
    step_size: chex.Array  # of the last preconditioned gradient: ν·learning_rate, or α, shape ()
    momentum: chex.Array  # weight of the previous update: the argument, or μ, shape ()
    curvature: kfac_factors.Curvature  # factors and inverses, matrices of in² and out² numbers
    velocity: kfac_layers.Blocks  # momentum, or the last update if adaptive, like the layers
    fallback: optax.OptState  # of the transformation of all other leaves

    def diagnostics(self) -> dict[str, chex.Array]:
        """Costs, damping, and the step's two coefficients."""
        return {
            "gradient_equivalents": self.cost,
            "rejected_steps": self.rejected,
            "damping": self.damping,
            "step_size": self.step_size,
            "momentum": self.momentum,
        }


def kfac(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    damping: float | optax.Schedule = 1e-2,
    momentum: float | optax.Schedule = 0.9,
    decay: float | optax.Schedule = 0.95,
    kl_clip: float | optax.Schedule = 1e-2,
    period: int = 10,
    layers: Collection[str] | None = None,
    fallback: optax.GradientTransformation | None = None,
    adaptive: bool = False,
    adapt_every: int = 5,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC: natural gradient with Kronecker-factored blocks of the Fisher matrix, layer by layer.

    .. math::
      F_\ell &\approx \bar A \otimes S, \qquad
        \bar A = \mathrm{EMA}\Bigl[\tfrac1n\sum_{i,t} \tilde a_{it}\tilde a_{it}^\top\Bigr],
        \quad S = \mathrm{EMA}\Bigl[\tfrac1{nT}\sum_{i,t} g_{it}g_{it}^\top\Bigr] \\
      V &= \bigl(\bar A + \pi\sqrt\lambda I\bigr)^{-1}\,\nabla W\,
        \bigl(S + \tfrac{\sqrt\lambda}\pi I\bigr)^{-1}, \qquad
        \pi^2 = \frac{\operatorname{tr}\bar A/\dim \bar A}{\operatorname{tr}S/\dim S} \\
      m &\leftarrow \mu m + \nu V, \quad
        \nu = \min\bigl(1, \sqrt{\kappa/(\alpha^2\textstyle\sum V\cdot\nabla W)}\bigr),
        \qquad W \leftarrow W - \alpha m

    for each layer with inputs :math:`\tilde a = (a, 1)` (the 1 if it has a bias) and gradients g of
    its outputs, over the T positions of an example: 1 for a dense layer on vectors; for a
    convolution a is the patch under its kernel (KFC). Decays are :math:`\min(\beta, 1 - 1/t)`.

    It is the second-order method that pays on minibatches: on the digits (MLP 64-32-10, batches of
    256, mean of three seeds) the training loss is 0.029, 0.022, 0.021 after 300, 1000 and 3000
    gradient equivalents, where tuned Adam has 0.039, 0.024, 0.022 and momentum 0.030, 0.025, 0.022;
    ``damping=1e-3, learning_rate=0.03`` gives 0.048, 0.022, 0.021. The damping sets which step
    sizes are stable: with 1e-3, a rate of 0.1 ends at 0.28. A step costs 2 gradient equivalents,
    the gradient and the statistics, and every ``period`` steps the inversions,
    :math:`in^3 + out^3` operations a layer; memory is four matrices, of in² and out² numbers twice
    each, and the momentum. It does not pay for layers of many thousands of inputs.

    With ``adaptive=True`` the step is :math:`\alpha\Delta + \mu\delta_0` of the direction
    Δ = −V and the previous step :math:`\delta_0`, where α and μ minimise the quadratic model with
    the exact Gauss–Newton matrix of the batch plus λI, and λ follows the gain ratio; the fallback's
    update is shortened if the model says so. The step is tried on the batch; one that would
    increase its loss is not taken, and counted in the state's field ``rejected``: the method has to
    be the last of its chain, with ``value``, gradient and functions of one batch. It needs no
    learning rate and is faster early: 0.059, 0.030, 0.025 after 20, 50, 100 steps on the digits
    (0.090, 0.059, 0.041 with the fixed defaults), at 4 ⅓ gradient equivalents a step (5 ⅓ with a
    fallback, ⅓ more without ``value``). Late it gains nothing, and λ falls as long as the model is
    good.

    Args:
      learning_rate: α ≥ 0, a number, a traced scalar or a schedule; of the default ``fallback``
        only if ``adaptive``.
      damping: λ > 0; the first one if ``adaptive``.
      momentum: μ in [0, 1); of the default ``fallback`` only if ``adaptive``.
      decay: β in [0, 1), largest decay of the factors' averages.
      kl_clip: κ > 0, bound of :math:`\alpha^2\sum V\cdot\nabla W`; infinite is none. Not used if
        ``adaptive``.
      period: steps between two inversions, an integer ≥ 1. Under `jax.vmap` over runs, create the
        state inside of the mapped function: otherwise every step inverts.
      layers: paths of the layers (``("Dense_0", "layers/1")``) to be preconditioned; None is all
        that ``params`` have, mappings with a floating-point ``"kernel"`` of 2 or 4 axes.
      fallback: transformation of all other leaves (embeddings, normalisation, layers left out),
        giving their final, signed updates; it sees gradients and parameters alone, no extra
        arguments, with `optax.MaskedNode` in place of the layers. The
        default is SGD with this ``momentum`` and ``learning_rate``; embeddings want
        ``optax.adam(1e-3)`` or the like.
      adaptive: whether step size, momentum and damping are found at each step.
      adapt_every: steps between two changes of λ, an integer ≥ 1, if ``adaptive``.

    Returns:
      A `GradientTransformationExtraArgs`. Its ``update`` needs the parameters and ``kfac_stats``,
      from each layer's path to its `optgrad.LayerStatistics`, as `optgrad.layer_statistics` builds
      them; if ``adaptive`` also ``value_fn``, ``outputs_fn`` and ``out_loss_fn`` (to which the
      parameters belong where the loss has terms like L2), and takes ``value``. Steps that are not
      finite are zero, leave factors and momentum as they were, and are counted in ``rejected``;
      without any layer, all is the fallback's.

    Raises:
      ValueError: for an argument outside its range; in ``init`` for a path in ``layers`` where
        there is none; in ``update`` for missing arguments, or a layer without statistics.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> params = {"out": {"kernel": jnp.zeros((2, 1))}}
      >>> x, y = jnp.array([[10.0, 0.0], [0.0, 1.0]]), jnp.array([[20.0], [3.0]])
      >>> loss = lambda p: jnp.mean(0.5 * jnp.sum((x @ p["out"]["kernel"] - y) ** 2, -1))
      >>> optimizer = optgrad.kfac(1.0, damping=1e-8, kl_clip=jnp.inf, momentum=0.0)
      >>> state = optimizer.init(params)
      >>> stats = {"out": optgrad.LayerStatistics(x, jnp.ones((2, 1)))}
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params, kfac_stats=stats)
      >>> print(updates["out"]["kernel"].ravel().round(1))
      [2. 3.]

    References:
      J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature", 2015: factors (Section 3), averages and labels (5), damping (6), step size and
      momentum (6.4, 7). R. Grosse, J. Martens, "A Kronecker-factored approximate Fisher matrix for
      convolution layers", 2016: KFC. J. Ba, R. Grosse, J. Martens, "Distributed Second-Order
      Optimization using Kronecker-Factored Approximations", 2017: the clip.

    Deviations from the papers: block-diagonal only; λ is not tuned separately for the factors; at
    least ten roundings of a factor's trace are added to its diagonal, so that singular ones have an
    inverse; a step that increases the loss is rejected, and forgets the momentum.
    """
    checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    check_arguments(damping, decay, period)
    checks.check_in_range("momentum", momentum, 0.0, 1.0, high_open=True)
    checks.check_in_range("kl_clip", kl_clip, 0.0, low_open=True, or_infinite=True)
    checks.check_one_of("adaptive", adaptive, (False, True))
    checks.check_count("adapt_every", adapt_every, 1)
    other = optax.with_extra_args_support(
        kfac_steps.heavy_ball(learning_rate, momentum) if fallback is None else fallback
    )

    def init(params: optax.Params) -> KFACState:
        found = kfac_layers.find_layers(params, layers)
        own = kfac_layers.blocks(params, found)
        shards.require_whole(own, "the inverse of a layer's Kronecker factors")
        start = trial.scalar(transforms.hyperparameter_at(damping, trial.zero_count()))
        return KFACState(
            count=trial.zero_count(),
            rejected=trial.zero_count(),
            cost=trial.scalar(0.0),
            damping=start,
            step_size=trial.scalar(0.0),
            momentum=trial.scalar(0.0),
            curvature=kfac_factors.init(own, start),
            velocity=averages.zeros_like_average(own),
            fallback=other.init(kfac_layers.rest(params, found)),
        )

    def update(
        updates: optax.Updates,
        state: KFACState,
        params: optax.Params | None = None,
        *,
        kfac_stats: Any = None,
        value: Any = None,
        value_fn: Any = None,
        outputs_fn: Any = None,
        out_loss_fn: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, KFACState]:
        del extra
        params = transforms.require_params(params)
        found = kfac_layers.find_layers(params, layers)
        own = kfac_layers.blocks(params, found)
        statistics = kfac_factors.require_statistics(kfac_stats, own)
        strength = state.damping
        if not adaptive:
            strength = trial.scalar(transforms.hyperparameter_at(damping, state.count))
        curvature = kfac_factors.update(
            state.curvature,
            statistics,
            strength,
            transforms.hyperparameter_at(decay, state.count),
            state.count % period == 0,
        )
        remaining = kfac_layers.rest(params, found)
        others, fallback_state = other.update(
            kfac_layers.rest(updates, found), state.fallback, remaining
        )
        direction = kfac_factors.precondition(
            curvature.inverses, kfac_layers.blocks(updates, found)
        )
        proposal = kfac_steps.Proposal(
            layers=found,
            params=params,
            grad=updates,
            direction=direction,
            velocity=state.velocity,
            others=transforms.cast_like(others, remaining),
            damping=strength,
        )
        count = optax.safe_increment(state.count)
        cost = state.cost + 1.0 + STATISTICS_COST
        if adaptive:
            functions = _functions(value_fn, outputs_fn, out_loss_fn)
            step = kfac_steps.adaptive(proposal, value, functions, count, adapt_every)
            cost += kfac_steps.adaptive_cost(proposal, value is not None)
        else:
            step = kfac_steps.fixed(
                proposal,
                learning_rate=transforms.hyperparameter_at(learning_rate, state.count),
                momentum=transforms.hyperparameter_at(momentum, state.count),
                kl_clip=transforms.hyperparameter_at(kl_clip, state.count),
            )
        known = linalg.all_finite((curvature, direction))
        return step.updates, KFACState(
            count=count,
            rejected=trial.counted_unless(step.accepted, state.rejected),
            cost=cost,
            damping=step.damping,
            step_size=step.step_size,
            momentum=step.momentum,
            curvature=linalg.where(known, curvature, state.curvature),
            velocity=step.velocity,
            fallback=linalg.where(step.accepted, fallback_state, state.fallback),
        )

    return transforms.transformation(init, update)


def _functions(value_fn: Any, outputs_fn: Any, out_loss_fn: Any) -> kfac_steps.Functions:
    """The extra arguments of the adaptive mode, refused if one is missing."""
    outputs = "optgrad.curvature_args(loss_fn, outputs=..., out_loss=..., kfac=...)"
    return kfac_steps.Functions(
        oracles.require_function("value_fn", value_fn),
        oracles.require_function("outputs_fn", outputs_fn, outputs),
        oracles.require_function("out_loss_fn", out_loss_fn, outputs),
    )


register(
    Method(
        name="kfac",
        factory=kfac,
        scale_by=scale_by_kfac,
        family="curvature",
        title="Kronecker-factored approximate curvature (K-FAC)",
        reference=kfac_factors.KFAC,
        equation="Sections 3 to 7: θ ← θ − α·momentum of Ā⁻¹∇W·S⁻¹, F ≈ Ā ⊗ S for each layer",
        needs=frozenset({"params", "kfac_stats"}),
        static_args=("period", "layers", "fallback", "adaptive", "adapt_every"),
        tunes=Tunable("learning_rate", 1e-3, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=1,  # and for each layer four matrices: its two factors and their inverses
        cost=2.0,
        low_precision="the fallback's velocity, by low_precision_state; the factors stay wide",
    )
)
