"""What the figures of `step_size_planning` share: recorded runs in double precision, curves, text.

A run is a sequence of gradient evaluations, whatever the optimizer makes of each; all runs of one
optimizer are one compiled, vectorised program.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from matplotlib.figure import Figure

import optgrad

Array = npt.NDArray[Any]
Loss = Callable[[Any, Any, Any], Any]  # (params, data of the run, evaluation from 0) -> loss
PAPER = {"paper": True}  # the algorithm as printed: no verification of the plans
MATCHED = {"pairing": "matched", "verify": False, "layout": "pairs"}


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """64-bit floats within the block, and what was before after it."""
    before = jnp.result_type(float) == jnp.float64
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)  # type: ignore[no-untyped-call]


class Runs(NamedTuple):
    """R runs of T evaluations; index t: after t of them."""

    observed: Array  # what was observed of the parameters, shape (R, T + 1, …)
    iteration: Array  # outer iteration to which evaluation t belongs, shape (R, T + 1)
    step_size: Array | None  # planned α where a plan is in force, else NaN, shape (R, T + 1, …)
    rejected: Array  # plans taken back so far, shape (R, T + 1)

    def at_iterations(self, run: int = 0) -> Array:
        """For each outer iteration from 0 the evaluations that it and those before it took."""
        iterations = np.arange(self.iteration[run, -1] + 1)
        return np.searchsorted(self.iteration[run], iterations, side="right") - 1

    def plans(self, run: int = 0) -> tuple[Array, Array]:
        """(outer iterations that ended in a plan, their step sizes (plans, …))."""
        assert self.step_size is not None
        in_force = np.isfinite(self.step_size[run]).reshape(len(self.iteration[run]), -1).any(1)
        first = np.flatnonzero(in_force[1:] & ~in_force[:-1]) + 1
        return self.iteration[run][first], self.step_size[run][first]


def follow(
    loss: Loss,
    method: str,
    starts: npt.ArrayLike,
    evaluations: int,
    *,
    data: Any = None,
    fixed: Mapping[str, Any] | None = None,
    swept: Mapping[str, npt.ArrayLike] | None = None,
    observe: Callable[[Any, Any], Any] | None = None,
) -> Runs:
    """Runs an optimizer from each start.

    Args:
      loss: what is differentiated.
      method: registered name.
      starts: shape (R, d); numbers become the floats that are in force.
      evaluations: T.
      data: of the runs, a tree with leading axis R; nothing by default.
      fixed: hyperparameters of all runs.
      swept: hyperparameter -> R values, traced.
      observe: (params, data of the run) -> what to keep of them; by default parameters and step
        sizes, otherwise no step sizes.
    """
    keep_all = observe is None

    def one(start: Any, own: Any, setting: dict[str, Any]) -> Any:
        optimizer = optgrad.create(method, **(fixed or {}), **setting)

        def look(params: Any, state: Any, count: Any) -> Any:
            seen = params if observe is None else observe(params, own)
            iteration = getattr(state, "outer_iterations", count)
            sizes = None
            if keep_all and hasattr(state, "step_sizes"):
                sizes = jnp.where(state.is_planned, state.step_sizes, jnp.nan)
            return seen, iteration, sizes, getattr(state, "rejected", jnp.zeros_like(count))

        def step(carry: Any, count: Any) -> Any:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, own, count)
            updates, state = optimizer.update(gradient, state, params, value=value)
            params = optax.apply_updates(params, updates)
            return (params, state), look(params, state, count + 1)

        state = optimizer.init(start)
        first = look(start, state, jnp.zeros((), jnp.int32))
        _, rest = jax.lax.scan(step, (start, state), jnp.arange(evaluations, dtype=jnp.int32))
        return jax.tree.map(lambda x, y: jnp.concatenate([jnp.asarray(x)[None], y]), first, rest)

    values = {name: jnp.asarray(np.asarray(x), float) for name, x in (swept or {}).items()}
    found = jax.jit(jax.vmap(one))(jnp.asarray(np.asarray(starts), float), data, values)
    return Runs(*jax.tree.map(np.asarray, found))


def distances(params: Array, minimizer: npt.ArrayLike) -> Array:
    """‖w − w*‖; infinite where w is not finite."""
    with np.errstate(all="ignore"):
        norm = np.linalg.norm(params - np.asarray(minimizer), axis=-1)
    return np.where(np.isfinite(norm), norm, np.inf)


def first_at_most(values: Array, bound: float) -> int | None:
    """The first index at which a curve is at or below a bound, None if never."""
    below = np.flatnonzero(values <= bound)
    return int(below[0]) if len(below) else None


def below_from(lower: Array, upper: Array) -> int | None:
    """The first index from which on ``lower`` stays below ``upper``, None if it ends above."""
    above = np.flatnonzero(~(lower < upper))
    start = int(above[-1]) + 1 if len(above) else 0
    return start if start < len(lower) else None


def at(values: Array, index: int) -> Any:
    """A value by its index, the last where the curve is shorter."""
    return values[min(index, len(values) - 1)]


def thinned(count: int, kept: int = 80) -> Array:
    """At most ``kept`` of the indices 0 … count − 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(kept, count)).astype(int))


def curve_rows(
    labels: Mapping[str, Any], values: Mapping[str, Array], kept: int = 80
) -> list[dict[str, Any]]:
    """Rows of the numbers behind some curves of one length, to five digits, infinities left out."""
    length = len(next(iter(values.values())))
    rows = []
    for i in thinned(length, kept):
        found = {name: float(f"{float(x[i]):.5g}") for name, x in values.items()}
        if all(np.isfinite(list(found.values()))):
            rows.append({**labels, **found})
    return rows


def positive(values: Array) -> Array:
    """A curve for a logarithmic axis: NaN where it is 0 or not finite."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def number(value: float | None) -> str:
    """Two digits; ``never`` for None, ``diverged`` for an infinity.

    Examples:
      >>> number(0.01398), number(0.0), number(4.0), number(np.inf), number(None)
      ('0.014', '0', '4', 'diverged', 'never')
    """
    if value is None:
        return "never"
    return f"{value:.2g}" if np.isfinite(value) else "diverged"


def count(value: int | None) -> str:
    """With thousands separators; ``never`` for None."""
    return "never" if value is None else f"{value:,}"


def listed(values: Sequence[Any], show: Callable[[Any], str] = number) -> str:
    """Several numbers, in the paper's way of giving them.

    Examples:
      >>> listed([400.0, 320.0, 133.3], "{:.0f}".format)
      '400/320/133'
    """
    return "/".join(show(v) for v in values)


def figure(width: float, height: float) -> Figure:
    """An empty one."""
    return Figure(figsize=(width, height))
