"""With the record's ``test_hyperparams`` every method solves small problems."""

import jax
import jax.numpy as jnp
import numpy as np

from . import problem

QUADRATIC_STEPS, QUADRATIC_FACTOR = 400, 1e-3
LOGISTIC_STEPS, LOGISTIC_FACTOR = 400, 1e-2


def losses(method, step, single, steps):
    """Loss at the start and after some steps on the problem's only batch."""
    batch = single.batch(0)
    params = jax.tree.map(jnp.copy, single.params)  # the step may donate them
    state = jax.tree.map(jnp.copy, problem.create(method).init(params))
    for _ in range(steps):
        params, state = step(params, state, batch)
    value_fn = problem.Oracle(single.loss_fn, None, batch).value_fn
    return float(value_fn(single.params)), float(value_fn(params))


def optimum(single):
    """The smallest loss, by Newton's method in float64."""
    x, y = (np.asarray(single.batch(0)[key], np.float64) for key in ("x", "label"))
    features = np.column_stack([x, np.ones(len(x))])
    theta = np.zeros(features.shape[1])
    for _ in range(50):
        probability = 1 / (1 + np.exp(y * (features @ theta)))
        gradient = -(features * (y * probability)[:, None]).mean(0) + 0.1 * theta
        weights = probability * (1 - probability)
        hessian = (features.T * weights) @ features / len(x) + 0.1 * np.eye(len(theta))
        theta -= np.linalg.solve(hessian, gradient)
    assert np.linalg.norm(gradient) < 1e-12
    return np.logaddexp(0, -y * (features @ theta)).mean() + 0.05 * theta @ theta


def test_converges_on_quadratic(method):
    """Without noise the loss falls a thousandfold."""
    single = problem.quadratic(problem.standard().params, noise=0.0, steps=1)
    step, _ = problem.donated_step(method.name)
    start, end = losses(method, step, single, QUADRATIC_STEPS)
    assert end <= QUADRATIC_FACTOR * start


def test_converges_on_logistic_regression(method):
    """The loss above the optimum falls a hundredfold."""
    single = problem.logistic()
    step = jax.jit(problem.make_step(method, problem.create(method), single.loss_fn))
    start, end = losses(method, step, single, LOGISTIC_STEPS)
    least = optimum(single)
    assert end - least <= LOGISTIC_FACTOR * (start - least)
