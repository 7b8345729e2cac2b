"""The specification's comparison of the rules that read the loss, on noisy least squares.

Its section 4 reports the loss above the minimum at the last step of one run; here it is the mean
over four runs and the last tenth of the steps, since single values of some rules vary a hundredfold
from one step to the next. The data are ours, made after its description: 20 dimensions, condition
100, label noise ½, start 1.03 above the minimum.
"""

import numpy as np
import optax
import pytest

import optgrad

from . import loss_runs as runs

SINGLE, BATCH, FULL = (1, 5000), (20, 5000), (None, 2000)


def sgd(rate):
    return lambda _: optax.with_extra_args_support(optax.sgd(rate))


def polyak(least):
    return optgrad.polyak(least)


def polyak_0(_):
    return optgrad.polyak(0.0)


def sps(cap):
    return lambda _: optgrad.sps(cap)


def sps_smooth(share):
    return lambda _: optgrad.sps(1.0, c=0.2, tau=2.0, batch_share=share)


def l4_momentum(fraction=0.15):
    return lambda _: optgrad.l4_momentum(fraction)


def l4_adam(fraction=0.15):
    return lambda _: optgrad.l4_adam(fraction)


def lossgrad(_):
    return optgrad.lossgrad(1e-3)


# What is run, batch and steps, the specification's number and by which factor ours may differ.
NUMBERS = {
    "sgd_single": (sgd(0.1), SINGLE, 0.037, 1.5),
    "sgd_batch": (sgd(0.1), BATCH, 1.5e-3, 1.5),
    "polyak_single": (polyak, SINGLE, 0.029, 1.6),
    "polyak_batch": (polyak, BATCH, 0.013, 1.6),
    "polyak_0_single": (polyak_0, SINGLE, 0.050, 1.6),
    "polyak_0_batch": (polyak_0, BATCH, 0.061, 1.6),
    "sps_0.1_single": (sps(0.1), SINGLE, 0.036, 1.5),
    "sps_0.1_batch": (sps(0.1), BATCH, 1.5e-3, 1.5),
    "sps_10_single": (sps(10.0), SINGLE, 0.15, 1.6),
    "sps_10_batch": (sps(10.0), BATCH, 0.18, 1.6),
    "sps_10_full": (sps(10.0), FULL, 0.087, 2.0),
    "l4_momentum_single": (l4_momentum(), SINGLE, 0.26, 1.6),
    "l4_momentum_batch": (l4_momentum(), BATCH, 0.14, 1.6),
    "l4_momentum_full": (l4_momentum(), FULL, 0.04, 2.5),
    "l4_momentum_0.05_single": (l4_momentum(0.05), SINGLE, 0.036, 1.6),
    "l4_adam_single": (l4_adam(), SINGLE, 0.25, 1.6),
    "l4_adam_batch": (l4_adam(), BATCH, 0.14, 1.6),
    "l4_adam_full": (l4_adam(), FULL, 0.02, 1.6),
    "l4_adam_0.05_single": (l4_adam(0.05), SINGLE, 0.026, 1.6),
    "lossgrad_single": (lossgrad, SINGLE, 0.21, 1.6),
    "lossgrad_batch": (lossgrad, BATCH, 0.044, 1.6),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_levels(x64, name):
    make, (batch, steps), expected, factor = NUMBERS[name]
    actual = np.mean(runs.excess(make, batch, steps))
    print(f"{name}: {actual:.2g}, specification {expected:.2g}")
    assert expected / factor < actual < expected * factor


@pytest.mark.parametrize(("make", "bound"), [(polyak, 1e-14), (lossgrad, 1e-10)])
def test_full_batch_is_solved(x64, make, bound):
    """0 and 8e-17, up to the rounding of the loss; gradient descent is at 1e-4 then."""
    last = runs.excess(make, *FULL)[:, -1]
    assert np.median(last) < 1e-15
    assert np.max(last) < bound
    assert np.min(runs.excess(sgd(0.1), *FULL)[:, -1]) > 5e-6


def test_capped_sps_is_sgd_where_nothing_is_fitted(x64):
    """Full batch, γ_b = 0.1: the loss never comes below the cap's reach."""
    sps_path, sgd_path = (runs.excess(make, *FULL) for make in (sps(0.1), sgd(0.1)))
    np.testing.assert_allclose(sps_path, sgd_path, rtol=1e-8)


def test_wrong_minimum_throws_polyak_away(x64):
    """Full batch, f* = 0: the specification's 1e-3 is one point of an oscillation."""
    path = runs.excess(polyak_0, *FULL)
    assert np.min(path) < 1e-4
    assert np.max(path) > 1e2


def test_smoothing(x64):
    """0.16 with batches of 1, 0.20 with 20, and on the full batch c = 0.2 diverges.

    The level depends on the number of examples, which the specification does not give: this is as
    if there were 2000. Medians, for the peaks are a hundred times as high.
    """
    for batch, expected in ((1, 0.16), (20, 0.20)):
        actual = np.median(runs.excess(sps_smooth(batch / 2000), batch, 5000))
        print(f"smoothed: {actual:.2g}, specification {expected}")
        assert expected / 2.5 < actual < expected * 2.5
    full = runs.excess(sps_smooth(1.0), *FULL)
    assert not np.any(full < 1e6)  # NaN included
