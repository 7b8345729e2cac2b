"""What a method's ``update`` is given in training beside the gradient."""

from collections.abc import Callable
from typing import Any

import chex
import jax

from optgrad import registry
from optgrad.core import oracles
from optgrad.experiments.problems import Problem

# What every problem has, and what it has if it has a function of that name.
_ALWAYS = ("params", "value", "grad", "value_fn", "per_example_grads", "gradient_variance")
_OPTIONAL = {
    "outputs_fn": "outputs",
    "out_loss_fn": "out_loss",
    "residual_fn": "residuals",
    "kfac_stats": "layer_statistics",
}
PROVIDED = frozenset({*_ALWAYS, *_OPTIONAL})


class Extras:
    """Builds the loss, the gradient and a method's extra arguments on a batch.

    Args:
      problem: whose functions they are made of.
      method: its ``needs`` decide which ones are built.
      microbatch_size: per-example gradients held at once, for methods that need their variance.

    Attributes:
      names: those that are built.
      samples_labels: whether statistics of layers are of labels that are sampled from the model.

    Raises:
      ValueError: if the method needs something that the harness, or the problem, does not have.
    """

    def __init__(
        self, problem: Problem, method: registry.Method, microbatch_size: int | None = None
    ) -> None:
        if missing := method.needs - PROVIDED:
            raise ValueError(
                f"{method.name} needs {', '.join(sorted(missing))}, which the harness does not "
                f"compute; accepted: methods that need any of {', '.join(sorted(PROVIDED))}"
            )
        self._problem: Any = problem  # whose optional functions are looked for
        self._microbatch_size = microbatch_size
        self.names = _names(problem, method)
        # Where the statistics stand in for gradients of the examples, they are of the same labels.
        self.samples_labels = "kfac_stats" in self.names and "per_example_grads" not in method.needs

    def build(
        self, params: Any, batch: Any, key: chex.PRNGKey | None
    ) -> tuple[chex.Array, Any, dict[str, Any]]:
        """Loss, gradient, and the extra arguments for the method; the key samples labels."""
        problem = self._problem
        variance = None
        if "gradient_variance" in self.names:
            value, grad, variance = oracles.value_grad_and_variance(
                problem.example_loss, params, batch, microbatch_size=self._microbatch_size
            )
        else:
            value, grad = jax.value_and_grad(problem.loss)(params, batch)
        builders: dict[str, Callable[[], Any]] = {
            "value": lambda: value,
            "grad": lambda: grad,
            "gradient_variance": lambda: variance,
            "value_fn": lambda: lambda p: problem.loss(p, batch),
            "outputs_fn": lambda: lambda p: problem.outputs(p, batch),
            "out_loss_fn": lambda: lambda z: problem.out_loss(z, batch),
            "residual_fn": lambda: lambda p: problem.residuals(p, batch),
            "kfac_stats": lambda: problem.layer_statistics(params, batch, key),
            "per_example_grads": lambda: oracles.per_example_grads(
                problem.example_loss, params, batch, microbatch_size=self._microbatch_size
            ),
        }
        return value, grad, {name: builders[name]() for name in self.names}


def _names(problem: Problem, method: registry.Method) -> tuple[str, ...]:
    """The extra arguments that the method is given.

    Those that it needs, and if it is not a baseline (optax's line searches refuse what they do not
    know) the functions that its options may ask for. Of two that a method takes either of, the one
    that is cheaper to hold.

    Raises:
      ValueError: if the problem lacks something that the method needs.
    """
    needs = method.extras(has_layers=problem.layer_statistics is not None)
    lacks = {name for name, field in _OPTIONAL.items() if getattr(problem, field) is None}
    if missing := needs & lacks:
        fields = ", ".join(_OPTIONAL[name] for name in sorted(missing))
        raise ValueError(
            f"{method.name} needs {', '.join(sorted(missing))}, which the problem {problem.name!r} "
            f"does not have; accepted: a Problem with {fields}"
        )
    if method.family != "baselines":
        needs |= {"value", "grad", "value_fn", "outputs_fn", "out_loss_fn"} - lacks
    return tuple(sorted(needs))
