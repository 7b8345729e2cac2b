"""Reproductions: every figure in quick mode, what is written, what is refused, what is measured."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optgrad
from optgrad.experiments import reproduce
from optgrad.experiments.reproduce import digits_network, online_parabola, online_parabola_network
from optgrad.experiments.reproduce import report as report_lib

pytestmark = pytest.mark.slow  # many programs to compile: in CI's slow stage

PAPER = reproduce.get_reproduction("online-parabola")
QUICK = reproduce.Settings(quick=True)
COLUMNS = {
    "geometry": ["step", "position", "gradient", "weight", "theta_1", "theta_2"],
    "beale3d": [
        "method", "registered_as", "printed", "measured", "lowest_seed", "highest_seed", "ratio",
        "starts", "seeds", "steps",
    ],
    "lattices": ["landscape", "method", "tuned", "value", "rank", "excess"],
    "noise": ["study", "alpha", "beta", "step", "predicted", "median", "dead_share"],
    "saddle": ["rule", "eta", "epsilon", "beta", "gamma", "median_f", "lowest_f", "highest_f"],
    "curvature": ["beta", "gamma", "seed", "step", "estimated", "true"],
    "subspace": [
        "training", "seed", "step", "energy_top", "energy_basis", "overlap", "largest_eigenvalue",
        "tenth_eigenvalue", "loss",
    ],
}  # fmt: skip


# Every figure ---------------------------------------------------------------------------------


def test_all_seven_figures_are_there():
    assert list(PAPER.figures) == list(COLUMNS)


SLOW = {"lattices", "subspace", "saddle", "beale3d", "curvature"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in COLUMNS]
)
def test_figure_in_quick_mode(name, tmp_path):
    check_figure(name, tmp_path)


@pytest.mark.slow
def test_lattices_of_two_methods_in_quick_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(online_parabola, "_family", lambda: ["ogr1dc", "ogr_subspace"])
    result = check_figure("lattices", tmp_path)
    methods = {"ogr1dc", "ogr_subspace", "sgd", "momentum", "adam"}
    assert {r["method"] for r in result.rows} == methods
    places = {"beale", "rosenbrock", "matyas", "goldstein_price"}
    assert {r["landscape"] for r in result.rows} == places
    ranks = [r["rank"] for r in result.rows if (r["landscape"], r["method"]) == ("beale", "sgd")]
    assert ranks == list(range(1, 10))  # 3 × 3 starts


def test_lattices_are_of_every_method_of_the_family():
    assert online_parabola._family() == [m.name for m in optgrad.methods("online_regression")]


def check_figure(name, tmp_path):
    """Makes and writes a figure; checks what was written against the result."""
    done = []
    result = PAPER.figures[name].make(QUICK, done.append)
    assert done == sorted(done)
    assert 0 < done[-1] <= 1
    for row in result.rows:
        assert list(row) == COLUMNS[name]
        for key, value in row.items():
            if not isinstance(value, str) and value is not None:
                assert np.isfinite(value), (key, row)
    assert result.findings
    for finding in result.findings:
        assert all((finding.statement, finding.reference, finding.measured, finding.verdict))
        assert "nan" not in finding.measured

    report_lib.write(PAPER, {name: result}, QUICK, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{name}.png", f"{name}.svg", f"{name}.csv", "report.md", "config.toml"}
    with open(tmp_path / "out" / f"{name}.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(result.rows)
    assert list(read[0]) == COLUMNS[name]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert result.title in text
    assert all(finding.verdict in text for finding in result.findings)
    assert f"optgrad reproduce online-parabola {name} --quick" in text
    assert str(tmp_path) not in text
    return result


# The command ----------------------------------------------------------------------------------


def test_command_writes_prints_and_refuses_to_overwrite(run, tmp_path):
    folder = tmp_path / "out"
    code, output = run("reproduce", "online-parabola", "geometry", "--quick", "--output", folder)
    assert code == 0, output
    assert "relative difference" in output
    assert f"report: {folder}" in output
    before = (folder / "report.md").read_bytes()
    code, output = run("reproduce", "online-parabola", "geometry", "--quick", "--output", folder)
    assert code == 2
    assert "exists already" in output
    assert (folder / "report.md").read_bytes() == before
    again = ("reproduce", "online-parabola", "geometry", "--quick", "--output", folder)
    assert run(*again, "--overwrite")[0] == 0


def test_command_without_a_paper_lists_them(run):
    code, output = run("reproduce")
    assert code == 0
    for word in ("online-parabola", *COLUMNS):
        assert word in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["online-parabolla"], ("paper = 'online-parabolla'", "did you mean 'online-parabola'")),
        (["online-parabola", "sadle"], ("figure = 'sadle'", "did you mean 'saddle'")),
        (["online-parabola", "noise", "beale"], ("figure = 'beale'", "did you mean 'beale3d'")),
    ],
)
def test_unknown_names_are_refused_with_suggestions(run, tmp_path, arguments, expected):
    code, output = run("reproduce", *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert all(text in output for text in expected)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = ("--output", tmp_path, "--overwrite")
    code, output = run("reproduce", "online-parabola", "geometry", *arguments)
    assert code == 2
    assert "was not written by optgrad" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_select_keeps_the_papers_order():
    assert list(PAPER.select(["saddle", "geometry"])) == ["geometry", "saddle"]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(1.0, "agrees"), (1.49, "agrees"), (0.67, "agrees"), (1.6, "does not"), (0.6, "does not")],
)
def test_verdicts_follow_from_the_numbers(measured, expected):
    assert reproduce.ratio_verdict(measured, 1.0, 1.5).startswith(expected)


# What is measured -----------------------------------------------------------------------------


@pytest.mark.slow
def test_beale_table_agrees_with_the_printed_values():
    result = online_parabola.beale3d(reproduce.Settings(), lambda fraction: None)
    assert {r["printed"] for r in result.rows} == {4.654, 0.0417, 0.0074, 0.0120, 0.00384}
    for row in result.rows:
        assert 1 / 1.5 <= row["ratio"] <= 1.5, row


def test_geometric_run_reconstructs_what_the_method_modelled():
    result = online_parabola.geometry(QUICK, lambda fraction: None)
    assert result.findings[0].verdict == "holds"


def test_predicted_rate_is_the_specifications_table():
    settings = [(0.5, 0.9), (0.5, 0.99), (0.5, 0.999), (0.25, 0.99), (1, 0.9), (1, 0.99)]
    found = [online_parabola.predicted_rate(a, b) for a, b in settings]
    np.testing.assert_allclose(found, [0.026, 0.116, 0.124, 0.021, 0.421, 0.493], atol=6e-4)
    assert online_parabola.predicted_rate(0.1, 0.99) == 0


def test_curvature_and_eigenspace_agree_with_the_dense_hessian(monkeypatch):
    """On a network of 4-3-2 units."""
    monkeypatch.setattr(digits_network, "_SIZES", (4, 3, 2))
    key = jax.random.key(0)
    images = jax.random.uniform(key, (20, 4))
    examples = digits_network.Digits(images, jnp.arange(20) % 2)
    params = digits_network.init_params(key)
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: digits_network.loss(unravel(x), examples)))(flat)
    direction = jax.random.normal(key, flat.shape)
    found = digits_network.curvature_along(params, unravel(direction), examples)
    np.testing.assert_allclose(found, direction @ hessian @ direction, rtol=1e-4)
    space = digits_network.leading_eigenspace(params, examples, k=3)
    values, vectors = np.linalg.eigh(hessian)
    np.testing.assert_allclose(space.values, values[-3:], rtol=1e-3)
    overlap = np.sum((vectors[:, -3:].T @ space.vectors) ** 2)
    np.testing.assert_allclose(overlap, 3, rtol=1e-3)


def test_minibatches_are_permutations():
    rows = np.asarray(digits_network.minibatches(jax.random.key(0), count=20, steps=7, size=6))
    assert rows.shape == (7, 6)
    for epoch in (rows[:3], rows[3:6]):
        assert len(set(epoch.ravel())) == 18


def test_span_has_the_rank_of_the_rows():
    rows = {"a": jnp.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]), "b": jnp.array([0.0, 1.0, 0.0])}
    span = digits_network.orthonormal_span(rows, 3)
    assert span.shape == (3, 2)
    np.testing.assert_allclose(span.T @ span, np.eye(2), atol=1e-6)


def test_rank_correlation():
    x = np.random.default_rng(0).normal(size=50)
    assert online_parabola_network._rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert online_parabola_network._rank_correlation(x, -(x**3)) == pytest.approx(-1)
