"""Gradient accumulation that averages the loss and other extra arguments with the gradient."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad import registry
from optgrad.core import averages, checks
from optgrad.wrappers.period import Weights

# (gradient, gradient_step, params) -> (whether to leave the micro-batch out, anything to record)
SkipFn = Callable[[optax.Updates, chex.Array, optax.Params | None], tuple[chex.Array, Any]]


class MultiStepsState(NamedTuple):
    """State of `MultiSteps`; the first four fields are named as optax names them.

    The averages are those of the current period; between a period's end and the next micro-batch
    they are the finished period's, e.g. ``state.extras["value"]`` for logging its mean loss.
    """

    mini_step: chex.Array  # micro-batches of the current period so far, in [0, k), int32 ()
    gradient_step: chex.Array  # periods finished, that is updates of the inner one, int32 ()
    inner_opt_state: Any  # of the wrapped transformation
    acc_grads: optax.Updates  # mean gradient, a tree like the parameters, at least float32
    extras: dict[str, Any]  # averaged extra argument by name: scalar for value, else a tree like θ
    weight: chex.Array  # micro-batches, or their examples, in the averages, float ()
    skip_state: Any  # what should_skip_update_fn recorded, () without one


class MultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax is Any
    r"""Accumulates k micro-batches' gradients, losses and other extra arguments into one step.

    .. math::
      \bar g = \sum_j \frac{n_j}{N} g_j, \quad
      \bar f = \sum_j \frac{n_j}{N} f_j, \quad N = \sum_j n_j

    over the k micro-batches of a period, with :math:`n_j = 1` or their numbers of examples. The
    wrapped optimizer is handed :math:`\bar g, \bar f, \dots` at the last of them: with equal
    micro-batches this is the step of the big batch. The updates before are zero.

    ``optax.MultiSteps`` averages the gradient alone and hands over every other argument of the
    last micro-batch, so that a step size that is computed from the loss (Polyak's, L4, planning's
    verification …) belongs to other examples than the gradient; within `optax.chain` it loses the
    arguments altogether. It is right, and this one not needed, for optimizers without extra
    arguments.

    What becomes of each extra argument:

    - ``value``, ``grad``, ``curvature_diagonal`` and any other tree like the parameters that
      ``average`` names: its mean. All but ``value`` take one vector of parameter size, which is
      why they must be named.
    - ``gradient_variance``, if named: the variance of the mean of independent gradients,
      :math:`\sum_j (n_j/N)^2 s_j`, which is mean/k for equal ones. It is unbiased, and has k − 1
      degrees of freedom less than the big batch's, because it leaves out how far the
      micro-batches' means lie apart. Given ``num_examples`` that scatter is known, too, and the
      result is the big batch's exactly.
    - ``per_example_grads``, ``kfac_stats``, ``features`` and functions (``value_fn``,
      ``outputs_fn``, ``residual_fn`` …): refused. The first two would be held for the whole big
      batch, which accumulation is there to avoid (instead of the first use
      ``gradient_variance``); of features the squares average (use ``curvature_diagonal``); and a
      function knows one micro-batch only: a line search would compare its loss with the mean. Take
      the big batch at once, and let its loss go through micro-batches by ``microbatch_size`` of
      `optgrad.curvature_args` or `optgrad.make_step`; or accept the last one's by ``last``.
    - all others: handed over from the last micro-batch.

    A NaN in one micro-batch makes its period's averages NaN, and no other's.

    Args:
      opt: the transformation to wrap.
      every_k_schedule: k ≥ 1, or a function of the number of finished periods that returns it.
      average: names of the extra arguments to average. Pass those with every micro-batch.
      last: names of extra arguments that are handed over from the last micro-batch although this
        would be refused, because the optimizer only sees what it expects then.
      should_skip_update_fn: which micro-batches to leave out as if they had never been, such as
        `optax.skip_not_finite`; (gradient, gradient_step, params) -> (bool, anything to record).

    ``update`` takes one argument more, ``num_examples``: the micro-batch's number of examples n_j,
    a number or a traced scalar, where they differ. It is not handed on.

    Returns:
      A `GradientTransformationExtraArgs` with the methods of `optax.MultiSteps`. The wrapped
      update is computed in the last call of a period only (under `jax.vmap` in every call).

    Raises:
      ValueError: if ``every_k_schedule`` is below 1, or ``update`` is given what is refused above.
      TypeError: if ``every_k_schedule`` is neither an integer nor a function.

    Examples:
      >>> import jax.numpy as jnp, optgrad
      >>> optimizer = optgrad.MultiSteps(optgrad.create("polyak", max_learning_rate=10.0), 2)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient, loss in ((jnp.array([2.0, 0.0]), 3.0), (jnp.array([0.0, 2.0]), 1.0)):
      ...     updates, state = optimizer.update(gradient, state, jnp.zeros(2), value=loss)
      ...     print(updates, optimizer.has_updated(state))
      [0. 0.] False
      [-1. -1.] True

    The step is (f̄/‖ḡ‖²)·ḡ = (2/2)·(1, 1); ``optax.MultiSteps`` takes f = 1 and halves it.
    """

    inner_opt: optax.GradientTransformationExtraArgs

    def __new__(
        cls,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[chex.Array], chex.Numeric],
        *,
        average: Sequence[str] = ("value",),
        last: Sequence[str] = (),
        should_skip_update_fn: SkipFn | None = None,
    ) -> "MultiSteps":
        """Checks the arguments; they are described above."""
        if not callable(every_k_schedule):
            checks.check_count("every_k_schedule", every_k_schedule, 1)
        for argument, names in (("average", average), ("last", last)):
            if isinstance(names, str):
                raise TypeError(f"{argument} = {names!r} is a string; accepted: a tuple of names")
        for name in average:
            if _cannot_be_averaged(name):
                raise ValueError(f"average = {tuple(average)}: {_refusal(name)}")
        accumulation = _Accumulation(
            optax.with_extra_args_support(opt),
            every_k_schedule,
            tuple(average),
            tuple(last),
            should_skip_update_fn or _never_skip,
        )
        self: MultiSteps = super().__new__(cls, accumulation.init, accumulation.update)
        self.inner_opt = accumulation.inner
        return self

    def has_updated(self, state: MultiStepsState) -> chex.Array:
        """Whether the last micro-batch finished a period, a bool of shape ()."""
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """This transformation itself, for code written for `optax.MultiSteps`."""
        return self


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    """What `MultiSteps` was given, and its two functions."""

    inner: optax.GradientTransformationExtraArgs
    every_k: int | Callable[[chex.Array], chex.Numeric]
    average: tuple[str, ...]
    last: tuple[str, ...]
    should_skip: SkipFn

    def init(self, params: optax.Params) -> MultiStepsState:
        zero = jnp.zeros((), jnp.int32)
        mean = averages.zeros_like_average(params)
        scalar = jnp.zeros((), averages.scalar_dtype())
        return MultiStepsState(
            mini_step=zero,
            gradient_step=jnp.zeros_like(zero),
            inner_opt_state=self.inner.init(params),
            acc_grads=mean,
            extras={
                name: jnp.zeros_like(scalar) if name == "value" else optax.tree.zeros_like(mean)
                for name in self.average
            },
            weight=scalar,
            skip_state=self.should_skip(optax.tree.zeros_like(params), zero, params)[1],
        )

    def update(
        self,
        updates: optax.Updates,
        state: MultiStepsState,
        params: optax.Params | None = None,
        *,
        num_examples: chex.Numeric | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        for name, value in extra.items():
            self._check_extra(name, value)
        skipped, skip_state = self.should_skip(updates, state.gradient_step, params)
        weights = Weights.of_next(
            state.mini_step == 0, state.weight, num_examples, leave_out=skipped
        )
        given = {name: extra[name] for name in self.average if name in extra}
        acc_grads = weights.mean(state.acc_grads, updates)
        extras = dict(state.extras)
        for name, sample in given.items():
            if name != "gradient_variance":
                extras[name] = weights.mean(extras[name], sample)
        if "gradient_variance" in given:
            gradient = given.get("grad", updates), extras.get("grad", acc_grads)
            extras["gradient_variance"] = weights.variance_of_mean(
                extras["gradient_variance"], given["gradient_variance"], *gradient
            )

        def step() -> tuple[optax.Updates, Any]:
            known = {name: _wide_like(extras[name], sample) for name, sample in given.items()}
            mean = _cast_like(acc_grads, updates)
            new, inner = self.inner.update(
                mean, state.inner_opt_state, params, **{**extra, **known}
            )
            return new, _cast_like(inner, state.inner_opt_state)

        def wait() -> tuple[optax.Updates, Any]:
            return optax.tree.zeros_like(jax.eval_shape(step)[0]), state.inner_opt_state

        k = self.every_k(state.gradient_step) if callable(self.every_k) else self.every_k
        is_last = (state.mini_step + 1 >= k) & ~skipped
        new_updates, inner_state = jax.lax.cond(is_last, step, wait)
        return new_updates, MultiStepsState(
            jnp.where(is_last, 0, state.mini_step + jnp.where(skipped, 0, 1)),
            jnp.where(is_last, optax.safe_increment(state.gradient_step), state.gradient_step),
            inner_state,
            acc_grads,
            extras,
            weights.total,
            skip_state,
        )

    def _check_extra(self, name: str, value: Any) -> None:
        """Refuses what would silently belong to the last micro-batch alone."""
        if name in self.average or name in self.last:
            return
        if callable(value) or name in registry.EXTRAS:
            raise ValueError(f"{name} was passed to MultiSteps: {_refusal(name)}")


_WHOLE = (
    "the big batch at once without MultiSteps, in bounded memory by microbatch_size of "
    "optgrad.curvature_args or optgrad.make_step"
)


def _refusal(name: str) -> str:
    """Why an extra argument is not handed over, and what is accepted."""
    last = f"or last=({name!r},) for the last micro-batch's alone"
    if name == "per_example_grads":
        return (
            "those of all micro-batches would have to be held at once; accepted: "
            f"gradient_variance instead, with average=('gradient_variance',), {last}"
        )
    if name == "kfac_stats":
        return (
            f"those of all micro-batches would have to be held at once; accepted: {_WHOLE}, {last}"
        )
    if name == "features":
        return (
            "their squares average, not they; accepted: curvature_diagonal (features²) instead, "
            f"with average=('curvature_diagonal',), {last}"
        )
    if _cannot_be_averaged(name):
        return (
            f"{name} is a function of one micro-batch, which cannot be averaged; accepted: "
            f"{_WHOLE}, an optimizer that does without it, {last}"
        )
    return f"its mean is not kept; accepted: average=(..., {name!r}), {last}"


def _cannot_be_averaged(name: str) -> bool:
    return name in {"per_example_grads", "features", "kfac_stats"} or name.endswith("_fn")


def _never_skip(
    updates: optax.Updates, gradient_step: chex.Array, params: optax.Params | None
) -> tuple[chex.Array, tuple[()]]:
    del updates, gradient_step, params
    return jnp.zeros((), bool), ()


def _cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Each leaf in the type of its counterpart."""

    def cast(x: chex.Array, y: chex.Array) -> chex.Array:
        dtype = jnp.result_type(y)
        return x if jnp.result_type(x) == dtype else jnp.asarray(x, dtype)

    return jax.tree.map(cast, tree, like)


def _wide_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Each leaf in the type of its counterpart, but at least float32."""
    return jax.tree.map(lambda x, y: x.astype(averages.average_dtype(y)), tree, like)
