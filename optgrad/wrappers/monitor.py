"""A record of what a method models, interval by interval, that lives in the state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, diagnostics, transforms, trees

Read = Callable[[Any], chex.ArrayTree]  # the wrapped transformation's new state -> numbers

STEP_FIELDS = ("update", "relative_update")


class Summary(NamedTuple):
    """One quantity over an interval; at least float32. NaN if no entry was finite."""

    min: chex.Array  # of all entries at all steps, shape ()
    mean: chex.Array  # over entries, then over steps, shape ()
    max: chex.Array  # of all entries at all steps, shape ()
    quantiles: chex.Array  # over entries, then the mean over steps, shape (quantiles,)


class _Sums(NamedTuple):
    """Of the interval that is under way."""

    min: chex.Array
    sum: chex.Array  # of the steps' means
    max: chex.Array
    quantiles: chex.Array  # sum of the steps'
    steps: chex.Array  # that had a finite entry, at least float32, shape ()


class MonitorState(NamedTuple):
    """State of `monitor`."""

    inner: Any  # of the wrapped transformation
    step: chex.Array  # steps of the interval under way, in [0, interval), int32, shape ()
    intervals: chex.Array  # finished, int32, shape ()
    running: dict[str, _Sums]  # by quantity
    last: dict[str, Summary]  # of the last finished interval, by quantity; NaN before it

    def monitored(self) -> dict[str, Summary]:
        """The last finished interval."""
        return self.last


def monitor(
    inner: optax.GradientTransformation,
    fields: Sequence[str] | Mapping[str, Read] | None = None,
    *,
    interval: int = 100,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    sample: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    r"""Records what a method models, over intervals of steps, without leaving `jax.jit`.

    The updates are those of the wrapped transformation. In the state stands, for each quantity x
    with the entries :math:`x_{t,i}` at the steps t of the last interval of n steps,

    .. math::
      \min_{t,i} x_{t,i}, \quad \frac1n\sum_t \frac1D\sum_i x_{t,i}, \quad
      \max_{t,i} x_{t,i}, \quad \frac1n\sum_t Q_p(x_{t,\cdot}),

    with the quantiles Q over the parameters. Entries that are not finite (the relative variance of
    a gradient that is 0) are left out.

    The state's structure and types are fixed by ``init``: it runs in `jax.lax.scan` and under
    `jax.vmap`, and is read once for each interval with `monitored`. `optax.monitor` keeps the last
    values in a dictionary that ``init`` leaves empty, and cannot run in a scan.

    Args:
      inner: the transformation.
      fields: which quantities. Names of `optgrad.per_parameter` (``"step_size"``, ``"curvature"``,
        ``"relative_variance"``, ``"variance_adaptation"``, …), of `optgrad.diagnostics`
        (``"phase"``, ``"rejected_steps"``, …), ``"update"``, the size \|Δθ\| of each parameter's
        update, or ``"relative_update"``, \|Δθ\|/\|θ\|. Or a mapping from names of your own to
        functions of the wrapped transformation's state that return an array or a tree. None:
        ``"update"``, and all that it has of the first two, without what is said of the same
        quantity by both (``"step_size"`` and ``"step_size_min"``).
      interval: steps in an interval, ≥ 1.
      quantiles: probabilities in [0, 1].
      sample: of how many entries, at most, quantiles are taken, ≥ 1: of larger trees evenly spaced
        ones, as many of each leaf as is its share, and at least one. (Sorting is dear. Minimum,
        mean and maximum are of all entries.) With 1,024 entries the p-quantile is that of
        another p with the standard deviation :math:`\sqrt{p(1-p)/1024}`, 0.016 for the median.

    Returns:
      A `GradientTransformationExtraArgs` that takes what ``inner`` takes. Quantities cost one pass
      over what they are computed from, and the state a few scalars each.

    Raises:
      ValueError: for a count below 1 or a probability outside [0, 1]; by ``init``, for a name
        that is none of the wrapped transformation's; by ``update``, for missing parameters with
        ``"relative_update"``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optgrad
      >>> optimizer = optgrad.monitor(optax.sgd(0.5), interval=20)
      >>> curvature = jnp.array([0.0, 1.0, 2.0])
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = optimizer.update(curvature * params, state, params)
      ...     return (params + updates, state), None
      >>> params = jnp.ones(3)
      >>> (_, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=20)
      >>> found = optgrad.monitored(state)["update"]
      >>> print(found.min, found.max, f"{found.mean:.3f}")
      0.0 1.0 0.033
    """
    checks.check_count("interval", interval, 1)
    checks.check_count("sample", sample, 1)
    if isinstance(fields, str):
        raise TypeError(f"fields = {fields!r} is a string; accepted: a list of names, or a mapping")
    for p in quantiles:
        checks.check_in_range("quantiles", p, 0.0, 1.0)
    probabilities = jnp.asarray([float(p) for p in quantiles], jnp.float32)
    tx = optax.with_extra_args_support(inner)

    def quantities(state: Any, updates: Any, params: Any) -> dict[str, Any]:
        if isinstance(fields, Mapping):
            return {name: read(state) for name, read in fields.items()}
        scalars, trees_of = diagnostics.diagnostics(state), diagnostics.per_parameter(state)
        if fields is None:
            summed_up = tuple(f"{name}_" for name in trees_of)
            rest = {k: x for k, x in scalars.items() if not k.startswith(summed_up)}
            return {**rest, **trees_of, "update": jax.tree.map(jnp.abs, updates)}
        found = {**scalars, **trees_of}
        for name in fields:
            checks.check_one_of("fields", name, (*found, *STEP_FIELDS))
        if "update" in fields:
            found["update"] = jax.tree.map(jnp.abs, updates)
        if "relative_update" in fields:
            params = transforms.require_params(params)
            found["relative_update"] = diagnostics.ratio(updates, params)
        return {name: found[name] for name in fields}

    def init(params: optax.Params) -> MonitorState:
        state = tx.init(params)
        names = [*jax.eval_shape(quantities, state, params, params)]
        count = jnp.zeros((), jnp.int32)
        unknown = jnp.full((), jnp.nan, averages.scalar_dtype())
        none = Summary(unknown, unknown, unknown, jnp.full(len(quantiles), unknown))
        return MonitorState(
            state, count, count, {name: _nothing(len(quantiles)) for name in names},
            dict.fromkeys(names, none),
        )  # fmt: skip

    def update(
        updates: optax.Updates,
        state: MonitorState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MonitorState]:
        new_updates, new_inner = tx.update(updates, state.inner, params, **extra)
        found = quantities(new_inner, new_updates, params)
        running = {
            name: _plus(state.running[name], _summary(x, probabilities, sample))
            for name, x in found.items()
        }
        step = state.step + 1
        is_end = step >= interval
        finished = {name: _finished(sums) for name, sums in running.items()}

        def where(x: Any, y: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(is_end, a, b), x, y)

        nothing = _nothing(len(quantiles))
        return new_updates, MonitorState(
            new_inner,
            jnp.where(is_end, 0, step),
            jnp.where(is_end, optax.safe_increment(state.intervals), state.intervals),
            {name: where(nothing, sums) for name, sums in running.items()},
            {name: where(finished[name], state.last[name]) for name in running},
        )

    return optax.GradientTransformationExtraArgs(init, update)


def monitored(state: Any) -> dict[str, Summary]:
    """The last finished interval of every `monitor` within a state, by quantity.

    Args:
      state: any optimizer state, also one of many runs under `jax.vmap`.

    Raises:
      ValueError: if there is no `monitor` in the state.
    """
    found = diagnostics.collected(state, "monitored")
    if not found:
        raise ValueError("state has no monitor in it; accepted: a state of optgrad.monitor(...)")
    return found


def _nothing(quantiles: int) -> _Sums:
    dtype = averages.scalar_dtype()
    return _Sums(
        jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype),
        jnp.zeros(quantiles, dtype), jnp.zeros((), dtype),
    )  # fmt: skip


def _summary(tree: Any, probabilities: chex.Array, sample: int) -> _Sums:
    """Of one step."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.size(x)]
    nothing = _nothing(probabilities.size)
    if not leaves:
        return nothing
    leaves = [trees.wide(jnp.asarray(x)) for x in leaves]
    finite = [jnp.isfinite(x) for x in leaves]
    kept = [jnp.where(ok, x, 0.0) for ok, x in zip(finite, leaves, strict=True)]
    numbers = [x.astype(jnp.float32) for x in finite]
    total, number = trees.dots((kept, numbers), (numbers, numbers))
    least = [jnp.min(x, where=ok, initial=jnp.inf) for x, ok in zip(leaves, finite, strict=True)]
    most = [jnp.max(x, where=ok, initial=-jnp.inf) for x, ok in zip(leaves, finite, strict=True)]
    is_any = number > 0
    few = _sampled(leaves, sample)
    found = jnp.nanquantile(jnp.where(jnp.isfinite(few), few, jnp.nan), probabilities)
    dtype = averages.scalar_dtype()
    return _Sums(
        jnp.stack(least).min().astype(dtype),
        jnp.where(is_any, total / jnp.maximum(number, 1), 0.0).astype(dtype),
        jnp.stack(most).max().astype(dtype),
        jnp.where(jnp.isfinite(found), found, 0.0).astype(dtype),
        is_any.astype(dtype),
    )


def _sampled(leaves: Sequence[chex.Array], sample: int) -> chex.Array:
    """About so many entries of the leaves, evenly spaced along all axes."""
    every = max(sum(x.size for x in leaves) / sample, 1.0)
    return jnp.concatenate([jnp.ravel(x[_grid(x.shape, every)]) for x in leaves])


def _grid(shape: tuple[int, ...], every: float) -> tuple[slice, ...]:
    """Slices that take about one of so many entries of an array, and at least one."""
    steps = dict.fromkeys(range(len(shape)), 1)
    for left, axis in zip(
        range(len(shape), 0, -1), sorted(steps, key=shape.__getitem__), strict=True
    ):
        steps[axis] = min(max(round(every ** (1 / left)), 1), shape[axis])
        every = max(every / steps[axis], 1.0)
    return tuple(slice(None, None, step) for step in steps.values())


def _plus(sums: _Sums, step: _Sums) -> _Sums:
    return _Sums(
        jnp.minimum(sums.min, step.min),
        sums.sum + step.sum,
        jnp.maximum(sums.max, step.max),
        sums.quantiles + step.quantiles,
        sums.steps + step.steps,
    )


def _finished(sums: _Sums) -> Summary:
    def or_unknown(x: chex.Array) -> chex.Array:
        return jnp.where(sums.steps > 0, x, jnp.nan)

    steps = jnp.maximum(sums.steps, 1)
    return Summary(
        or_unknown(sums.min),
        or_unknown(sums.sum / steps),
        or_unknown(sums.max),
        or_unknown(sums.quantiles / steps),
    )
