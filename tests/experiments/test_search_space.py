"""Search spaces: their points, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import search_space
from optgrad.experiments.search_space import Interval, points

RATES = Interval(low=1e-4, high=1e-1)


def test_a_grid_is_even_on_its_scale_and_has_both_ends():
    grid = Interval(low=1e-4, high=1e-1, num=4).grid()
    assert grid == (1e-4, 1e-3, 1e-2, 1e-1)
    assert Interval(low=-1, high=1, num=5, scale="linear").grid() == (-1, -0.5, 0, 0.5, 1)
    assert len(RATES.grid()) == 7
    ragged = Interval(low=0.123456789, high=0.987654321, num=3)
    assert (ragged.grid()[0], ragged.grid()[-1]) == (0.123456789, 0.987654321)


def test_a_grid_of_several_is_every_combination():
    space = {"learning_rate": Interval(low=0.1, high=1.0, num=2), "nesterov": (False, True)}
    expected = itertools.product([0.1, 1.0], [False, True])
    assert [tuple(point.values()) for point in points(space, "grid")] == list(expected)


@pytest.mark.parametrize("protocol", ["random", "halton"])
def test_drawn_points_lie_in_the_space_and_follow_from_the_seed(protocol):
    space = {"a": RATES, "b": Interval(low=-2, high=3, scale="linear"), "c": ("x", "y", "z")}
    drawn = points(space, protocol, 64, seed=1)
    assert len(drawn) == 64
    a, b, c = (np.array([point[name] for point in drawn]) for name in space)
    assert ((a >= 1e-4) & (a <= 1e-1)).all()
    assert ((b >= -2) & (b <= 3)).all()
    assert abs(np.mean(np.log10(a)) + 2.5) < 0.3  # uniform in the logarithm
    assert abs(np.mean(b) - 0.5) < 0.5
    assert min(np.sum(c == kind) for kind in "xyz") > 10
    assert points(space, protocol, 64, seed=1) == drawn
    assert points(space, protocol, 64, seed=2) != drawn


def test_halton_points_are_evenly_spread():
    """Of 2ᵏ points in base 2 each of the 2ᵏ equal parts holds one; independent ones do not."""
    for protocol, expected in (("halton", True), ("random", False)):
        drawn = [point["a"] for point in points({"a": RATES}, protocol, 16)]
        parts = {math.floor((math.log10(value) + 4) / 3 * 16) for value in drawn}
        assert (len(parts) == 16) is expected


def test_equal_drawn_points_count_once():
    drawn = points({"b1": (0.5, 0.9)}, "random", 20)
    assert sorted(point["b1"] for point in drawn) == [0.5, 0.9]


def test_the_main_hyperparameter_comes_first():
    adam = registry.get_method("adam")
    space = {"nesterov": (False, True), "b1": (0.5,), "learning_rate": RATES}
    assert list(search_space.ordered(space, adam)) == ["learning_rate", "b1", "nesterov"]
    del space["learning_rate"]
    assert list(search_space.ordered(space, adam)) == ["b1", "nesterov"]


@pytest.mark.parametrize(("low", "high"), [(0.99999, 0.999999), (0.9999, 0.99999)])
def test_narrow_intervals_have_as_many_values_as_they_say(low, high):
    grid = search_space.Interval(low=low, high=high, num=100).grid()
    assert len(set(grid)) == 100
    assert (grid[0], grid[-1]) == (low, high)
    assert list(grid) == sorted(grid)


def test_what_rounding_repeats_is_tried_once():
    grid = search_space.Interval(low=1.0, high=1.0 + 4e-16, num=7, scale="linear").grid()
    assert grid == tuple(sorted(set(grid)))


@pytest.mark.parametrize(
    ("best", "expected"), [(0.5, True), (0.9, True), (0.7, False), (0.0, False)]
)
def test_the_edge(best, expected):
    tried = [{"b1": b, "nesterov": n} for b in (0.5, 0.7, 0.9) for n in (False, True)]
    if not best:  # no value lies beyond
        tried.append({"b1": 0.0, "nesterov": True})
    assert search_space.at_edge({"b1": best, "nesterov": True}, tried) is expected


def test_two_values_have_no_inside():
    assert not search_space.at_edge({"b1": 0.5}, [{"b1": 0.5}, {"b1": 0.9}])


@pytest.mark.parametrize(
    ("method", "space", "hyperparams", "expected"),
    [
        ("adam", {"b3": (1.0,)}, {}, ["no hyperparameter 'b3'", "'b1'"]),
        ("adam", {"b1": ()}, {}, ["space.b1 = []", "distinct values"]),
        ("adam", {"b1": (0.9, 0.9)}, {}, ["space.b1 = [0.9, 0.9]", "distinct"]),
        ("adam", {"b1": (0.9, "x")}, {}, ["space.b1", "finite numbers"]),
        ("adam", {"b1": (True,)}, {}, ["space.b1", "finite numbers"]),
        ("adam", {"b1": (math.inf,)}, {}, ["space.b1", "finite numbers"]),
        ("adam", {"b1": (0.5,)}, {}, ["adam requires learning_rate"]),
        ("adam", {"learning_rate": RATES}, {"learning_rate": 0.1}, ["learning_rate fixes it"]),
        ("adam", {"learning_rate": RATES, "nesterov": (1,)}, {}, ["space.nesterov", "1", "bool"]),
        ("lbfgs", {"memory_size": (5, 2.5)}, {}, ["space.memory_size", "2.5", "int"]),
        ("lbfgs", {"memory_size": RATES}, {}, ["space.memory_size", "static", "a list of values"]),
        ("m_svag", {"learning_rate": RATES, "beta": (0.9, 1.5)}, {}, ["beta = 1.5", "[0, 1)"]),
        ("m_svag", {"learning_rate": RATES, "variance": ("exact",)}, {}, ["'exact'", "accepted"]),
    ],
)  # fmt: skip
def test_what_a_method_cannot_run_is_refused(method, space, hyperparams, expected):
    with pytest.raises((ValueError, TypeError)) as caught:
        search_space.check(registry.get_method(method), space, hyperparams)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("method", [m for m in registry.methods() if m.tunes], ids=lambda m: m.name)
def test_the_default_space_of_every_method_is_accepted(method):
    space = search_space.default_space(method.tunes)
    ((name, interval),) = space.items()
    assert (name, interval.low, interval.high) == tuple(method.tunes)
    required = {k for k, p in method.hyperparameters.items() if p.default is p.empty} - {name}
    search_space.check(method, space, {k: method.test_hyperparams[k] for k in required})
