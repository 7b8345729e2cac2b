"""Learning-rate schedules, against formulas written out."""

import jax
import numpy as np
import pydantic
import pytest

from optgrad.experiments.schedules import ScheduleConfig


def factors(updates, **fields):
    """The factor at every update, from one compiled function of a traced count."""
    at = jax.jit(ScheduleConfig(**fields).factor_at(updates))
    return np.array([at(t) for t in range(updates)])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup": 1}, [1, 1, 1, 1, 1, 1]),
        ({"kind": "step", "at": [2, 4]}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"kind": "step", "at": [3], "factor": 0.5}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ({"kind": "step", "at": [2, 5], "warmup": 2}, [0.5, 1, 0.1, 0.1, 0.1, 0.01]),
        ({"kind": "step", "at": [1], "warmup": 1}, [1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ],
    ids=str,
)
def test_factors(fields, expected):
    np.testing.assert_allclose(factors(6, **fields), expected, rtol=1e-6)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (3, 0.0), (3, 0.2)])
def test_cosine_decays_from_the_warm_up_to_the_end(warmup, final):
    actual = factors(10, kind="cosine", warmup=warmup, final=final)
    t = np.arange(warmup, 10)
    cosine = (1 + np.cos(np.pi * (t - warmup) / (10 - warmup))) / 2
    expected = [
        *((np.arange(warmup) + 1) / warmup if warmup else []),
        *final + (1 - final) * cosine,
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear"}, "'constant', 'step' or 'cosine'"),
        ({"kind": "step"}, r"schedule.at = \[\]; accepted: the updates"),
        ({"at": [3]}, r"schedule.at = \[3\]; accepted: with kind = 'step' only"),
        ({"kind": "cosine", "factor": 0.5}, r"schedule.factor = 0.5; accepted: with kind = 'step'"),
        ({"kind": "step", "at": [3], "final": 0.1}, r"schedule.final = 0.1; accepted: .*'cosine'"),
        ({"warmup": -1}, "greater than or equal to 0"),
        ({"kind": "step", "at": [3], "factor": 0.0}, "greater than 0"),
        ({"kind": "cosine", "final": 1.5}, "less than or equal to 1"),
        ({"wamup": 3}, "wamup"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 10}, "schedule.warmup = 10; accepted: fewer than the run's 10 updates"),
        ({"kind": "step", "at": [10]}, r"schedule.at = \[10\].* before the end of the run's 10"),
        ({"kind": "step", "at": [0]}, r"schedule.at = \[0\].*accepted: ascending"),
        ({"kind": "step", "at": [5, 5]}, r"schedule.at = \[5, 5\].*accepted: ascending"),
        ({"kind": "step", "at": [3], "warmup": 5}, r"after the warm-up of 5"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields).factor_at(10)
