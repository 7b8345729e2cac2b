"""The gallery: its landscapes, its runs, what is chosen, and the folder."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import optgrad
from optgrad import registry
from optgrad.experiments import cli, cli_gallery, gallery, results
from optgrad.experiments.gallery import numbers, page, pictures, places, runs

PLACES = places.places()
TINY = numbers.Settings(budgets=(5, 20), shown=20, values=5, starts=3)
METHODS = ("sgd", "gauss_newton", "kfac")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a small gallery."""
    folder = tmp_path_factory.mktemp("gallery") / "tiny"
    gallery.make(folder, METHODS, ["noisy_quadratic", "goldstein_price"], TINY)
    return folder


def value(place, point):
    return float(place.landscape.function(np.asarray(point, np.float64)))


# Landscapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_minima_are_minima_of_value_zero(place):
    for point in place.landscape.minimizers:
        here = value(place, point)
        assert abs(here) < 1e-9
        for angle in np.linspace(0, np.pi, 8, endpoint=False):
            offset = 1e-4 * np.array([np.cos(angle), np.sin(angle)])
            ahead, behind = (value(place, point + side * offset) for side in (1, -1))
            assert min(ahead, behind) > here + 1e-10
            # The slope is zero: what is left is the third derivative's.
            assert abs(ahead - behind) < 1e-3 * (ahead + behind)


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_nothing_in_the_view_is_lower(place):
    (left, right), (low, high) = place.view
    x, y = np.meshgrid(np.linspace(left, right, 301), np.linspace(low, high, 301))
    assert place.landscape.function(np.stack([x, y], axis=-1)).min() > -1e-9
    for point in (place.start, *place.landscape.minimizers):
        assert left < point[0] < right
        assert low < point[1] < high


@pytest.mark.parametrize("name", [p.name for p in PLACES.values() if p.has_residuals])
def test_residuals_are_the_function_and_its_noise(name):
    place = PLACES[name]
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 2)).astype(np.float32)
    slope = np.float32([0.3, -0.7])
    quiet, noisy = (
        np.array([0.5 * jnp.sum(place.residuals(jnp.asarray(x), s) ** 2) for x in points])
        for s in (np.zeros(2, np.float32), slope)
    )
    expected = place.landscape.function(points.astype(np.float64))
    np.testing.assert_allclose(quiet, expected, rtol=1e-4, atol=1e-5)
    if place.noisy_residuals is not None:
        difference = noisy - quiet - points @ slope
        np.testing.assert_allclose(difference, difference[0], atol=1e-3)


def test_starts_of_tuning_and_of_the_report_are_different_and_always_the_same():
    place = PLACES["beale"]
    tuning, held_out = place.starts(4, "tuning"), place.starts(4, "held-out")
    assert np.array_equal(tuning, place.starts(4, "tuning"))
    assert not np.isin(tuning, held_out).any()
    assert np.all(np.abs(tuning - np.float32(place.start)) <= place.jitter)
    noise = [runs.noises(place, purpose, 1, 3, 1.0) for purpose in ("tuning", "held-out")]
    assert not np.isin(*noise).any()


def test_the_noise_of_a_minibatch_has_its_deviation():
    noise = runs.noises(PLACES["beale"], "tuning", 2, 2000, 0.3)
    assert noise.mean(axis=2).std() == pytest.approx(0.3, rel=0.03)


# Runs -------------------------------------------------------------------------------------------


def descended(place, start, rate, noise, steps):
    """Gradient descent in plain NumPy, with gradients by central differences."""
    x = np.array(start, np.float64)
    for t in range(steps):
        gradient = noise[t].mean(axis=0).astype(np.float64)
        for i in range(2):
            h = 1e-5 * np.eye(2)[i]
            gradient[i] += (value(place, x + h) - value(place, x - h)) / 2e-5
        x = x - rate * gradient
    return x


def test_numbers_follow_from_a_plain_loop(tiny):
    """What each rate reached from the tuning starts; then the best of them from the others."""
    found = numbers.read(tiny)
    place = PLACES["noisy_quadratic"]
    deviation = place.noises[2]
    starts = {purpose: place.starts(3, purpose) for purpose in ("tuning", "held-out")}
    noise = {purpose: runs.noises(place, purpose, 3, 20, deviation) for purpose in starts}

    def reached(purpose, rate, budget):
        ends = [
            descended(place, start, rate, xi, budget)
            for start, xi in zip(starts[purpose], noise[purpose], strict=True)
        ]
        return np.mean(np.log10(np.clip([value(place, x) for x in ends], 1e-12, 1e12)))

    rates = np.logspace(-5, 3, 5)
    for k, budget in enumerate((5, 20)):
        expected = [reached("tuning", rate, budget) for rate in rates]
        ours = found.tuned[found.places.index("noisy_quadratic"), 0, :, k]
        np.testing.assert_allclose(ours[:3], expected[:3], atol=2e-3)
        row = found.row("noisy_quadratic", "sgd", budget)
        assert row["value"] == pytest.approx(rates[np.argmin(expected)], rel=1e-5)
        held_out = reached("held-out", row["value"], budget)
        assert row["log10_excess"] == pytest.approx(held_out, abs=2e-3)
        assert row["steps"] == budget


def test_the_shown_path_is_the_same_loop(tiny):
    found = numbers.read(tiny)
    place = PLACES["noisy_quadratic"]
    rate = found.row(place.name, "sgd", 20)["value"]
    noise = runs.noises(place, "shown", 1, 20, place.noises[2])[0]
    path = found.path(place.name, "sgd")
    assert len(path) == 21
    expected = [descended(place, place.start, rate, noise, steps) for steps in range(21)]
    np.testing.assert_allclose(path, expected, atol=2 * 6 / numbers.UNIT)
    end = np.log10(value(place, expected[-1]))
    assert found.shown_excess(place.name, "sgd") == pytest.approx(end, abs=0.06)


def test_no_budget_is_exceeded():
    costs = np.array([[[3.0, 6.0, 6.5, 11.0]]])
    points = np.arange(8.0).reshape(1, 1, 4, 2)
    found = runs.Runs(np.array([[-1.0, -2.0]]), costs, points)
    budgets = np.array([2.9, 3.0, 6.4, 10.9, 11.0, 99.0])
    assert found.steps_within(budgets).ravel().tolist() == [0, 1, 2, 3, 4, 4]
    assert found.at(budgets)[0, 0, :, 0].tolist() == [-1.0, 0.0, 2.0, 4.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("name", "cost"), [("sgd", 1.0), ("lossgrad", 4 / 3), ("vsgd_fd", 2.0), ("runge_kutta", 4.0)]
)
def test_a_step_costs_what_the_method_counts_or_its_record_says(name, cost):
    place = PLACES["rosenbrock"]
    program = runs.Program(optgrad.get_method(name), (place,))
    start = np.array([place.start])
    noise = runs.noises(place, "tuning", 1, runs.CHUNK, 0.0)
    rate = 0.3 * runs.tried_values(optgrad.get_method(name))[[0]]
    found = program.run(place.name, rate, start, noise, 5.0)
    assert found.costs[0, 0, :2].tolist() == pytest.approx([cost, 2 * cost])


def test_a_scale_is_widened_and_a_ratio_is_not():
    sgd, fraction = optgrad.get_method("sgd"), optgrad.get_method("l4_adam")
    assert runs.tried_values(sgd)[[0, -1]] == pytest.approx([1e-5, 1e3])
    assert runs.tried_values(fraction)[[0, -1]] == pytest.approx([1e-3, 1.0])
    for method in optgrad.methods():
        values = runs.tried_values(method)
        assert len(values) == (runs.VALUES if method.tunes else 1)
        for value_ in values[[0, -1]] if method.tunes else ():  # the method accepts them
            method.factory(**{**method.published, method.tunes.hyperparameter: float(value_)})


def test_every_method_runs_everywhere_or_there_is_a_reason():
    for method in optgrad.methods():
        reasons = {p.name: runs.reason_left_out(method, p) for p in PLACES.values()}
        left_out = {name for name, reason in reasons.items() if reason}
        if "kfac_stats" in method.extras(has_layers=False):
            assert left_out == set(PLACES)
        elif method.needs & {"residual_fn", "outputs_fn"}:
            assert left_out == {"styblinski_tang", "goldstein_price"}
        else:
            assert not left_out


# Of all methods that need the same, the last; `optgrad gallery` itself runs every one.
KINDS = {method.needs: method for method in optgrad.methods()}.values()


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS, ids=lambda method: method.name)
def test_each_kind_of_method_takes_a_finite_step_where_it_is_not_left_out(method):
    able = tuple(p for p in PLACES.values() if not runs.reason_left_out(method, p))
    if not able:
        return
    program = runs.Program(method, able)
    middle = runs.tried_values(method)[[-1 if len(runs.tried_values(method)) == 1 else 6]]
    for place in able:
        noise = runs.noises(place, "tuning", 1, runs.CHUNK, place.noises[place.own_noise])
        found = program.run(place.name, middle, np.array([place.start]), noise, 1.0)
        assert np.isfinite(found.points[0, 0, 0]).all()
        assert found.costs[0, 0, 0] >= 1.0


def test_extra_arguments_are_those_of_the_noisy_loss():
    place = PLACES["beale"]
    names = {"value", "value_fn", "per_example_grads", "gradient_variance", "curvature_diagonal",
             "residual_fn", "outputs_fn", "out_loss_fn"}  # fmt: skip
    noise = jnp.asarray(runs.noises(place, "tuning", 1, 1, 0.5)[0, 0])
    x = jnp.array([0.3, -0.4])
    found = runs.Oracles((PLACES["saddle"], place), frozenset(names))(
        x, runs.Batch(jnp.int32(1), noise)
    )

    def loss(x, xi):
        return place.landscape.function(x) + jnp.dot(xi, x - jnp.array(place.start))

    slope = noise.mean(axis=0)
    assert set(found) == names | {"grad"}
    np.testing.assert_allclose(found["value"], loss(x, slope), rtol=1e-6)
    np.testing.assert_allclose(found["grad"], jax.grad(loss)(x, slope), rtol=1e-5)
    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0))(x, noise)
    np.testing.assert_allclose(found["per_example_grads"], per_example, rtol=1e-5, atol=1e-5)
    variance = optgrad.value_grad_and_variance(loss, x, noise)[2]
    np.testing.assert_allclose(found["gradient_variance"], variance, rtol=1e-4)
    residuals = found["residual_fn"](x)
    np.testing.assert_allclose(0.5 * jnp.sum(residuals**2), place.landscape.function(x), rtol=1e-5)
    out_loss = found["out_loss_fn"](found["outputs_fn"](x))
    np.testing.assert_allclose(out_loss, loss(x, slope), rtol=1e-5)
    jacobian = jax.jacobian(place.landscape.residuals)(x)
    np.testing.assert_allclose(found["curvature_diagonal"], (jacobian**2).sum(axis=0), rtol=1e-4)


def test_where_nothing_is_squared_the_diagonal_is_of_the_hessian_without_signs():
    place = PLACES["styblinski_tang"]
    oracle = runs.Oracles((place,), frozenset({"curvature_diagonal"}))
    noise = jnp.zeros((runs.EXAMPLES, 2))
    found = oracle(jnp.array([0.0, 2.0]), runs.Batch(jnp.int32(0), noise))
    np.testing.assert_allclose(found["curvature_diagonal"], [16.0, 8.0])  # |6x² − 16|


# Choosing, rounding -----------------------------------------------------------------------------


def test_the_lowest_is_chosen_and_the_middle_one_of_equals():
    assert numbers.best(np.array([3.0, -1.0, 2.0])) == 1
    assert numbers.best(np.array([3.0, -12.0, -12.0, -12.0, 0.0])) == 2
    assert numbers.best(np.array([12.0, 12.0])) == 0


def test_the_chosen_value_is_best_on_tuning_starts_and_edges_are_told(tiny):
    found = numbers.read(tiny)
    order = list(found.methods)
    for row in found.summary:
        where = found.places.index(row["landscape"]), order.index(row["method"])
        reached = found.tuned[(*where, slice(None), TINY.budgets.index(row["budget"]))]
        chosen = found.chosen(row["landscape"], row["method"], row["budget"])
        assert reached[chosen] == np.nanmin(reached)
        assert row["tuning_log10_excess"] == pytest.approx(np.nanmin(reached))
        assert row["edge"] == (chosen in (0, TINY.values - 1))
        assert 0 <= row["steps"] <= row["budget"]


def test_what_diverged_counts_as_the_worst_and_is_never_dropped(tiny):
    found = numbers.read(tiny)
    where = found.places.index("goldstein_price"), 0
    assert found.tuned[(*where, -1, 1)] == numbers.WORST  # the largest rate
    assert numbers.log_excess(found.excesses[(*where, -1, 0, -1)]) == numbers.WORST
    assert (found.positions[(*where, -1, 0, -1)] == numbers.MISSING).all()


def test_positions_survive_rounding_and_packing():
    view = ((-2.0, 6.0), (0.0, 1.0))
    points = np.array([[-2.0, 0.0], [6.0, 1.0], [1.23456, 0.98765], [np.nan, 0.0], [1e9, -1e9]])
    kept = numbers.rounded(points, view)
    back = numbers.unrounded(kept, view)
    np.testing.assert_allclose(back[:3], points[:3], atol=8 / numbers.UNIT)
    assert np.isnan(back[3]).all()
    assert np.isfinite(back[4]).all()  # far outside, but on the right side
    assert back[4, 0] > 6.0
    generator = np.random.default_rng(0)
    wild = generator.integers(-(2**15), 2**15, (3, 7, 2), dtype=np.int16)
    assert np.array_equal(numbers.unpacked(numbers.packed(wild)), wild)


# The folder -------------------------------------------------------------------------------------


def test_the_folder_is_complete(tiny):
    expected = {"summary.csv", "sensitivity.csv", "runs.npz", "report.md", "interactive.html"}
    stems = ["overview"]
    for place in ("noisy_quadratic", "goldstein_price"):
        expected.add(f"{place}.gif")
        for family in ("baselines", "curvature"):
            stems += [f"{place}_{family}", f"{place}_tuning_{family}"]
    expected |= {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    assert {path.name for path in tiny.iterdir()} == expected | {results.MARKER}
    report = (tiny / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)]+)\)", report)
    assert linked
    assert set(linked) <= expected
    assert "gauss_newton on Goldstein–Price (it needs a sum of squares" in report
    assert "kfac everywhere (it needs the layers of a network" in report
    assert "--methods sgd,gauss_newton,kfac" in report


def test_reading_gives_what_was_written(tiny, tmp_path):
    found = numbers.read(tiny)
    numbers.write(found, tmp_path)
    for name in numbers.FILES[:2]:
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()
    again = numbers.read(tmp_path)
    for name in ("values", "tuned", "positions", "excesses", "paths"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.settings == found.settings == TINY
    assert again.left_out == found.left_out


def test_drawing_again_gives_the_same_files(tiny, tmp_path):
    source = tmp_path / "numbers"
    source.mkdir()
    for name in ("summary.csv", "sensitivity.csv", "runs.npz", "report.md"):
        (source / name).write_bytes((tiny / name).read_bytes())
    gallery.draw(source, tmp_path / "drawn")
    assert len(list(source.iterdir())) == 4
    for path in tiny.iterdir():
        if path.name != results.MARKER:
            assert (tmp_path / "drawn" / path.name).read_bytes() == path.read_bytes(), path.name


def test_drawing_needs_the_numbers(tmp_path):
    with pytest.raises(results.ResultsError, match=r"has no summary\.csv, sensitivity\.csv"):
        gallery.draw(tmp_path, tmp_path)


@pytest.mark.parametrize(("method", "lines"), [("sgd", 2), ("gauss_newton", 1), ("kfac", 0)])
def test_a_method_has_a_picture_of_its_tuning(tiny, method, lines):
    figure = pictures.sensitivity(tiny, method)
    assert figure.get_size_inches().tolist() == [7.0, 3.0]
    (axis,) = figure.axes
    assert len(axis.get_legend_handles_labels()[0]) == lines
    if not lines:
        assert "left out: it needs the layers" in axis.texts[0].get_text()


def test_a_picture_of_an_unknown_method_is_refused(tiny):
    with pytest.raises(ValueError, match="did you mean 'sgd'"):
        pictures.sensitivity(tiny, "sgdd")


def test_a_new_method_appears(monkeypatch):
    toy = registry.Method(
        name="toy", factory=lambda *, step: optax.with_extra_args_support(optax.sgd(step)),
        scale_by=None, family="toys", title="Toy", reference="nobody", equation="none",
        tunes=registry.Tunable("step", 1e-3, 1.0),
    )  # fmt: skip
    monkeypatch.setattr(registry, "_METHODS", {**registry._METHODS, "toy": toy})
    found = numbers.measure(["sgd", "toy"], ["noisy_quadratic"], TINY)
    assert found.families == ("baselines", "toys")
    assert found.row("noisy_quadratic", "toy", 20)["hyperparameter"] == "step"
    assert '"name": "toy"' in page.html(found)
    assert "toy" in pictures.animated(found, "noisy_quadratic")


def test_the_page_holds_the_runs_and_asks_nobody(tiny):
    text = (tiny / "interactive.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "default-src 'none'" in text
    about = json.loads(re.search(r'id="about-data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    found = numbers.read(tiny)
    assert about["places"][0]["chosen"][0] == [
        found.chosen("noisy_quadratic", "sgd", budget) for budget in TINY.budgets
    ]
    assert not re.findall(r"\{\{ \w+ \}\}", text)


# The command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--landscapes", "rosenbrok"], "landscape = 'rosenbrok' is not accepted; did you mean"),
        (["--methods", "sgd,admm"], "method = 'admm' is not accepted; did you mean"),
        (["--draw", "somewhere", "--quick"], "--draw runs nothing"),
        (["--draw", "nowhere"], "nowhere has no summary.csv"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, ["gallery", *arguments])
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
    assert not list(tmp_path.rglob("*.*"))


def test_the_help_names_all_landscapes():
    assert list(cli_gallery.LANDSCAPES) == list(PLACES)


def test_the_command_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    options = ["--landscapes", "plateau", "--methods", "sgd", "--quick", "--output", "made"]
    found = runner.invoke(cli.app, ["gallery", *options])
    assert found.exit_code == 0, found.stderr
    assert "Quick mode" in (tmp_path / "made" / "report.md").read_text(encoding="utf-8")
    again = runner.invoke(cli.app, ["gallery", *options])
    assert again.exit_code == 2
    assert "exists already" in " ".join(again.stderr.split())
    (tmp_path / "made" / "overview.png").unlink()
    assert runner.invoke(cli.app, ["gallery", "--draw", "made"]).exit_code == 0
    assert (tmp_path / "made" / "overview.png").is_file()
