"""Preconditioning by an estimated diagonal of the Gauss–Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, oracles, transforms, trees
from optgrad.core import diagnostics as summaries
from optgrad.curvature import output_curvature, trial
from optgrad.registry import Method, Tunable, register

COST = 2.0  # the gradient, and one more backward pass
_ARGS = "optgrad.curvature_args(loss_fn, outputs=..., out_loss=...)"


class DiagonalGaussNewtonState(NamedTuple):
    """An average of the diagonal."""

    count: chex.Array  # number of updates, int32, shape ()
    key: chex.PRNGKey  # of the random signs, uint32, shape (2,)
    cost: chex.Array  # gradient equivalents of all steps, at least float32, shape ()
    curvature: optax.Params  # ĥ ≥ 0, with bias correction, like the parameters

    def diagnostics(self) -> dict[str, chex.Array]:
        """Estimated curvatures: geometric mean, minimum, maximum of the positive ones; the cost."""
        found = summaries.summarize(self.curvature)._asdict()
        found = {f"curvature_{name}": value for name, value in found.items()}
        return {**found, "gradient_equivalents": self.cost}

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``curvature``: the estimated ones."""
        return {"curvature": self.curvature}


def scale_by_diagonal_gauss_newton(
    damping: float | optax.Schedule = 0.01,
    decay: float | optax.Schedule = 0.95,
    *,
    loss: str = "general",
    seed: int = 0,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `diagonal_gauss_newton`, g/(ĥ + μ).

    Args:
      damping: as for `diagonal_gauss_newton`.
      decay: as for `diagonal_gauss_newton`.
      loss: as for `diagonal_gauss_newton`.
      seed: as for `diagonal_gauss_newton`.
      state_dtype: as for `diagonal_gauss_newton`.

    Returns:
      A `GradientTransformationExtraArgs`.
    """
    checks.check_in_range("damping", damping, 0.0, low_open=True, high_open=True)
    checks.check_in_range("decay", decay, 0.0, 1.0, high_open=True)
    checks.check_one_of("loss", loss, output_curvature.LOSSES)
    checks.check_float_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> DiagonalGaussNewtonState:
        return DiagonalGaussNewtonState(
            trial.zero_count(),
            jax.random.PRNGKey(seed),
            trial.scalar(0.0),
            averages.zeros_like_average(params, state_dtype),
        )

    def update(
        updates: optax.Updates,
        state: DiagonalGaussNewtonState,
        params: optax.Params | None = None,
        *,
        outputs_fn: Callable[[Any], Any] | None = None,
        out_loss_fn: Callable[[Any], chex.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, DiagonalGaussNewtonState]:
        del extra
        params = transforms.require_params(params)
        outputs_fn = oracles.require_function("outputs_fn", outputs_fn, _ARGS)
        if loss == "general":
            out_loss_fn = oracles.require_function("out_loss_fn", out_loss_fn, _ARGS)
        count = optax.safe_increment(state.count)
        mu, beta = (transforms.hyperparameter_at(x, state.count) for x in (damping, decay))
        weights = averages.sample_weights(count, beta)
        key, random_key = jax.random.split(state.key)

        outputs, pull_back = jax.vjp(outputs_fn, params)
        sampled = output_curvature.root_times_signs(loss, outputs, out_loss_fn, random_key)
        (sample,) = pull_back(transforms.cast_like(sampled, outputs))

        def average(q: chex.Array, h: chex.Array) -> chex.Array:
            square = jnp.square(trees.wide(q))
            return jnp.where(jnp.isfinite(square), averages.update_mean(h, square, weights), h)

        def divide(g: chex.Array, h: chex.Array) -> chex.Array:
            h = trees.wide(h)
            step = trees.wide(g) / (h + jnp.asarray(mu, h.dtype))
            return jnp.where(jnp.isfinite(step), step, 0.0)

        curvature = jax.tree.map(average, sample, state.curvature)
        steps = jax.tree.map(divide, updates, curvature)
        new = DiagonalGaussNewtonState(count, key, state.cost + COST, curvature)
        return transforms.cast_like(steps, params), new

    return transforms.transformation(init, update)


def diagonal_gauss_newton(
    learning_rate: optax.ScalarOrSchedule,
    damping: float | optax.Schedule = 0.01,
    decay: float | optax.Schedule = 0.95,
    *,
    loss: str = "general",
    seed: int = 0,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients divided by the diagonal of the Gauss–Newton matrix, from one backward pass.

    .. math::
      \hat h &\leftarrow \text{average of } \frac1n\bigl(J^\top S u\bigr)^2, \quad
      u_{ic} = \pm1, \quad SS^\top = \nabla^2_z \ell \\
      \theta &\leftarrow \theta - \alpha\,\frac{g}{\hat h + \mu}

    J is the Jacobian of the outputs z of the whole batch, n examples, and S a factor of the Hessian
    of each example's loss in them: the Hessian backpropagated without the curvature of the
    activations (φ″). With independent random signs the expected square is the exact diagonal of the
    Gauss–Newton matrix of the mean loss, which `optgrad.gauss_newton_diagonal` computes from C
    backward passes of each example. It is never negative.

    It shines on layers of different scales, for the cost of one more gradient (2 per step); on a
    digits network (64-32-10, batch 256, learning rate 0.03, μ = 0.01) it ends where SGD ends, 0.024
    after 3000 gradient equivalents, and is behind at first (0.070 against 0.061 after 300). It sees
    the axes only: on a parabola whose principal axes are turned by 45° it is gradient descent. One
    sample of :math:`(J^\top Su)^2` has a relative standard deviation of about 1.4, which ``decay``
    has to average out, and μ limits steps where the first samples are near 0.

    Args:
      learning_rate: α ≥ 0; a number, a traced scalar or a schedule.
      damping: μ > 0, in units of the curvature.
      decay: in [0, 1), of the average; with bias correction.
      loss: what the Hessian in the outputs is. ``"softmax"``: of the mean over all rows (all axes
        but the last) of the cross-entropy of logits. ``"squared"``: of the mean over all rows of
        half the squared distance; rows are the entries of outputs with one axis. ``"general"``:
        that of ``out_loss_fn``, any scale and mean included, computed in blocks along the last axis
        of each leaf by as many products with it as that axis is long, C, n·C² numbers; entries of
        outputs with one axis are blocks of their own. Blocks are exact if the loss couples nothing
        else, otherwise unbiased estimates. Negative eigenvalues count as 0.
      seed: of the random signs.
      state_dtype: floating-point type of ĥ; default the parameter's, but at least float32.

    Returns:
      A `GradientTransformationExtraArgs` whose state holds one vector of parameter size. Its
      ``update`` needs the parameters, ``outputs_fn``, and for ``loss="general"`` ``out_loss_fn``.
      A coordinate whose gradient is not finite does not move; its curvature stays where its sample
      is not finite.

    Raises:
      ValueError: if an argument is outside its range, and in ``update`` without parameters or what
        it needs.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> extra = {"outputs_fn": lambda w: inputs @ w}
      >>> extra["out_loss_fn"] = lambda z: 0.5 * jnp.mean(z**2)
      >>> optimizer = optgrad.diagonal_gauss_newton(1.0, damping=0.5)
      >>> params = jnp.ones(2)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params, **extra)
      >>> print([f"{u:.2f}" for u in updates])  # g = (1, 1), h = (0.5, 4.5)
      ['-1.00', '-0.20']

    References:
      Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", 1998, Section 7; J. Martens,
      I. Sutskever, K. Swersky, "Estimating the Hessian by back-propagating curvature", 2012; J.
      Duda, "Improving convergence of stochastic gradient descent" (slides), backpropagated Hessian.

    Deviations from LeCun's: random signs instead of a recursion through the layers that drops
    correlations, so that any network will do; the estimate is unbiased.
    """
    direction = scale_by_diagonal_gauss_newton(
        damping, decay, loss=loss, seed=seed, state_dtype=state_dtype
    )
    return transforms.with_learning_rate(direction, learning_rate)


register(
    Method(
        name="diagonal_gauss_newton",
        factory=diagonal_gauss_newton,
        scale_by=scale_by_diagonal_gauss_newton,
        family="curvature",
        title="Diagonal Gauss–Newton (backpropagated curvature)",
        reference='Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", 1998',
        equation="diagonal Gauss–Newton: θ ← θ − α·g/(ĥ + μ), ĥ the average of (JᵀSu)²/n",
        needs=frozenset({"params", "outputs_fn", "out_loss_fn"}),
        static_args=("loss", "seed", "state_dtype"),
        tunes=Tunable("learning_rate", 1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.3},
        state_size=1,
        cost=COST,
        low_precision=averages.LOW_PRECISION,
    )
)
