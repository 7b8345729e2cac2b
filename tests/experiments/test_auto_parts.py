"""`auto` against its second implementation, and the scripts that take it apart."""

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optgrad
from optgrad.experiments import catalogue, gaps

ROOT = Path(optgrad.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts():
    """The scripts of benchmarks/, which is no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("auto_problems", "auto_rule", "auto_sensitivity", "auto_ablation")
    yield {name.removeprefix("auto_"): importlib.import_module(name) for name in names}
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def tiny(scripts):
    def build():
        return catalogue.create_problem("noisy_quadratic", dimension=4, noise=0.5)

    return scripts["problems"].Quick(build, steps=6, seeds=2, vmapped=True)


# The second implementation -----------------------------------------------------------------------


def start():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(first, (5, 3), float),
        "zero": jnp.zeros(3),
        "sparse": 3 * jax.random.normal(second, (4,), float),
    }


def gradients(params, step):
    """Noisy ones, in which entries of one tensor, and in every third step all of it, are 0."""
    key = jax.random.key(step + 1)
    noise = jax.random.normal(key, (5,), float)
    found = {name: x + 0.3 * jnp.resize(noise, x.shape) for name, x in params.items()}
    seen = jax.random.bernoulli(key, 0.5, (4,)) & (step % 3 != 1)
    return {**found, "sparse": jnp.where(seen, found["sparse"], 0.0)}


def path(optimizer, steps=60):
    """Parameters after each step, one row each."""
    params = start()

    def step(carry, t):
        params, state = carry
        updates, state = optimizer.update(gradients(params, t), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    (_, state), found = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return np.concatenate([x.reshape(steps, -1) for x in jax.tree.leaves(found)], axis=1), state


def test_the_rule_at_its_defaults_is_auto(scripts):
    with jax.enable_x64(True):
        (auto, state), (rule, other) = path(optgrad.auto()), path(scripts["rule"].rule())
        assert np.abs(auto[-1] - auto[0]).max() > 0.1
        np.testing.assert_allclose(rule, auto, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(jax.tree.leaves(other.step_size), state.step_size, rtol=1e-10)
        for mine, theirs in zip(
            jax.tree.leaves(other.mean_position), jax.tree.leaves(state.position), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_rule_is_auto_at_other_constants(scripts):
    constants = {"beta": 0.5, "beta_position": 0.95, "beta_variance": 0.9, "adaptation": 0.1}
    constants |= {"weight_decay": 0.1}
    with jax.enable_x64(True):
        auto, _ = path(optgrad.auto(**constants, search_steps=0.0, initial_step=0.05))
        rule, _ = path(scripts["rule"].rule(**constants, kappa=lambda t: 1.0, initial_step=0.05))
    np.testing.assert_allclose(rule, auto, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_every_variant_differs_from_auto(scripts):
    ablation, rule = scripts["ablation"], scripts["rule"].rule
    paths = {name: path(rule(**change))[0] for name, change in ablation.VARIANTS.items()}
    whole = paths.pop(ablation.WHOLE)
    np.testing.assert_array_equal(paths.pop(ablation.AVERAGED), whole)  # differs in its evaluation
    for name, found in paths.items():
        assert np.isfinite(found).all(), name
        assert np.abs(found - whole).max() > 1e-4, name


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("beta", "beta_position"), [(0.8, 0.95), (0.9, 0.9), (0.0, 0.99)])
def test_noise_widens_the_path_as_much_as_is_said(beta, beta_position, ahead, scripts):
    """Σ h_k², h the response of θ − θ̄ to one sample of the noise, whose mean has (1−β)/(1+β)."""
    mean, distance, total = 0.0, 0.0, 0.0
    for k in range(2000):
        distance *= beta_position
        total += distance**2
        sample = (1 - beta) * (k == 0)
        mean = beta * mean + sample
        distance += beta * mean + sample if ahead else mean
    energy = (1 - beta) / (1 + beta)
    assert energy * scripts["rule"].noise(beta_position, beta, ahead) == pytest.approx(total)


# Differences -------------------------------------------------------------------------------------


def result(finals, starts=(1.0, 1.0)):
    return gaps.Result("", list(starts), list(finals))


@pytest.mark.parametrize("kind", ["points", "loss", "decades"])
def test_the_difference_is_the_gap(kind, scripts):
    mine, other = result([0.02, 0.03]), result([0.01, 0.04], starts=(2.0, 1.0))
    mine = dataclasses.replace(mine, starts=other.starts)
    found = scripts["problems"].difference(mine, other, kind)
    assert found.percent == pytest.approx(gaps.gap(mine, other, kind).percent)
    assert found.error > 0


def test_what_diverged_is_behind(scripts):
    found = scripts["problems"].difference(result([0.1, np.nan]), result([0.1, 0.2]), "loss")
    assert found.percent == math.inf
    assert found.is_behind
    assert not found.is_ahead


# The scripts, on a tiny problem ------------------------------------------------------------------


def test_sensitivity_of_a_tiny_problem(scripts, tiny, tmp_path):
    script = scripts["sensitivity"]
    rows = script.measure("tiny", tiny)
    assert len(rows) == 7 * len(script.CONSTANTS)
    defaults = [row for row in rows if row["percent"] == 0.0 and row["error"] == 0.0]
    assert len(defaults) >= len(script.CONSTANTS)
    assert len({row["final"] for row in rows}) > 20
    script.write(rows, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for constant in script.CONSTANTS:
        assert f"**{constant}**, default" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md", "sensitivity.csv", "sensitivity.png"
    }  # fmt: skip


def test_the_values_span_what_is_promised(scripts):
    script = scripts["sensitivity"]
    for constant in script.CONSTANTS:
        values = [value for value, _ in script.values_of(constant)]
        assert values[-1] / values[0] == pytest.approx(90 if constant == "1 − beta" else 100)
        assert script.defaults() in [setting for _, setting in script.values_of(constant)]


def test_a_sentence_says_where_the_default_is_beaten(scripts):
    script = scripts["sensitivity"]
    percents = {10.0: 3.0, 21.5: 0.5, 46.4: 0.5, 100.0: 0.0, 215.0: 0.5, 464.0: 2.0, 1000.0: -5.0}
    rows = [
        {"problem": "p", "constant": "search_steps", "value": v, "percent": x, "error": 0.1}
        for v, x in percents.items()
    ]
    found = script.sentence(rows, "search_steps")
    assert "within 1 % of it on every problem over 21.5 … 215;" in found
    assert "best value is 1000 (-5.00 %)" in found
    assert "better than the default: p at 1000 (-5.00 %)" in found


def test_ablation_of_a_tiny_problem(scripts, tiny, tmp_path):
    script = scripts["ablation"]
    few = (script.WHOLE, "κ = 0.7", script.AVERAGED)
    rows = script.measure("tiny", tiny, few)
    assert [row["variant"] for row in rows] == list(few)
    assert len({row["final"] for row in rows}) == 3
    auto = scripts["problems"].train(tiny, tiny.build(), optgrad.get_method("auto"), [{}])[0]
    assert rows[0]["final"] == pytest.approx(gaps.typical(auto, "decades"), rel=1e-4)
    script.write(rows, tmp_path)
    assert "κ = 0.7: clearly" in (tmp_path / "report.md").read_text()
