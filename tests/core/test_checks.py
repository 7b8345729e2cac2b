"""Refusals name the argument, the value and what is accepted; unknown values pass."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optgrad.core import checks

INF, NAN = math.inf, math.nan
NO_NUMBER = type("NoNumber", (), {"__repr__": lambda self: "NoNumber()"})()


@pytest.mark.parametrize("value", [0, 0.0, 0.5, Fraction(1, 3), np.float32(0.3), np.int64(0), -0.0])
def test_inside(value):
    checks.check_in_range("x", value, 0.0, 1.0, high_open=True)


@pytest.mark.parametrize(
    "value",
    [1, 1.0, -1e-300, NAN, INF, -INF, np.float32(1), np.float64(NAN), np.int64(-1), 10**400],
)
def test_outside(value):
    with pytest.raises(ValueError, match=r"^x = .* is outside its range \[0, 1\)$") as error:
        checks.check_in_range("x", value, 0.0, 1.0, high_open=True)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "interval"),
    [
        ({"low": 0.0}, [0, 1e308], [-1, INF, NAN], r"\[0, inf\)"),
        ({"low": 0.0, "low_open": True}, [1e-300], [0, 0.0, -1], r"\(0, inf\)"),
        ({"low": 0, "high": 1}, [0, 1], [1.1, -0.1], r"\[0, 1\]"),
        ({"low": 0, "high": 1, "low_open": True}, [1, 0.1], [0], r"\(0, 1\]"),
        ({"low": 0, "high": 1, "high_open": True}, [0, 0.9], [1], r"\[0, 1\)"),
        ({"low": -INF}, [-1e308, 0], [INF, -INF, NAN], r"\(-inf, inf\)"),
        ({"low": 1, "high": 1}, [1], [0, 2], r"\[1, 1\]"),
    ],
)
def test_ends_of_ranges(bounds, good, bad, interval):
    for value in good:
        checks.check_in_range("x", value, **bounds)
    for value in bad:
        with pytest.raises(ValueError, match=f"outside its range {interval}"):
            checks.check_in_range("x", value, **bounds)


@pytest.mark.parametrize(
    "value", [True, False, None, "0.5", b"1", [0.5], (0.5,), {}, 1j, np.True_, NO_NUMBER], ids=str
)
def test_no_number(value):
    with pytest.raises(TypeError, match=r"x = .* is not a number; .*\[0, 1\]"):
        checks.check_in_range("x", value, 0.0, 1.0)


def test_unknown_yet_passes():
    """Traced values, arrays and schedules, whatever they will be."""
    for value in (jnp.array(7.0), np.array(7.0), optax.constant_schedule(7.0), lambda count: 7.0):
        checks.check_in_range("x", value, 0.0, 1.0)

    @jax.jit
    def traced(value):
        checks.check_in_range("x", value, 0.0, 1.0)
        return value

    assert traced(7.0) == 7.0


def test_one_of():
    checks.check_one_of("x", "a", ("a", "b"))
    checks.check_one_of("x", "b", iter("ab"))
    checks.check_one_of("x", 2, {1, 2})
    for value in ("c", "A", None, 1, ["a"], ("a",)):
        with pytest.raises(ValueError, match=r"x = .* is not accepted; .*Accepted: 'a', 'b'"):
            checks.check_one_of("x", value, iter("ab"))
    with pytest.raises(ValueError, match=r"x = 'a' is not accepted; Accepted: nothing"):
        checks.check_one_of("x", "a", ())


def test_did_you_mean():
    names = ["adam_star", "adam_sign", "m_svag", "ssd"]
    assert checks.did_you_mean("m_svga", names).startswith("did you mean 'm_svag'")
    assert checks.did_you_mean("adam_s", names).startswith("did you mean 'adam_s")
    assert " or " in checks.did_you_mean("adam_s", names)
    far = checks.did_you_mean("zzz", iter(names))
    assert far == "Accepted: 'adam_star', 'adam_sign', 'm_svag', 'ssd'"
    assert checks.did_you_mean(3, [1, 2]) == "Accepted: 1, 2"
