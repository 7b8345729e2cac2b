"""The phase machine of step-size planning: one gradient per update, in any training loop.

Ordinary steps fill two windows (`windows`); an *episode* follows, of P projections along the fitted
step sizes, each with M ordinary steps after it that correct it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optgrad.core import averages, leafwise, transforms, trees
from optgrad.step_size_planning import windows
from optgrad.step_size_planning.options import Options

REFERENCE = 'H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022'

ONLINE, PROJECT, CORRECT, RESTORE = 0, 1, 2, 3  # phases

# Arguments of both methods that may not be traced.
STATIC = (
    "window",
    "pairing",
    "gradient",
    "layout",
    "base",
    "verify",
    "read_back",
    "ring_dtype",
    "paper",
)


class PlanningState(NamedTuple):
    """Where the machine stands, and what it remembers."""

    evaluations: chex.Array  # gradients consumed, int32, shape ()
    outer_iterations: chex.Array  # ordinary steps outside of episodes, int32, shape ()
    rejected: chex.Array  # plans that were taken back, int32, shape ()
    phase: chex.Array  # 0 ordinary, 1 projection, 2 correction, 3 return, int32, shape ()
    slot: chex.Array  # step of the window, in [0, K), int32, shape ()
    projection: chex.Array  # projections done in this episode, int32, shape ()
    correction: chex.Array  # corrections done of this projection, int32, shape ()
    is_full: chex.Array  # whether there is an older window, bool, shape ()
    is_pending: chex.Array  # whether a step waits to be recorded at the next call, bool, shape ()
    is_planned: chex.Array  # whether `step_sizes` are fitted ones, bool, shape ()
    is_checked: chex.Array  # whether the next call judges the plan, bool, shape ()
    window: windows.Window
    pending_gradient: Any  # of the step that waits, like the parameters; or None
    saved: Any  # the parameters before the episode, like the parameters; or None
    saved_metric: chex.Array | None  # the metric there, shape ()
    base: optax.OptState  # of the base transformation

    @property
    def step_sizes(self) -> chex.ArrayTree:
        """The planned step sizes α, like the parameters; sums of no meaning unless is_planned."""
        return self.window.numerator

    def diagnostics(self) -> dict[str, chex.Array]:
        """Counters, and the planned step sizes.

        Returns:
          ``evaluations``, ``outer_iterations``, ``rejected``: as in the state; ``is_planned``:
          whether there is a plan, from the fit to the first step of the next window; and its
          ``step_size_mean``, ``step_size_min``, ``step_size_max``, 0 without a plan; ``phase``: 0
          ordinary, 1 projection, 2 correction, 3 return.
        """
        leaves = [jnp.ravel(x) for x in jax.tree.leaves(self.step_sizes) if jnp.size(x)]
        found = {}
        if leaves:
            size = sum(x.size for x in leaves)
            found = {
                "mean": sum(jnp.sum(x) / size for x in leaves),
                "min": jnp.stack([jnp.min(x) for x in leaves]).min(),
                "max": jnp.stack([jnp.max(x) for x in leaves]).max(),
            }
        return {
            "evaluations": self.evaluations,
            "outer_iterations": self.outer_iterations,
            "rejected": self.rejected,
            "is_planned": self.is_planned,
            **{f"step_size_{k}": jnp.where(self.is_planned, x, 0.0) for k, x in found.items()},
            "phase": self.phase,
        }

    def per_parameter(self) -> dict[str, chex.ArrayTree]:
        """``step_size``: the planned ones, NaN while there is no plan."""
        return {
            "step_size": jax.tree.map(
                lambda x: jnp.where(self.is_planned, x, jnp.nan), self.step_sizes
            )
        }


def plan_steps(  # noqa: PLR0915  a machine reads best in one piece
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """The machine. The options are those of `csawg_repeated`, checked by `make_options`."""
    window = options.window
    base = None if options.base is None else optax.with_extra_args_support(options.base)
    is_lagged = options.pairing == "lagged"

    def init(params: optax.Params) -> PlanningState:
        waits = options.read_back and is_lagged
        verifies = options.verify is not None
        return PlanningState(
            **{name: jnp.zeros((), jnp.int32) for name in PlanningState._fields[:7]},
            **{name: jnp.zeros((), bool) for name in PlanningState._fields[7:11]},
            window=windows.init_window(options.layout, params, window, options.ring_dtype),
            pending_gradient=averages.zeros_like_average(params) if waits else None,
            saved=averages.zeros_like_average(params) if verifies else None,
            saved_metric=jnp.zeros((), averages.scalar_dtype()) if verifies else None,
            base=base.init(params) if base else optax.EmptyState(),
        )

    def update(  # noqa: PLR0915
        updates: optax.Updates,
        state: PlanningState,
        params: optax.Params | None = None,
        *,
        value: chex.Numeric | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, PlanningState]:
        params = transforms.require_params(params)
        rate, guard, tolerance, abort = (
            transforms.hyperparameter_at(x, state.evaluations)
            for x in (
                options.learning_rate,
                options.noise_guard,
                options.tolerance,
                options.abort,
            )
        )
        value = None if value is None else transforms.require_value(value)
        metric = _metric(options.verify, updates, value)
        has_value = jnp.asarray(True) if value is None else jnp.isfinite(value)
        s = state

        def record(position: optax.Params, gradient: optax.Updates, when: chex.Array) -> Any:
            return _recorded(s, _Entry(position, gradient, s.slot, when), rate, guard, window)

        # Where did the step of the last call lead?
        if options.read_back:
            gradient = s.pending_gradient if is_lagged else updates
            s, entry, _ = record(params, gradient, s.is_pending & (is_lagged | has_value))

        # Is this call to take a plan back, or else which of the three kinds of step to take?
        begins = (s.phase == PROJECT) & (s.projection == 0)
        rejects = restores = jnp.asarray(False)
        if options.verify:
            factor = jnp.where(s.phase == ONLINE, tolerance, abort)
            judges = s.is_checked | ((s.phase == PROJECT) & ~begins) | (s.phase == CORRECT)
            rejects = judges & ~_is_within(metric, s.saved_metric, factor)
            # Twice: from far away, the first time leaves the rounding of the large numbers there.
            restores = rejects | (s.phase == RESTORE)
            s = _save(s, params, metric, begins & has_value)
        acts = has_value & ~restores
        online, projects, corrects = (acts & (s.phase == p) for p in (ONLINE, PROJECT, CORRECT))
        opens = online & (s.slot == 0)
        s = s._replace(
            window=s.window.open(params, rate, opens), is_planned=s.is_planned & ~opens & ~restores
        )

        # The ordinary step.
        direction = updates
        if base:
            given = extra if value is None else {**extra, "value": value}
            direction, base_state = base.update(updates, s.base, params, **given)
            s = s._replace(base=_where(online | corrects, base_state, s.base))

        def ordinary(theta: chex.Array, d: chex.Array) -> chex.Array:
            step = -jnp.asarray(rate, averages.average_dtype(theta)) * trees.wide(d)
            return step.astype(theta.dtype)

        steps = taken_for_granted = leafwise.tree_map(ordinary, params, direction)

        # Where will it lead, if that is taken for granted?
        ends_at_once = jnp.asarray(False)
        if not options.read_back:
            after = leafwise.tree_map(_applied, params, steps)
            s, entry, plans = record(after, updates, online)
            if options.gradient == "reuse":
                ends_at_once = plans
                s = s._replace(phase=jnp.where(ends_at_once, ONLINE, s.phase))
                s = _save(s, params, metric, ends_at_once) if options.verify else s

        # Not to be computed twice, which would need the old sums twice (see `_in_place`).
        numerator = _computed_once(s.window.numerator)
        s = s._replace(window=s.window._replace(numerator=numerator))

        def chosen(
            theta: chex.Array, u: chex.Array, g: chex.Array, a: chex.Array, *saved: chex.Array
        ) -> chex.Array:
            jump = _projection(a, g, theta.dtype)
            u = jnp.where(projects, jump, jnp.where(ends_at_once, u + jump, u))
            u = jnp.where(acts, u, jnp.zeros_like(u))
            for before in saved:
                u = jnp.where(restores, (before - theta.astype(before.dtype)).astype(u.dtype), u)
            return u

        saved = [s.saved] if options.verify else []
        steps = leafwise.tree_map(chosen, params, steps, updates, s.step_sizes, *saved)

        def moved() -> optax.Updates:
            def one(p: chex.Array, u: chex.Array, recorded: chex.Array) -> chex.Array:
                start = jnp.where(ends_at_once, _applied(p, recorded), p)
                return _applied(p, u) - start

            return leafwise.tree_map(one, params, steps, taken_for_granted)

        in_episode = projects | corrects | ends_at_once
        s = s._replace(window=windows.follow(s.window, moved, in_episode))
        s, steps = _in_place(s, steps, updates, entry)
        kind = _Kind(online, projects, corrects, rejects, restores, ends_at_once)
        s = _advanced(s, kind, options.projections, options.corrections)
        # A matched pair waits for the next gradient that is one.
        waits = online | (s.is_pending & (not is_lagged) & ~(acts | restores))
        return steps, s._replace(is_pending=waits & options.read_back)

    return transforms.transformation(init, update)


class _Kind(NamedTuple):
    """Which kind of step a call takes: one of them, or none."""

    online: chex.Array
    projects: chex.Array
    corrects: chex.Array
    rejects: chex.Array  # whether it is the first of the two that restore
    restores: chex.Array
    ends_at_once: chex.Array  # whether the ordinary step is a projection besides


def _advanced(s: PlanningState, kind: _Kind, projections: int, corrections: int) -> PlanningState:
    """Counters, phase and flags after a step."""
    in_episode = kind.projects | kind.corrects
    correction = s.correction + kind.corrects
    is_corrected = in_episode & (correction >= corrections)
    projection = s.projection + is_corrected
    ends = is_corrected & (projection >= projections)
    phase = jnp.where(in_episode & ~is_corrected, CORRECT, s.phase)
    phase = jnp.where(is_corrected, jnp.where(ends, ONLINE, PROJECT), phase)
    skips = ~(kind.online | in_episode | kind.restores)

    def unless(when: chex.Array, x: chex.Array) -> chex.Array:
        return jnp.where(when, jnp.zeros_like(x), x)

    return s._replace(
        evaluations=optax.safe_increment(s.evaluations),
        outer_iterations=s.outer_iterations + kind.online,
        rejected=s.rejected + kind.rejects,
        phase=jnp.where(kind.rejects, RESTORE, unless(kind.restores, phase)),
        slot=unless(kind.restores, s.slot),
        projection=unless(ends | kind.restores, projection),
        correction=unless(is_corrected | kind.restores, correction),
        is_full=s.is_full & ~kind.restores,
        is_checked=jnp.where(skips, s.is_checked, ends | kind.ends_at_once),
    )


class _Entry(NamedTuple):
    """A step to be recorded."""

    position: optax.Params
    gradient: optax.Updates
    slot: chex.Array  # where in the rings
    when: chex.Array  # whether it is recorded at all


def _recorded(
    s: PlanningState, entry: _Entry, rate: chex.Numeric, guard: chex.Numeric, window: int
) -> tuple[PlanningState, _Entry, chex.Array]:
    """The state with one more step in the sums, the step, and whether it completes a plan."""
    slot = jnp.where(entry.when, (s.slot + 1) % window, s.slot)
    is_complete = entry.when & (slot == 0)
    plans = is_complete & s.is_full
    sums = s.window.record(entry.position, entry.gradient, rate, s.slot, entry.when)
    return (
        s._replace(
            window=windows.plan(sums, _rounding(guard, window), entry.position, plans),
            slot=slot,
            is_full=s.is_full | is_complete,
            is_planned=s.is_planned | plans,
            phase=jnp.where(plans, PROJECT, s.phase),
        ),
        entry,
        plans,
    )


def _in_place(
    s: PlanningState, steps: optax.Updates, gradient: optax.Updates, entry: _Entry
) -> tuple[PlanningState, optax.Updates]:
    """State and steps with the rings written, in an order that lets XLA reuse every buffer."""
    never = entry.slot < 0
    held = s.window._asdict()
    new = {name: held[name] for name in windows.ORDER if name in held}
    new = dict(zip(new, trees.in_turn(never, *new.values()), strict=True))
    last = next(reversed(new.values()))
    for name in ("gradients", "positions"):
        if name in held:
            _, written = trees.in_turn(never, last, getattr(entry, name.removesuffix("s")))
            new[name] = windows.write(held[name], written, entry.slot, entry.when)
            last = leafwise.tree_map(lambda ring: ring[0], new[name])  # whichever slot
    s = s._replace(window=s.window._replace(**new))
    if s.pending_gradient is not None:
        pending = transforms.cast_like(gradient, s.pending_gradient)
        _, last = trees.in_turn(never, last, pending)
        s = s._replace(pending_gradient=last)
    return s, trees.in_turn(never, last, steps)[1]


def _metric(
    verify: str | None, gradient: optax.Updates, value: chex.Array | None
) -> chex.Array | None:
    """What a plan is judged by, or None where plans are not judged."""
    dtype = averages.scalar_dtype()
    if verify == "loss":
        if value is None:
            raise ValueError(
                "value = None; accepted: the loss at params, update(…, value=loss), by which "
                "plans are judged, or verify=False to trust them"
            )
        return value.astype(dtype)
    if verify == "gradient_norm":
        (square,) = trees.dots((gradient, gradient))
        return jnp.sqrt(square).astype(dtype)
    return None


def _is_within(metric: chex.Array, reference: chex.Array, factor: chex.Numeric) -> chex.Array:
    """Whether metric ≤ factor·reference, for losses of either sign; not where either is NaN."""
    factor = jnp.asarray(factor, reference.dtype)
    # What overflows, and an infinite factor, is no bound; but an infinite metric is never within.
    slack = jnp.where(jnp.isinf(factor), jnp.inf, (factor - 1) * jnp.abs(reference))
    return jnp.isfinite(metric) & (metric <= reference + slack)


def _save(
    s: PlanningState, params: optax.Params, metric: chex.Array | None, when: chex.Array
) -> PlanningState:
    """Keeps the parameters and the metric before an episode."""
    saved_metric: Any = jnp.where(when, jnp.asarray(metric), jnp.asarray(s.saved_metric))
    saved = _computed_once(_where(when, params, s.saved))
    return s._replace(saved=saved, saved_metric=saved_metric)


def _rounding(guard: chex.Numeric, window: int) -> Callable[[chex.Array, chex.Array], chex.Array]:
    """(denominator, positions) -> ``guard`` times what their rounding gives for the numerator."""

    def noise(denominator: chex.Array, w: chex.Array) -> chex.Array:
        eps = float(jnp.finfo(w.dtype).eps)  # type: ignore[no-untyped-call]
        unit = jnp.asarray(guard * eps, denominator.dtype)
        return unit * jnp.abs(w).astype(denominator.dtype) * jnp.sqrt(window * denominator)

    return noise


def _projection(step_size: chex.Array, gradient: chex.Array, dtype: Any) -> chex.Array:
    """−α·g, 0 where that is no number."""
    step = (-step_size * gradient.astype(step_size.dtype)).astype(dtype)
    return jnp.where(jnp.isfinite(step), step, jnp.zeros_like(step))


def _applied(params: chex.Array, step: chex.Array) -> chex.Array:
    """The parameters after the step, rounded as `optax.apply_updates` does."""
    return (params + step).astype(params.dtype)


def _computed_once(tree: chex.ArrayTree) -> chex.ArrayTree:
    """``tree``, which XLA may not compute anew in each of its uses.

    One leaf at a time: together they would all count as shards where one is (see `shards`).
    """
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def _where(when: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    return leafwise.tree_map(lambda x, y: jnp.where(when, x.astype(y.dtype), y), new, old)
