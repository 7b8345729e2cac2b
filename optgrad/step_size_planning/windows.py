r"""What planning remembers: two windows of K steps, in three layouts that give the same step sizes.

Over the newer window and the one before it, the step size of each coordinate is fitted to
"K steps of the base method are one step along this gradient":

.. math::
  \alpha = \frac{\sum_s g_s\,(w_s - w_{s+K})}{\sum_s g_s^2}, \qquad s \text{ over the older window.}

As soon as the step s+K has been seen, the older step s is no longer needed, and its slot of a ring
of K is free. Instead of the positions, one may keep how far they are from a reference point
(`Reference`), or conclude them from the gradients (`Gradients`).

All have the same operations, in each of which ``when`` says whether it takes place: ``open`` before
the first step of a window, ``record`` for each of its steps, `plan` after its last one, `follow`
for each step that is not recorded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optgrad.core import averages, leafwise, linalg, trees

LAYOUTS = ("pairs", "reference", "gradients")
# Each vector's new value needs old values of itself and of those after it only.
ORDER = ("numerator", "denominator", "moment", "gradient_sum", "reference", "excursion")
LOW_PRECISION = (
    "the stored gradients, by ring_dtype or low_precision_state; never positions and sums, of "
    "which the plan is a ratio of differences"
)
WIDE_STATE = (
    *(f"window.{name}" for name in ("positions", *ORDER)),
    "pending_gradient",
    "saved",
)


class Pairs(NamedTuple):
    """Positions and gradients of K steps; exact to the last bit. 2K + 2 vectors."""

    positions: chex.ArrayTree  # w of the last K steps, leading axis of K on each leaf
    gradients: chex.ArrayTree  # g of the last K steps, leading axis of K on each leaf
    numerator: chex.ArrayTree  # Σ g(w − w'), and after planning α; like the parameters
    denominator: chex.ArrayTree  # Σ g², like the parameters

    def open(self, params: chex.ArrayTree, rate: chex.Numeric, when: chex.Array) -> "Pairs":
        """Sums begin at zero."""
        del params, rate
        zero = [
            leafwise.tree_map(lambda x: _select(when, 0.0, x), sums)
            for sums in (self.numerator, self.denominator)
        ]
        return self._replace(numerator=zero[0], denominator=zero[1])

    def record(
        self,
        position: chex.ArrayTree,
        gradient: chex.ArrayTree,
        rate: chex.Numeric,
        slot: chex.Array,
        when: chex.Array,
    ) -> "Pairs":
        """A step of the newer window meets its counterpart of the older one."""
        del rate, gradient

        def one(
            positions: chex.Array,
            gradients: chex.Array,
            numerator: chex.Array,
            denominator: chex.Array,
            w: chex.Array,
        ) -> tuple[chex.Array, ...]:
            before, g = _at(positions, slot), _at(gradients, slot).astype(numerator.dtype)
            numerator = _select(when, numerator + g * (before - w.astype(before.dtype)), numerator)
            return numerator, _select(when, denominator + g * g, denominator)

        sums = trees.map_several(2, one, *self, position)
        return Pairs(self.positions, self.gradients, *sums)


class Reference(NamedTuple):
    """Gradients of K steps, and distances from where the window began. K + 5 vectors.

    Distances are small, so that nothing cancels but in their own rounding.
    """

    gradients: chex.ArrayTree  # g of the last K steps, leading axis of K on each leaf
    reference: chex.ArrayTree  # r, parameters at the start of the newer window
    numerator: chex.ArrayTree  # Σ g(w − w'), and after planning α; like the parameters
    denominator: chex.ArrayTree  # Σ g², like the parameters
    moment: chex.ArrayTree  # Σ g(w − r) of the newer window, like the parameters
    gradient_sum: chex.ArrayTree  # Σ g of the newer window, like the parameters

    def open(self, params: chex.ArrayTree, rate: chex.Numeric, when: chex.Array) -> "Reference":
        """The finished window is the older one from now on, seen from a new reference point."""
        del rate

        def one(  # noqa: PLR0917  the state's vectors, in order
            reference: chex.Array,
            numerator: chex.Array,
            denominator: chex.Array,
            moment: chex.Array,
            total: chex.Array,
            params: chex.Array,
        ) -> tuple[chex.Array, ...]:
            here = params.astype(reference.dtype)
            centred = moment - (here - reference).astype(moment.dtype) * total
            return (
                _select(when, here, reference),
                _select(when, centred, numerator),
                *(_select(when, 0.0, x) for x in (denominator, moment, total)),
            )

        return Reference(self.gradients, *trees.map_several(5, one, *self[1:], params))

    def record(
        self,
        position: chex.ArrayTree,
        gradient: chex.ArrayTree,
        rate: chex.Numeric,
        slot: chex.Array,
        when: chex.Array,
    ) -> "Reference":
        """A step of the newer window meets its counterpart of the older one."""
        del rate

        def one(  # noqa: PLR0917  the state's vectors, in order
            gradients: chex.Array,
            reference: chex.Array,
            numerator: chex.Array,
            denominator: chex.Array,
            moment: chex.Array,
            total: chex.Array,
            w: chex.Array,
            g: chex.Array,
        ) -> tuple[chex.Array, ...]:
            before = _at(gradients, slot).astype(numerator.dtype)
            now = g.astype(gradients.dtype).astype(numerator.dtype)  # as the ring will return it
            distance = (w.astype(reference.dtype) - reference).astype(numerator.dtype)
            numerator = _select(when, numerator - before * distance, numerator)
            denominator = _select(when, denominator + before * before, denominator)
            moment = _select(when, moment + now * distance, moment)
            total = _select(when, total + now, total)
            return numerator, denominator, moment, total

        sums = trees.map_several(4, one, *self, position, gradient)
        return Reference(self.gradients, self.reference, *sums)


class Gradients(NamedTuple):
    r"""Gradients alone, for plain SGD whose updates are applied as they are. K + 5 vectors.

    A step of the newer window is γ times the sum of K gradients away from its counterpart, plus
    what the episode between them has moved, e, which is the same for all steps:

    .. math:: \sum_s g_s(w_s - w_{s+K}) = \gamma \sum_{s<j} g_s g_j + e \sum_s g_s .
    """

    gradients: chex.ArrayTree  # g of the last K steps, leading axis of K on each leaf
    numerator: chex.ArrayTree  # Σ g(w − w'), and after planning α; like the parameters
    denominator: chex.ArrayTree  # Σ g², like the parameters
    moment: chex.ArrayTree  # Σ g_i g_j, i < j, of the newer window, like the parameters
    gradient_sum: chex.ArrayTree  # Σ g of the newer window, like the parameters
    excursion: chex.ArrayTree  # e, what the last episode has taken from the parameters

    def open(self, params: chex.ArrayTree, rate: chex.Numeric, when: chex.Array) -> "Gradients":
        """The finished window is the older one from now on."""
        del params

        def one(
            numerator: chex.Array,
            denominator: chex.Array,
            moment: chex.Array,
            total: chex.Array,
            excursion: chex.Array,
        ) -> tuple[chex.Array, ...]:
            folded = jnp.asarray(rate, moment.dtype) * moment + excursion * total
            rest = (denominator, moment, total, excursion)
            return _select(when, folded, numerator), *(_select(when, 0.0, x) for x in rest)

        return Gradients(self.gradients, *trees.map_several(5, one, *self[1:]))

    def record(
        self,
        position: chex.ArrayTree,
        gradient: chex.ArrayTree,
        rate: chex.Numeric,
        slot: chex.Array,
        when: chex.Array,
    ) -> "Gradients":
        """A step of the newer window meets its counterpart of the older one."""
        del position

        def one(  # noqa: PLR0917  the state's vectors, in order
            gradients: chex.Array,
            numerator: chex.Array,
            denominator: chex.Array,
            moment: chex.Array,
            total: chex.Array,
            g: chex.Array,
        ) -> tuple[chex.Array, ...]:
            before = _at(gradients, slot).astype(numerator.dtype)
            now = g.astype(gradients.dtype).astype(numerator.dtype)  # as the ring will return it
            moment = _select(when, moment + now * total, moment)
            total = _select(when, total + now, total)
            step = jnp.asarray(rate, numerator.dtype) * before * total
            numerator = _select(when, numerator + step, numerator)
            denominator = _select(when, denominator + before * before, denominator)
            return numerator, denominator, moment, total

        sums = trees.map_several(4, one, *self[:-1], gradient)
        names = ("numerator", "denominator", "moment", "gradient_sum")
        return self._replace(**dict(zip(names, sums, strict=True)))


Window = Pairs | Reference | Gradients


def init_window(layout: str, params: chex.ArrayTree, window: int, ring_dtype: Any) -> Window:
    """Empty windows.

    Args:
      layout: one of `LAYOUTS`.
      params: the parameters.
      window: K ≥ 1.
      ring_dtype: type of the stored gradients; default the parameter's, but at least float32.
    """

    def zeros() -> chex.ArrayTree:
        return averages.zeros_like_average(params)

    def ring(dtype: Any) -> chex.ArrayTree:
        return linalg.empty_basis(params, window, dtype)

    if layout == "pairs":
        return Pairs(ring(None), ring(ring_dtype), zeros(), zeros())
    if layout == "reference":
        return Reference(ring(ring_dtype), *(zeros() for _ in range(5)))
    return Gradients(ring(ring_dtype), *(zeros() for _ in range(5)))


def smallest(window: int) -> str:
    """The safe layout that needs the least memory: 2K + 2 vectors or K + 5.

    `Gradients` needs no less than `Reference`, and believes that steps happened which rounding
    took away: it is never chosen.

    Examples:
      >>> smallest(2), smallest(3), smallest(4)
      ('pairs', 'pairs', 'reference')
    """
    return "pairs" if 2 * window + 2 <= window + 5 else "reference"


def plan(
    window: Window, floor: Callable[..., chex.Array], position: chex.ArrayTree, when: chex.Array
) -> Window:
    """The fitted step sizes in place of the numerator; 0 without a gradient.

    Args:
      window: after the last step of the newer window.
      floor: (denominator, position) -> the numerator that rounding alone may give.
      position: the parameters.
      when: whether to.
    """

    def one(numerator: chex.Array, denominator: chex.Array, w: chex.Array) -> chex.Array:
        has_gradient = denominator != 0
        ratio = numerator / jnp.where(has_gradient, denominator, 1.0)
        is_known = has_gradient & ~(jnp.abs(numerator) <= floor(denominator, w))
        return _select(when, jnp.where(is_known, ratio, 0.0), numerator)

    step_sizes = leafwise.tree_map(one, window.numerator, window.denominator, position)
    return window._replace(numerator=step_sizes)


def follow(window: Window, moved: Callable[[], chex.ArrayTree], when: chex.Array) -> Window:
    """Notes a step that is not recorded, where positions are not read.

    Args:
      window: any.
      moved: () -> by how much the parameters have changed, as their type rounds it.
      when: whether they have.
    """
    if not isinstance(window, Gradients):
        return window
    excursion = leafwise.tree_map(
        lambda e, x: _select(when, e - x.astype(e.dtype), e), window.excursion, moved()
    )
    return window._replace(excursion=excursion)


def write(ring: chex.ArrayTree, entry: chex.ArrayTree, slot: chex.Array, when: chex.Array) -> Any:
    """The ring with another entry in one slot."""

    def one(ring: chex.Array, entry: chex.Array) -> chex.Array:
        kept = _select(when, entry, _at(ring, slot))
        return jax.lax.dynamic_update_index_in_dim(ring, kept, slot, 0)

    return leafwise.tree_map(one, ring, entry)


def _select(when: chex.Array, new: Any, old: chex.Array) -> chex.Array:
    return jnp.where(when, jnp.asarray(new, old.dtype), old)


def _at(ring: chex.Array, slot: chex.Array) -> chex.Array:
    return jax.lax.dynamic_index_in_dim(ring, slot, keepdims=False)
