"""Steps that are not finite are left out, and counted."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optgrad.core import averages, checks, diagnostics, rewriting, shards, transforms


class NonFiniteStepsError(FloatingPointError):
    """More steps in a row were not finite than `guard` was told to accept."""


class Snapshot(NamedTuple):
    """Where `guard` returns to."""

    params: optax.Params  # at which a gradient and the step from there were finite
    inner: Any  # the wrapped transformation's state there


class GuardState(NamedTuple):
    """State of `guard`."""

    inner: Any  # of the wrapped transformation, after the accepted steps only
    accepted: chex.Array  # steps, int32 ()
    rejected: chex.Array  # steps, int32 ()
    consecutive: chex.Array  # rejected since the last accepted one, int32 ()
    failed: chex.Array  # whether max_consecutive was ever reached, bool ()
    good: Snapshot | tuple[()]  # () without ``rollback_after``

    def diagnostics(self) -> dict[str, chex.Array]:
        """Numbers of rejected steps, and what the wrapped transformation models."""
        counts = {
            "rejected_steps": self.rejected,
            "consecutive_rejected_steps": self.consecutive,
        }
        return counts | diagnostics.diagnostics(self.inner)

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """What the wrapped transformation models, not what the snapshot did."""
        return diagnostics.per_parameter(self.inner)

    def monitored(self) -> dict[str, Any]:
        """What a `monitor` within it recorded."""
        return diagnostics.collected(self.inner, "monitored")


def guard(
    inner: optax.GradientTransformation,
    *,
    max_consecutive: int = 10,
    rollback_after: int | None = None,
    snapshot_every: int = 100,
    check_results: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves out every step that is not finite, and lets the host know when there are too many.

    .. math::
      (u_t, s_{t+1}) = \begin{cases}
        F(g_t, s_t, \theta_t, e_t) & \text{if } g_t, e_t, u_t \text{ and } s_{t+1}
          \text{ are finite,}\\
        (0, s_t) & \text{otherwise,}
      \end{cases}

    with the update F of the wrapped transformation and its extra arguments e (the loss, gradients
    of examples, …). A left-out step leaves no trace in the averages, whose NaN would never leave
    again: the trajectory is, bit by bit, the one without that step. All entries of the tree
    decide together. Of the state only what was finite before has to be finite afterwards, so that
    a squared gradient which overflows is refused, and an infinite "best loss so far" is not.

    Nothing can be raised from within `jax.jit`. A flag in the state tells that ``max_consecutive``
    steps in a row were left out, and `check_guard` raises on the host, as often as one cares to
    wait for the device. The harness calls it with every measurement.

    Sometimes every step fails, because parameters were led by finite steps to where the loss is
    not. With ``rollback_after`` parameters and state return to the last snapshot after so many
    failures in a row: to other mini-batches, not to another rate. A snapshot is taken at every
    ``snapshot_every``-th accepted step, of the parameters from which that step was made.

    Under `jax.vmap` each run decides for itself; under a sharded `jax.jit`, and around it within
    `optgrad.across_devices`, all devices decide alike. Functions among the extra arguments are not
    called; what they return shows in the step. Put gradient accumulation around the guard to leave
    out a whole period (``MultiSteps(guard(…), k)``), and ``should_skip_update_fn`` of `MultiSteps`
    to leave out a micro-batch.

    `optax.apply_if_finite` looks at the gradient alone, and accepts what is not finite after too
    many in a row.

    Args:
      inner: the transformation; around a whole chain, its learning rate included, is best.
      max_consecutive: so many steps left out in a row set the flag, ≥ 1. They go on being left out.
      rollback_after: so many in a row return to the snapshot, ≥ 1, again and again; None never
        does. It costs one copy of the parameters and the state.
      snapshot_every: accepted steps between snapshots, ≥ 1.
      check_results: whether to look at u and the new state, too. They have to be held in memory
        until all are seen: temporaries of the size of the parameters and the state. Without, only
        gradients and extra arguments are looked at, and all is written in place.

    Returns:
      A `GradientTransformationExtraArgs` that takes what ``inner`` takes; `optgrad.diagnostics`
      reads the number of rejected steps.

    Raises:
      ValueError: for a count below 1; by ``update``, for missing parameters with
        ``rollback_after``.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optgrad.guard(optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(params)
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([jnp.nan, 1.0])):
      ...     updates, state = optimizer.update(gradient, state, params)
      ...     print(updates, int(state.rejected))
      [-0.1 -0.1] 0
      [0. 0.] 1
    """
    checks.check_count("max_consecutive", max_consecutive, 1)
    checks.check_count("snapshot_every", snapshot_every, 1)
    if rollback_after is not None:
        checks.check_count("rollback_after", rollback_after, 1)
    tx = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GuardState:
        state = jax.tree.map(jnp.asarray, tx.init(params))
        zero = jnp.zeros((), jnp.int32)
        good: Snapshot | tuple[()] = ()
        if rollback_after is not None:
            # Copies: buffers of a donated state must be different ones.
            good = jax.tree.map(jnp.copy, Snapshot(jax.tree.map(jnp.asarray, params), state))
        return GuardState(
            state, zero, jnp.zeros_like(zero), jnp.zeros_like(zero), jnp.zeros((), bool), good
        )

    def kept_where_computed(
        is_fine: chex.Array, updates: Any, state: Any, params: Any, extra: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Updates, and the state after a step that is fine, written in place."""
        old = [jnp.asarray(x) for x in jax.tree.leaves(state)]

        def inner_update(given: Any) -> Any:
            gradient, state, at = given
            return tx.update(gradient, state, at, **extra)

        def keep(i: int, x: chex.Array) -> chex.Array:
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            return jnp.where(is_fine, x.astype(old[i].dtype) if is_float else x, old[i])

        found: tuple[Any, Any] = rewriting.replaced_where_computed(
            inner_update, (updates, state, params), keep, range(len(old))
        )
        return found

    def update(
        updates: optax.Updates,
        state: GuardState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GuardState]:
        is_fine = _all_finite(updates, _arrays(extra))
        if check_results:
            new_updates, new_inner = tx.update(updates, state.inner, params, **extra)
            new_inner = transforms.cast_like(new_inner, state.inner)
            is_fine &= _all_finite(new_updates)
            is_fine &= _none_lost(new_inner, state.inner)
            kept = _select(is_fine, new_inner, state.inner)
        else:
            new_updates, kept = kept_where_computed(is_fine, updates, state.inner, params, extra)

        consecutive = jnp.where(is_fine, 0, optax.safe_increment(state.consecutive))
        counts = {
            "accepted": _plus(state.accepted, is_fine),
            "rejected": _plus(state.rejected, ~is_fine),
            "consecutive": consecutive,
            "failed": state.failed | (consecutive >= max_consecutive),
        }
        step = jax.tree.map(lambda x: jnp.where(is_fine, x, jnp.zeros_like(x)), new_updates)
        if not isinstance(state.good, Snapshot) or rollback_after is None:
            return step, GuardState(inner=kept, good=(), **counts)

        params = transforms.require_params(params)
        is_time = is_fine & (state.accepted % snapshot_every == 0)
        good = _select(is_time, Snapshot(params, state.inner), state.good)
        returns = ~is_fine & (consecutive % rollback_after == 0)
        way = jax.tree.map(lambda to, x: to - x, state.good.params, params)
        step = _select(returns, way, step)
        return step, GuardState(inner=_select(returns, state.good.inner, kept), good=good, **counts)

    return optax.GradientTransformationExtraArgs(init, update)


def check_guard(state: Any) -> int:
    """Raises if a `guard` within an optimizer's state was failing; waits for the device.

    Args:
      state: any optimizer state on the host's side of `jax.jit`, also one of many runs under
        `jax.vmap`.

    Returns:
      The number of steps that were left out, of all guards and runs.

    Raises:
      NonFiniteStepsError: if ``max_consecutive`` steps in a row were left out.
      ValueError: if there is no `guard` in the state.

    Examples:
      >>> import jax.numpy as jnp, optax, optgrad
      >>> optimizer = optgrad.guard(optax.sgd(0.1), max_consecutive=2)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for _ in range(3):
      ...     _, state = optimizer.update(jnp.full(2, jnp.nan), state)
      >>> optgrad.check_guard(state)
      Traceback (most recent call last):
      ...
      optgrad.wrappers.guard.NonFiniteStepsError: max_consecutive steps in a row were not finite; \
3 of 3 steps were left out, the last 3 in a row
    """
    guards = diagnostics.states_of(state, GuardState)
    if not guards:
        raise ValueError("state has no guard in it; accepted: a state of optgrad.guard(...)")
    left_out = 0
    for found in guards:
        failed = np.atleast_1d(jax.device_get(found.failed))
        rejected, accepted, consecutive = (
            np.atleast_1d(jax.device_get(x)).astype(np.int64)
            for x in (found.rejected, found.accepted, found.consecutive)
        )
        left_out += int(rejected.sum())
        if failed.any():
            run = tuple(int(i) for i in np.argwhere(failed)[0])
            where = f" in run {run if len(run) > 1 else run[0]} of {failed.size}, the first of "
            where = f"{where}{int(failed.sum())} that fail" if failed.size > 1 else ""
            raise NonFiniteStepsError(
                f"max_consecutive steps in a row were not finite{where}; {rejected[run]} of "
                f"{rejected[run] + accepted[run]} steps were left out, the last "
                f"{consecutive[run]} in a row"
            )
    return left_out


def _arrays(extra: dict[str, Any]) -> list[Any]:
    """What is known of the extra arguments: functions are not called."""
    return [x for x in jax.tree.leaves(extra) if hasattr(x, "dtype") or isinstance(x, float)]


def _all_finite(*given: Any) -> chex.Array:
    return _is_zero([_zero_if_finite(x) for x in _inexact(given)])


def _none_lost(new: Any, old: Any) -> chex.Array:
    """Whether all that was finite is finite."""
    pairs = zip(_inexact(new), _inexact(old), strict=True)
    return _is_zero([_zero_if_kept(x, y) for x, y in pairs])


# Sums of x − x are 0 or NaN. XLA on CPU forms them in passing; whatever else it sums up alone that
# is not as simple as a product, such as a comparison, it stores first. Not so two sums together.


def _zero_if_finite(x: chex.Array) -> chex.Array:
    return jnp.sum(x - x)


def _zero_if_kept(new: chex.Array, old: chex.Array) -> chex.Array:
    zeros = jnp.where(jnp.isfinite(old), new - new, jnp.zeros_like(new))
    if not new.ndim or shards.may_be_divided(new, old):
        return jnp.sum(zeros)
    nothing = jnp.zeros((), new.dtype)
    first, second = jax.lax.reduce(
        (zeros, old - old), (nothing, nothing), lambda x, y: (x[0] + y[0], x[1] + y[1]),
        tuple(range(new.ndim)),
    )  # fmt: skip
    return jnp.where(second > 0, second, first)  # second is 0 or NaN: it is the first


def _is_zero(sums: list[chex.Array]) -> chex.Array:
    """Whether all are 0 on all devices; NaN is not."""
    if not sums:
        return jnp.ones((), bool)
    parts = [jnp.abs(x).astype(averages.scalar_dtype()).reshape(1) for x in sums]
    if shards.are_summed():
        parts = shards.added(parts)
    return jnp.sum(jax.lax.concatenate(parts, 0)) == 0


def _inexact(tree: Any) -> list[chex.Array]:
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    leaves = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    parts = [[jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x] for x in leaves]
    return [x for part in parts for x in part]


def _plus(count: chex.Array, is_counted: chex.Array) -> chex.Array:
    return jnp.where(is_counted, optax.safe_increment(count), count)


def _select(condition: chex.Array, x: Any, y: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
