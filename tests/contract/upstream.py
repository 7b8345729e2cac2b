"""What optax itself gets wrong: failures of the baselines that are expected, each with its reason.

The marks are strict: an entry whose test passes fails the suite, and is then removed here. Methods
of optgrad's own families are not listed: their failures are bugs.
"""

from typing import NamedTuple


class Failure(NamedTuple):
    """An expected failure of one method under one property."""

    raises: type[Exception] | tuple[type[Exception], ...]
    reason: str


_WEAK = (
    "the zoom line search's initial state has weakly typed scalars (num_linesearch_steps, "
    "decrease_error, curvature_error), which its update returns strongly typed"
)
_MIXED = (
    "the step size, computed over the whole tree in its widest type, is multiplied into each "
    "leaf without a cast back: updates of narrower leaves are promoted"
)
_EMPTY = "the zoom line search takes the dtype of the first leaf in init: jax.tree.leaves({})[0]"

_EIGHT_BITS = "averages in the parameters' 8 bits, in which ε and 1 − β are 0: 0/0"
_NO_PROMOTION = "types of 8 bits are mixed with float32, for which jax has no promotion"
_NO_GRADIENT_YET = (
    "the estimate of the rate is 0/0 until the first gradient that is not 0, and stays NaN (the "
    "authors' code leaves such a step out)"
)
_ZEROS = (
    "zero_and_constant_gradients[zero-first_step]",
    "zero_and_constant_gradients[zero-five_steps]",
    "constant_loss",
)

# (method, property): the property is the test's name without "test_", with the ids of its other
# parameters in brackets: ("adam", "dtypes[bfloat16]").
FAILURES: dict[tuple[str, str], Failure] = {
    ("lbfgs", "weak_types[float32]"): Failure(AssertionError, _WEAK),
    ("lbfgs", "weak_types[mixed_in_x64]"): Failure(AssertionError, _WEAK),
    ("lbfgs", "no_recompilation"): Failure(AssertionError, _WEAK),
    ("lbfgs", "donated_buffers"): Failure(
        (ValueError, RuntimeError),
        "init returns one buffer as diff_params_memory and as diff_updates_memory: it cannot be "
        "donated twice",
    ),
    ("lbfgs", "unknown_extras_are_ignored"): Failure(
        TypeError,
        "the zoom line search refuses extra arguments that value_fn does not take",
    ),
    ("lbfgs", "dtypes[mixed]"): Failure(AssertionError, _MIXED),
    ("lbfgs", "dtypes[mixed_in_x64]"): Failure(AssertionError, _MIXED),
    ("lbfgs", "odd_trees[empty]"): Failure(IndexError, _EMPTY),
    ("lbfgs", "tree_map_params"): Failure(IndexError, _EMPTY),
    ("lbfgs", "odd_trees[only_none]"): Failure(IndexError, _EMPTY),
    ("polyak_sgd", "dtypes[mixed]"): Failure(AssertionError, _MIXED),
    ("polyak_sgd", "dtypes[mixed_in_x64]"): Failure(AssertionError, _MIXED),
    ("lbfgs", "dtypes[float8_e4m3fn]"): Failure(ValueError, _NO_PROMOTION),
    ("lbfgs", "dtypes[float8_e5m2]"): Failure(ValueError, _NO_PROMOTION),
    ("polyak_sgd", "dtypes[float8_e4m3fn]"): Failure(ValueError, _NO_PROMOTION),
    ("polyak_sgd", "dtypes[float8_e5m2]"): Failure(ValueError, _NO_PROMOTION),
    ("adam", "dtypes[float8_e4m3fn]"): Failure(AssertionError, _EIGHT_BITS),
    ("adamw", "dtypes[float8_e4m3fn]"): Failure(AssertionError, _EIGHT_BITS),
    ("nadam", "dtypes[float8_e4m3fn]"): Failure(AssertionError, _EIGHT_BITS),
    ("amsgrad", "dtypes[float8_e4m3fn]"): Failure(AssertionError, _EIGHT_BITS),
    **{
        (name, zeros): Failure(AssertionError, _NO_GRADIENT_YET)
        for name in ("prodigy", "dadapt_adamw")
        for zeros in _ZEROS
    },
}
