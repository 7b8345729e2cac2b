"""Options that the planning methods have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optax

from optgrad.core import checks
from optgrad.step_size_planning import windows

PAIRINGS = ("lagged", "matched")
PROJECTION_GRADIENTS = ("fresh", "reuse")
METRICS = ("loss", "gradient_norm")


class Options(NamedTuple):
    """What `csawg` and `csawg_repeated` have in common; see there."""

    learning_rate: optax.ScalarOrSchedule
    window: int
    projections: int
    corrections: int
    pairing: str
    gradient: str
    layout: str
    base: optax.GradientTransformation | None
    verify: str | None
    tolerance: float | optax.Schedule
    abort: float | optax.Schedule
    noise_guard: float | optax.Schedule
    read_back: bool
    ring_dtype: Any


def make_options(
    *,
    learning_rate: optax.ScalarOrSchedule,
    window: int,
    projections: int,
    corrections: int,
    pairing: str,
    gradient: str,
    layout: str,
    base: optax.GradientTransformation | None,
    verify: bool | str | None,
    tolerance: float | optax.Schedule,
    abort: float | optax.Schedule,
    noise_guard: float | optax.Schedule,
    read_back: bool | None,
    ring_dtype: Any,
    paper: bool,
) -> Options:
    """Options with their defaults, checked.

    Raises:
      ValueError: for a value out of range, or two that contradict each other.
    """
    checks.check_count("window", window, 1)
    checks.check_count("projections", projections, 1)
    checks.check_count("corrections", corrections, 0)
    checks.check_in_range("learning_rate", learning_rate, 0.0, high_open=True)
    checks.check_one_of("pairing", pairing, PAIRINGS)
    checks.check_one_of("gradient", gradient, PROJECTION_GRADIENTS)
    checks.check_one_of("layout", layout, ("auto", *windows.LAYOUTS))
    if not (verify is None or isinstance(verify, bool)):
        # As text, because 1 == True.
        checks.check_one_of("verify", str(verify), (*METRICS, "True", "False", "None"))
    checks.check_in_range("tolerance", tolerance, 0.0, high_open=True)
    checks.check_in_range("abort", abort, 0.0, or_infinite=True)
    checks.check_in_range("noise_guard", noise_guard, 0.0, high_open=True)
    checks.check_float_dtype("ring_dtype", ring_dtype)
    verify = (not paper) if verify is None else verify
    metric = ("loss" if verify else None) if isinstance(verify, bool) else verify
    if layout == "auto":
        layout = "pairs" if paper else windows.smallest(window)
    concludes, reuses = layout == "gradients", gradient == "reuse"
    read_back = (
        not (paper or concludes or reuses) or pairing == "matched"
        if read_back is None
        else read_back
    )
    others = {
        "base": base is not None and "a transformation",
        "learning_rate": callable(learning_rate) and "a schedule",
        "pairing": pairing == "matched" and "'matched'",
        "read_back": read_back and "True",
        "projections, corrections": (projections, corrections) != (1, 0)
        and str((projections, corrections)),
    }
    if concludes:
        _refuse("layout", layout, others, ("base", "learning_rate", "pairing", "read_back"))
    if reuses:
        _refuse("gradient", gradient, others, ("pairing", "read_back", "projections, corrections"))
    if not read_back:
        _refuse("read_back", read_back, others, ("pairing",))
    return Options(
        learning_rate,
        window,
        projections,
        corrections,
        pairing,
        gradient,
        layout,
        base,
        metric,
        tolerance,
        abort,
        noise_guard,
        read_back,
        ring_dtype,
    )


def _refuse(name: str, value: Any, others: Mapping[str, Any], unfit: Sequence[str]) -> None:
    """Raises ``ValueError`` if an argument that does not go with this one is set."""
    for other in unfit:
        if others[other]:
            raise ValueError(
                f"{name} = {value!r} does not go with {other} = {others[other]}; "
                f"accepted with it: defaults of {', '.join(unfit)}"
            )
