"""What can be asked of a loss: products with curvature matrices, and gradients of its examples.

``loss_fn(params, example)`` is the loss of one example, a scalar; ``batch`` is a pytree like one
example with a leading batch axis on every leaf. ``value_fn(params)`` and the other functions of the
parameters alone are closed over a batch.

A *product* maps a tree v like the parameters to Av, both in at least float32 whatever the
parameters' type. Each pass of differentiation runs in the parameters' own types.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from optgrad.core import averages, checks, linalg, transforms, trees

LossFn = Callable[[Any, Any], chex.Array]
ValueFn = Callable[[Any], chex.Array]

# Costs in gradient equivalents: a gradient is 1.
VALUE_COST = 1 / 3
HESSIAN_PRODUCT_COST = {"exact": 2.0, "jvp": 2.0, "fd": 1.0, "fdc": 2.0}  # by its mode
GAUSS_NEWTON_PRODUCT_COST = 2.0


# --- functions of the parameters ---------------------------------------------------------------


def require_function(name: str, function: Any, builder: str | None = None) -> Callable[[Any], Any]:
    """An extra argument that is a function of the parameters, refused if it is missing.

    Args:
      name: of the argument.
      function: what was given for it.
      builder: the call of `optgrad.curvature_args` that makes it, for the message.

    Raises:
      ValueError: for ``None``, naming the argument and the helper that builds it.
      TypeError: for what cannot be called.
    """
    if callable(function):
        found: Callable[[Any], Any] = function
        return found
    helper = builder or "optgrad.curvature_args(loss_fn)"
    message = (
        f"{name} = {function!r}; accepted: a function of the parameters, closed over the batch, as "
        f"{helper} builds it inside the jitted step; optgrad.make_step does all of it"
    )
    raise (ValueError if function is None else TypeError)(message)


def hessian_product(value_fn: ValueFn, params: optax.Params, mode: str = "exact") -> linalg.Product:
    r"""The product v ↦ Hv with the Hessian H of the loss at ``params``.

    Args:
      value_fn: params -> loss, a scalar.
      params: θ, a pytree of floating-point arrays.
      mode: ``"exact"`` linearises the gradient once, for many products at one point; ``"jvp"``
        differentiates anew for each product and stores nothing; ``"fd"`` and ``"fdc"`` are forward
        and central differences of gradients, of step :math:`\sqrt\epsilon(1+|\theta|)/|v|` and
        :math:`\epsilon^{1/3}(1+|\theta|)/|v|`, for losses that have no second derivative rule.

    Examples:
      >>> product = hessian_product(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
      >>> print(product(jnp.array([1.0, 1.0])))
      [ 6. 12.]
    """
    checks.check_one_of("hvp", mode, HESSIAN_PRODUCT_COST)
    grad = jax.grad(value_fn)
    if mode == "exact":
        return _in_types_of(params, jax.linearize(grad, params)[1])
    if mode == "jvp":
        return _in_types_of(params, lambda v: jax.jvp(grad, (params,), (v,))[1])
    return _finite_differences(grad, params, central=mode == "fdc")


def gauss_newton_product(
    outputs_fn: Callable[[Any], Any], out_loss_fn: ValueFn, params: optax.Params
) -> linalg.Product:
    r"""The product with the Gauss–Newton matrix JᵀLJ, L the Hessian of the outputs' loss.

    Positive semidefinite where ``out_loss_fn`` is convex. For the negative log-likelihood of an
    exponential family in its natural parameters (softmax cross-entropy of logits, squared error)
    it is the Fisher matrix. Terms beside the network's, such as L2, are contained if the parameters
    are among the outputs: ``outputs_fn = lambda p: (net(p), p)``.

    Args:
      outputs_fn: params -> z, any pytree, on the batch.
      out_loss_fn: z -> loss, a scalar.
      params: θ.

    Examples:
      >>> outputs = lambda w: jnp.array([[1.0, 0.0], [1.0, 2.0]]) @ w
      >>> product = gauss_newton_product(outputs, lambda z: 0.5 * jnp.sum(z**2), jnp.zeros(2))
      >>> print(product(jnp.array([1.0, 0.0])))
      [2. 2.]
    """
    outputs, push = jax.linearize(outputs_fn, params)
    pull = jax.linear_transpose(push, params)
    out_grad = jax.grad(out_loss_fn)

    def product(v: Any) -> Any:
        return pull(jax.jvp(out_grad, (outputs,), (push(v),))[1])[0]

    return _in_types_of(params, product)


def fisher_product(per_example_grads: optax.Updates) -> linalg.Product:
    r"""The product v ↦ (1/n) Σᵢ gᵢ⟨gᵢ, v⟩ with the empirical Fisher matrix of n gradients.

    With gradients of labels that are sampled from the model it is a Monte-Carlo estimate of the
    Fisher matrix; that matrix itself is `gauss_newton_product` of the log-likelihood.

    Args:
      per_example_grads: a tree whose leaves have a leading axis of size n.

    Examples:
      >>> print(fisher_product(jnp.array([[1.0, 0.0], [1.0, 2.0]]))(jnp.array([1.0, 1.0])))
      [2. 3.]
    """
    size = batch_size(per_example_grads, "per_example_grads")

    def product(v: Any) -> Any:
        return trees.combine(trees.project(per_example_grads, v) / size, per_example_grads)

    return product


def dense_matrix(product: linalg.Product, params: optax.Params, *, at_once: int = 64) -> chex.Array:
    """The whole matrix of a product, symmetrised, shape (D, D), rows in the order of the leaves.

    Args:
      product: v -> Av.
      params: a tree of D numbers; a few thousand at most.
      at_once: products computed together.
    """
    flat, unravel = trees.ravel(linalg.widened(params))

    def row(unit: chex.Array) -> chex.Array:
        return trees.ravel(product(unravel(unit)))[0]

    rows = jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=at_once)
    return 0.5 * (rows + rows.T)


def _in_types_of(params: optax.Params, linear: Callable[[Any], Any]) -> linalg.Product:
    """A linear map of tangents, as a product in at least float32."""
    return lambda v: linalg.widened(linear(transforms.cast_like(v, params)))


def _finite_differences(
    grad: Callable[[Any], Any], params: optax.Params, *, central: bool
) -> linalg.Product:
    wide = linalg.widened(params)
    dtypes = [x.dtype for x in jax.tree.leaves(params)]
    infos: list[Any] = [jnp.finfo(d) for d in dtypes]  # type: ignore[no-untyped-call]
    eps = max((float(info.eps) for info in infos), default=linalg.epsilon())
    relative = eps ** (1 / 3 if central else 1 / 2) * (1.0 + linalg.norm(wide))

    def grad_at(h: chex.Numeric, v: Any) -> Any:
        return linalg.widened(grad(transforms.cast_like(linalg.axpy(h, v, wide), params)))

    here = None if central else linalg.widened(grad(params))

    def product(v: Any) -> Any:
        length = linalg.norm(v)
        h = relative / jnp.where(length > 0, length, 1.0)
        back, width = (grad_at(-h, v), 2 * h) if central else (here, h)
        return linalg.scale(1.0 / width, linalg.axpy(-1.0, back, grad_at(h, v)))

    return product


# --- gradients of the examples ------------------------------------------------------------------


def per_example_grads(
    loss_fn: LossFn,
    params: optax.Params,
    batch: chex.ArrayTree,
    *,
    microbatch_size: int | None = None,
) -> optax.Updates:
    r"""The gradient :math:`\nabla\ell(\theta; x_k)` of every example of a batch.

    Args:
      loss_fn: the loss of one example.
      params: θ, a pytree of floating-point arrays.
      batch: B examples, stacked along the leading axis of every leaf.
      microbatch_size: at most that many examples are differentiated at once, which bounds the
        activations' memory; it need not divide B. Default: all. The B × D result is stored in any
        case; where only the variance is wanted, use `value_grad_and_variance`.

    Returns:
      A tree like ``params`` with a leading axis of size B on every leaf.

    Raises:
      ValueError: for an empty batch, leaves of different batch sizes or a bad microbatch size.

    Examples:
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> print(per_example_grads(loss, jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])))
      [[-1. -2.]
       [-3. -4.]]
    """
    size = batch_size(batch)
    chunk = examples_at_once(microbatch_size, size)
    grad_fn = jax.grad(loss_fn)
    if chunk == size:
        return jax.vmap(grad_fn, in_axes=(None, 0))(params, batch)
    return jax.lax.map(lambda example: grad_fn(params, example), batch, batch_size=chunk)


def gradient_variance(per_example_grads: optax.Updates) -> optax.Updates:
    r"""Unbiased estimate of the variance of the *minibatch mean* of these gradients.

    .. math::
      \hat s = \frac{1}{B(B-1)}\sum_{k=1}^B (g_k - \bar g)^2

    in this centred form, accumulated in at least float32. Equation (44) of Balles & Hennig prints
    :math:`\frac1B\big(\frac{1}{B-1}\sum_k g_k^2 - \bar g^2\big)`, which is not unbiased: its second
    term lacks the factor B/(B−1).

    Args:
      per_example_grads: a tree whose leaves have a leading axis of size B ≥ 2; it may be empty.

    Returns:
      ŝ, a tree like the gradient.

    Raises:
      ValueError: if B is 1, or the leaves' leading axes differ.

    Examples:
      >>> print(gradient_variance(jnp.array([[1.0, 5.0], [3.0, 5.0]])))
      [1. 0.]
    """
    if not jax.tree.leaves(per_example_grads):
        return per_example_grads
    size = batch_size(per_example_grads, "per_example_grads")
    _check_enough(size, "per_example_grads")
    _, squares = _mean_and_squares(per_example_grads)
    return _variance_of_mean(squares, size)


def value_grad_and_variance(
    loss_fn: LossFn,
    params: optax.Params,
    batch: chex.ArrayTree,
    *,
    microbatch_size: int | None = None,
) -> tuple[chex.Array, optax.Updates, optax.Updates]:
    r"""Mean loss of a batch, its gradient, and the variance of that gradient, in one pass.

    Micro-batches are differentiated one after the other; their means and centred sums of squares
    are merged exactly (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979), so that no more than ``microbatch_size`` gradients exist
    at a time and nothing cancels.

    Args:
      loss_fn: the loss of one example.
      params: θ, a pytree of floating-point arrays.
      batch: B ≥ 2 examples, stacked along the leading axis of every leaf.
      microbatch_size: per-example gradients held at once; it need not divide B. Default: all.
        On CPU, XLA runs convolutions inside the loop over micro-batches much slower than outside.

    Returns:
      ``(value, grad, variance)``: a scalar, and two trees like ``params``; the variance is of the
      minibatch mean, see `gradient_variance`, and at least float32.

    Raises:
      ValueError: if B is 1, leaves differ in batch size, or the microbatch size is bad.

    Examples:
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> batch = jnp.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]])
      >>> value, grad, variance = value_grad_and_variance(
      ...     loss, jnp.zeros(2), batch, microbatch_size=2)
      >>> print(grad, variance.round(4))
      [-3. -2.] [1.3333 0.    ]
    """
    size = batch_size(batch)
    _check_enough(size, "batch")
    chunk = examples_at_once(microbatch_size, size)
    value_and_grad = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))

    def moments(examples: chex.ArrayTree) -> tuple[chex.Array, optax.Updates, optax.Updates]:
        values, grads = value_and_grad(params, examples)
        value = jnp.mean(values.astype(averages.average_dtype(values)))
        return value, *_mean_and_squares(grads)

    def accumulate(carry: tuple[Any, Any], examples: chex.ArrayTree) -> tuple[Any, None]:
        count, so_far = carry
        return (count + chunk, _merge(count, so_far, chunk, moments(examples))), None

    whole = size - size % chunk
    if whole == chunk:  # no loop: XLA on CPU is slow at convolutions in one
        total = moments(jax.tree.map(lambda x: x[:chunk], batch))
    else:
        head = jax.tree.map(lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), batch)
        shapes = jax.eval_shape(moments, jax.tree.map(lambda x: x[0], head))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = (jnp.zeros((), averages.scalar_dtype()), nothing)
        (_, total), _ = jax.lax.scan(accumulate, start, head)
    if whole < size:
        tail = jax.tree.map(lambda x: x[whole:], batch)
        total = _merge(whole, total, size - whole, moments(tail))
    value, mean, squares = total
    grad = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), mean, params)
    return value, grad, _variance_of_mean(squares, size)


def _variance_of_mean(squares: optax.Updates, size: int) -> optax.Updates:
    """Sums of squared deviations over B(B−1); a float, since B² may exceed an int32."""
    pairs = float(size * (size - 1))
    return jax.tree.map(lambda m2: m2 / pairs, squares)


def _mean_and_squares(grads: optax.Updates) -> tuple[optax.Updates, optax.Updates]:
    """Mean over the leading axis, and the sum of squared deviations from it."""
    wide = jax.tree.map(lambda g: g.astype(averages.average_dtype(g)), grads)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
    squares = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2, axis=0), wide, mean)
    return mean, squares


def _merge(count_a: Any, a: Any, count_b: Any, b: Any) -> tuple[Any, Any, Any]:
    """Value, mean and squared deviations of two groups of examples taken together."""
    share = count_b / (count_a + count_b)
    (value_a, mean_a, squares_a), (value_b, mean_b, squares_b) = a, b

    def toward(x: chex.Array, y: chex.Array) -> chex.Array:
        return x + jnp.asarray(share, x.dtype) * (y - x)

    def squares(sa: chex.Array, sb: chex.Array, ma: chex.Array, mb: chex.Array) -> chex.Array:
        difference = mb - ma  # not squared first: with count 0 it may be as large as a gradient
        return sa + sb + (jnp.asarray(count_a * share, sa.dtype) * difference) * difference

    return (
        toward(value_a, value_b),
        jax.tree.map(toward, mean_a, mean_b),
        jax.tree.map(squares, squares_a, squares_b, mean_a, mean_b),
    )


def batch_size(batch: chex.ArrayTree, name: str = "batch") -> int:
    """The common leading axis of all leaves.

    Raises:
      ValueError: if there is none, or the leaves disagree; the message names ``name``.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or sizes & {None, 0}:
        raise ValueError(
            f"{name} has leaves of shapes {shapes[:4]}{'…' if len(shapes) > 4 else ''}; "
            "accepted: one common leading batch axis of size ≥ 1 on every leaf"
        )
    return int(sizes.pop())  # type: ignore[arg-type]  # None was refused above


def _check_enough(size: int, name: str) -> None:
    if size < 2:
        raise ValueError(
            f"{name} holds B = {size} example: the variance of a minibatch gradient "
            "needs B ≥ 2 (use a moving-average method such as m_svag instead)"
        )


def examples_at_once(microbatch_size: int | None, size: int) -> int:
    """The size of a micro-batch, all of the batch by default.

    Raises:
      TypeError, ValueError: unless it is a positive integer or None.
    """
    if microbatch_size is None:
        return size
    if isinstance(microbatch_size, bool) or not isinstance(microbatch_size, int):
        raise TypeError(f"microbatch_size = {microbatch_size!r} is not a Python int or None")
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size = {microbatch_size} is outside its range [1, inf)")
    return min(microbatch_size, size)
