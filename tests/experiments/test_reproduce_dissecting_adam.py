"""The reproduction of Dissecting Adam: every figure in quick mode, scales, verdicts."""

import csv
import dataclasses

import numpy as np
import pytest

from optgrad.experiments import compare, data, engine, reproduce, tuning
from optgrad.experiments.config import OptimizerConfig
from optgrad.experiments.reproduce import dissecting_networks as networks
from optgrad.experiments.reproduce import dissecting_scales as scales
from optgrad.experiments.reproduce import dissecting_training as training
from optgrad.experiments.reproduce import dissecting_verdicts as verdicts
from optgrad.experiments.reproduce import report as report_lib

PAPER = reproduce.get_reproduction("dissecting-adam")
QUICK = reproduce.Settings(quick=True)
CURVES = ["problem", "method", "learning_rate", "seed", "step", "train_loss", "test_loss",
          "test_accuracy", "diverged_at"]  # fmt: skip
COLUMNS = {
    "fig2": ["spectrum", "basis", "noise", "method", "step", "median", "mean_log10"],
    "fig3": CURVES,
    "fig5": ["eta", "magnitude", "sign", "adam"],
    "fig6": CURVES,
    "fig7": CURVES,
    "theorem1": ["method", "step", "mean", "sd"],
}
TRAINED = {"fig3", "fig6", "fig7"}  # dozens of programs to compile


def invented_images(name, data_dir=None, download=True):
    """Small images as bright as their label; no test depends on files."""
    generator = np.random.default_rng(0)
    shape, classes = (9, 9, 1 if name == "mnist" else 3), 10
    parts = {}
    for part, count in (("train", 40), ("test", 25)):
        labels = (np.arange(count) % classes).astype(np.int32)
        pixels = 20 * labels[:, None, None, None] + generator.integers(0, 40, (count, *shape))
        parts |= {f"{part}_images": pixels.astype(np.uint8), f"{part}_labels": labels}
    return data.Dataset(name, classes=tuple(map(str, range(classes))), **parts)


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch):
    """Neither data nor outcomes go from one test to another."""
    monkeypatch.setattr(training.data, "load", invented_images)
    monkeypatch.setattr(training, "_OUTCOMES", {})
    training.load_problem.cache_clear()
    yield
    training.load_problem.cache_clear()


# Every figure, through the command --------------------------------------------------------------


def test_all_figures_are_there():
    assert list(PAPER.figures) == list(COLUMNS)


@pytest.mark.parametrize(
    "name",
    [pytest.param("fig2", marks=pytest.mark.slow), "fig5",
     pytest.param("theorem1", marks=pytest.mark.slow)],
)  # fmt: skip
def test_figure_in_quick_mode(name, run, tmp_path):
    check_folder(run, tmp_path, [name])


@pytest.mark.slow
def test_figures_of_networks_in_quick_mode(run, tmp_path, monkeypatch):
    """With tiny dense networks: fourteen convolutional training steps compile for minutes."""
    dense = {
        name: dataclasses.replace(network, model="mlp", model_options={"hidden": (16,)}, augment=())
        for name, network in scales.QUICK.networks.items()
    }
    monkeypatch.setattr(scales, "QUICK", dataclasses.replace(scales.QUICK, networks=dense))
    check_folder(run, tmp_path, ["fig6", "fig7"])  # fig3 differs in names and claims only


def check_folder(run, tmp_path, names):
    folder = tmp_path / "out"
    code, output = run("reproduce", PAPER.name, *names, "--quick", "--output", folder)
    assert code == 0, output
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Quick mode" in text
    assert f"optgrad reproduce dissecting-adam {' '.join(names)} --quick" in text
    assert str(tmp_path) not in text
    for name in names:
        assert {f"{name}.png", f"{name}.svg"} <= {path.name for path in folder.iterdir()}
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert read
        assert list(read[0]) == COLUMNS[name]
        assert "nan" not in (folder / f"{name}.csv").read_text(encoding="utf-8")


@pytest.mark.slow
def test_protocol_is_the_papers():
    """A.2: stable rates searched from the top, selection by test accuracy, other seeds."""
    found = training.outcome(QUICK, "mnist", "adam")
    *_, tuned, final = found.tuned.stages
    assert [s.name for s in found.tuned.stages[:-2]] == ["stability"] * (
        len(found.tuned.stages) - 2
    )
    reached = tuned.history.metrics["test_accuracy"][:, 1:].max(axis=1)
    assert found.tuned.best == tuned.values[reached.argmax()]
    assert set(final.values) == {found.tuned.best}
    assert not set(tuned.seeds) & set(final.seeds)
    assert len(final.seeds) == scales.QUICK.networks["mnist"].seeds
    assert training.outcome(QUICK, "mnist", "adam") is found


# Scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([PAPER.name, "fig4"], ("figure = 'fig4'", "'theorem1'", "'all'")),
        ([PAPER.name, "--scale", "papr"], ("scale = 'papr'", "did you mean 'paper'")),
        ([PAPER.name, "--scale", "paper", "--quick"], ("scale = 'paper' and quick exclude",)),
        (["online-parabola", "--scale", "paper"], ("scale = 'paper'", "'cpu'")),
    ],
)
def test_wrong_figures_and_scales_are_refused(run, tmp_path, arguments, expected):
    code, output = run("reproduce", *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert all(text in output for text in expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [[], ["all"], ["fig5", "all"]])
def test_all_is_every_figure(names):
    assert list(PAPER.select(names)) == list(COLUMNS)


def test_report_says_at_which_scale():
    result = PAPER.figures["fig5"].make(QUICK, lambda fraction: None)
    for scale, expected in (("cpu", "what two CPU cores do"), ("paper", "the paper's networks")):
        text = report_lib.markdown(PAPER, {"fig5": result}, reproduce.Settings(scale=scale))
        assert expected in text
        assert f"dissecting-adam fig5 --scale {scale}" in text
    other = reproduce.get_reproduction("step-size-planning")
    assert "--scale" not in report_lib.markdown(other, {}, reproduce.Settings())


def test_every_budget_is_whole_evaluations_and_the_papers_decay():
    for scale in (scales.PAPER, scales.CPU, scales.QUICK):
        for network in scale.networks.values():
            assert network.steps % network.evaluations == 0
            assert (scale is scales.CPU) == bool(network.differs)
    full = scales.PAPER.networks
    assert training.boundaries(full["cifar100"]) == [40_000, 50_000]
    assert {name: n.batch_size for name, n in full.items()} == {
        "mnist": 128, "cifar10": 256, "cifar100": 256,
    }  # fmt: skip
    assert all(n.seeds == 10 and n.decades == 2 and not n.model_options for n in full.values())


def test_reduced_data_are_the_first_classes_and_images():
    whole = invented_images("mnist")
    found = training.reduced(whole, 3, 5)
    assert found.num_classes == 3
    np.testing.assert_array_equal(found.test_labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(found.test_images, whole.test_images[[0, 1, 2, 10, 11]])
    assert len(found.train_labels) == 12
    same = training.reduced(whole, None, None)
    np.testing.assert_array_equal(same.test_images, whole.test_images)


# Figures of invented outcomes -------------------------------------------------------------------

SEEDS = 6


def invented(method, accuracy, loss, *, noise=0.001, lost=(), early=1.0, at_edge=False):
    """An outcome: a constant curve per seed, with small noise that pairs do not share."""
    generator = np.random.default_rng(sum(map(ord, method)))
    shape = (SEEDS, 4)
    metrics = {
        "train_loss": np.full(shape, loss), "test_loss": np.full(shape, loss),
        "test_accuracy": np.full(shape, accuracy),
    }  # fmt: skip
    metrics = {k: v + noise * generator.standard_normal((SEEDS, 1)) for k, v in metrics.items()}
    metrics["train_loss"][:, 0] = np.nan
    metrics["train_loss"][:, 1] *= early
    diverged = np.zeros(SEEDS, int)
    for run in lost:
        diverged[run] = 7
        for values in metrics.values():
            values[run, -1] = np.nan
    history = engine.History(np.array([0, 10, 20, 30]), metrics, diverged, 2.0)
    stage = tuning.Stage("replication", np.full(SEEDS, 0.1), np.arange(SEEDS), history)
    tuned = tuning.Tuned("learning_rate", 0.1, at_edge, (stage,), stage)
    return compare.Outcome(OptimizerConfig(method=method), tuned, 1, 2.0)


def no_stable_rate(method):
    found = invented(method, 0, 0)
    tuned = tuning.Tuned("learning_rate", None, True, found.tuned.stages, None)
    return compare.Outcome(found.config, tuned, 1, 2.0)


def as_the_paper_says():
    of = {
        ("mnist", "adam"): (0.98, 0.10), ("mnist", "m_ssd"): (0.98, 0.10),
        ("mnist", "m_svag"): (0.96, 0.15), ("mnist", "momentum"): (0.94, 0.20),
        ("cifar10", "adam"): (0.80, 0.5), ("cifar10", "m_ssd"): (0.80, 0.5),
        ("cifar10", "m_svag"): (0.75, 0.6), ("cifar10", "momentum"): (0.75, 0.6),
        ("cifar100", "adam"): (0.50, 2.0), ("cifar100", "m_ssd"): (0.48, 2.2),
        ("cifar100", "m_svag"): (0.61, 1.4), ("cifar100", "momentum"): (0.595, 1.5),
    }  # fmt: skip
    outcomes = {key: invented(key[1], *values) for key, values in of.items()}
    outcomes["cifar100", "adam"] = invented("adam", 0.50, 2.0, noise=0.01)
    outcomes["cifar100", "m_svag"] = invented("m_svag", 0.61, 1.4, early=0.8)
    return outcomes


def test_claims_hold_on_numbers_as_the_paper_has_them():
    found = verdicts.figure3(as_the_paper_says())
    assert {f.verdict for f in found} == {"holds"}, [f for f in found if f.verdict != "holds"]
    assert len(found) == 4 + 2 + 5


def test_claims_do_not_hold_on_the_opposite():
    outcomes = as_the_paper_says()
    swapped = {
        (name, other): outcomes[name, method]
        for (name, method) in outcomes
        for other in [{"adam": "momentum", "momentum": "adam", "m_ssd": "m_svag",
                       "m_svag": "m_ssd"}[method]]
    }  # fmt: skip
    told = {f.statement: f.verdict for f in verdicts.figure3(swapped)}
    for statement in (
        "MNIST: Adam clearly outperforms M-SGD",
        "MNIST: M-SVAG is outperformed by both sign-based methods",
        "CIFAR-10: the sign-based methods have superior performance",
        "CIFAR-100: M-SGD outperforms Adam",
        "CIFAR-100: by almost 10 percentage points",
        "CIFAR-100: Adam is much less stable, with larger variance in performance",
    ):
        assert told[statement] == "does not hold", statement


def test_a_better_rate_beyond_the_edge_could_overturn_a_claim():
    """That M-SGD is worse than Adam, if its rate is at the edge; not if Adam's is."""
    claim = "MNIST: Adam clearly outperforms M-SGD"
    for method, numbers, verdict in (
        ("momentum", (0.94, 0.20), "cannot be judged at this scale"),
        ("adam", (0.98, 0.10), "holds"),
    ):
        outcomes = as_the_paper_says()
        outcomes["mnist", method] = invented(method, *numbers, at_edge=True)
        (found,) = (f for f in verdicts.figure3(outcomes) if f.statement == claim)
        assert found.verdict == verdict
        assert f"at the edge of what was tried: {training.LABELS[method]}" in found.measured


def test_no_gain_from_variance_adaptation_is_no_equality():
    outcomes = as_the_paper_says()
    outcomes["cifar10", "adam"] = invented("adam", 0.70, 0.9)  # far worse than M-SSD
    claim = "CIFAR-10: neither M-SSD nor M-SGD benefits significantly from variance adaptation"
    assert {f.statement: f.verdict for f in verdicts.figure3(outcomes)}[claim] == "holds"
    outcomes["cifar10", "adam"] = invented("adam", 0.90, 0.2)
    told = {f.statement: f.verdict for f in verdicts.figure3(outcomes)}[claim]
    assert told == "holds in part"


def test_large_spread_cannot_be_judged():
    outcomes = {key: invented(key[1], 0.5, 1.0, noise=0.2) for key in as_the_paper_says()}
    told = {f.statement: f.verdict for f in verdicts.figure3(outcomes)}
    assert told["MNIST: Adam clearly outperforms M-SGD"] == "cannot be judged at this scale"
    assert told["CIFAR-100: M-SGD outperforms Adam"] == "cannot be judged at this scale"


def test_lost_runs_and_methods_judge_nothing():
    outcomes = as_the_paper_says()
    outcomes["mnist", "adam"] = no_stable_rate("adam")
    outcomes["cifar100", "momentum"] = invented("momentum", 0.6, 1.5, lost=range(SEEDS))
    outcomes["cifar10", "adam"] = invented("adam", 0.8, 0.5, lost=(0,))
    found = verdicts.figure3(outcomes)
    assert not any("nan" in f.measured for f in found)
    told = {f.statement: (f.verdict, f.measured) for f in found}
    assert told["MNIST: Adam clearly outperforms M-SGD"][0] == "cannot be judged at this scale"
    assert "no pair" in told["MNIST: Adam clearly outperforms M-SGD"][1]
    assert "(5 pairs)" in told["CIFAR-10: the sign-based methods have superior performance"][1]


def test_figures_share_outcomes_and_report_them(monkeypatch):
    trained = []

    def train(settings, name, method, progress):
        trained.append((name, method))
        return no_stable_rate(method) if method == "m_ssd" else invented(method, 0.5, 1.0)

    monkeypatch.setattr(training, "_train", train)
    done = []
    found = {
        name: make(QUICK, done.append)
        for name, make in (("fig3", networks.figure3), ("fig6", networks.figure6),
                           ("fig7", networks.figure7))
    }  # fmt: skip
    assert len(trained) == len(set(trained)) == 3 * 4 + 2 * 2 + 2
    assert max(done) == 1
    for result in found.values():
        assert list(result.rows[0]) == CURVES
    text = report_lib.markdown(PAPER, found, QUICK)
    assert "| MNIST | M-SSD | none stable | no stable rate |" in text
    assert "rate ÷ 10 after 16 and 20 steps" in text
    assert "augmentation: crop, mirror, colour" in text
    assert {f.verdict for f in found["fig7"].findings} == {"holds"}


def test_missing_data_is_said(monkeypatch, tmp_path):
    def load(name, *arguments, **options):
        if name == "mnist":
            return invented_images(name)
        raise data.DataNotFoundError(f"{name} is in none of the places")

    monkeypatch.setattr(training.data, "load", load)
    monkeypatch.setattr(training, "_train", lambda s, n, method, p: invented(method, 0.5, 1.0))
    found = networks.figure3(QUICK, lambda fraction: None)
    assert {row["problem"] for row in found.rows} == {"mnist"}
    assert [f.verdict for f in found.findings][-2:] == ["not tried", "not tried"]
    assert "cifar10: skipped" in found.text
    nothing = networks.figure6(QUICK, lambda fraction: None)
    report_lib.write(PAPER, {"fig6": nothing}, QUICK, tmp_path / "out")
    assert "--data-dir" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
