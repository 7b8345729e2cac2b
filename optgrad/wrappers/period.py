"""Means over a period of micro-batches, and the variance of their mean gradient."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Weights(NamedTuple):
    """How much one more micro-batch counts; scalars."""

    is_first: chex.Array  # whether it opens a period: what came before is forgotten, NaN included
    old: chex.Array  # micro-batches or examples before it
    new: chex.Array  # its own, 0 if it is skipped
    total: chex.Array  # their sum
    counts_examples: bool  # whether these are numbers of examples

    @classmethod
    def of_next(
        cls,
        is_first: chex.Array,
        weight: chex.Array,
        num_examples: chex.Numeric | None,
        *,
        leave_out: chex.Array,
    ) -> "Weights":
        """Those of the micro-batch that follows on a total ``weight``."""
        old = jnp.where(is_first, 0.0, weight)
        new = jnp.asarray(1.0 if num_examples is None else num_examples, old.dtype)
        new = jnp.where(leave_out, 0.0, new)
        return cls(is_first, old, new, old + new, num_examples is not None)

    def mean(self, mean: chex.ArrayTree, sample: chex.ArrayTree) -> chex.ArrayTree:
        """The running mean with one more sample."""
        share = self.new / jnp.maximum(self.total, 1e-30)

        def update(m: chex.Array, x: chex.Array) -> chex.Array:
            m = jnp.where(self.is_first, 0.0, m)
            moved = m + share.astype(m.dtype) * (jnp.asarray(x, m.dtype) - m)
            return jnp.where(share > 0, moved, m)  # what is skipped may be NaN

        return jax.tree.map(update, mean, sample)

    def variance_of_mean(
        self,
        variance: chex.ArrayTree,
        sample: chex.ArrayTree,
        gradient: chex.ArrayTree,
        new_mean: chex.ArrayTree,
    ) -> chex.ArrayTree:
        """The variance of the running mean gradient, with one more micro-batch's variance."""
        old, new, scatter = self._variance_coefficients()

        def update(v: chex.Array, s: chex.Array, g: chex.Array, m: chex.Array) -> chex.Array:
            v = jnp.where(self.is_first, 0.0, v)
            merged = old.astype(v.dtype) * v + new.astype(v.dtype) * jnp.asarray(s, v.dtype)
            if self.counts_examples:
                deviation = jnp.asarray(g, v.dtype) - m.astype(v.dtype)
                merged += (scatter.astype(v.dtype) * deviation) * deviation
            return jnp.where(self.new > 0, merged, v)

        return jax.tree.map(update, variance, sample, gradient, new_mean)

    def _variance_coefficients(self) -> tuple[chex.Array, chex.Array, chex.Array]:
        """Of the old variance, of the new one, and of (g − new mean)².

        Without numbers of examples the squared shares. With them, sums of squared deviations
        N(N − 1)·s are merged as by Chan, Golub & LeVeque (1979), written through the new mean.
        """
        total = jnp.maximum(self.total, 1e-30)
        if not self.counts_examples:
            return (self.old / total) ** 2, (self.new / total) ** 2, jnp.zeros_like(total)
        pairs = total * jnp.maximum(self.total - 1, 1.0)
        return (
            self.old * jnp.maximum(self.old - 1, 0.0) / pairs,
            self.new * jnp.maximum(self.new - 1, 0.0) / pairs,
            jnp.where(self.old > 0, self.new * total / jnp.maximum(self.old, 1e-30) / pairs, 0.0),
        )
