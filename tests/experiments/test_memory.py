"""Waves: as few as fit into memory, and the same numbers whatever they are."""

import re

import jax
import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import checkpoint, memory
from optgrad.experiments.engine import Trainer

from .test_engine import assert_same, make_runs, make_trainer, softmax_regression


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("count", [1, 7, 24, 100])
@pytest.mark.parametrize("limit", [0, 350, 1000, 2450, 10**6])
def test_plans_fit_and_are_as_wide_as_can_be(count, limit, multiple):
    asked = []

    def bytes_at(width):  # 50 more than linear, as alignment may have it
        asked.append(width)
        return 100 + 200 * width // multiple + (50 if width > multiple else 0)

    plan = memory.plan(count, limit, 100, bytes_at, multiple)
    assert plan.width % multiple == 0
    assert multiple <= plan.width < count + multiple
    assert bytes_at(plan.width) <= limit or plan.width == multiple
    # One wave fewer would not fit.
    waves = -(-count // plan.width)
    if waves > 1:
        wider = -(-count // (waves - 1) // multiple) * multiple
        assert bytes_at(wider + multiple) > limit
    assert len(asked) < 9
    assert asked.count(max(asked)) <= 3


def test_the_estimate_is_what_the_compiler_counts():
    trainer = make_trainer("adam", vectorize="vmap")
    executable = trainer.executable
    small, large = (executable.memory_bytes(["learning_rate"], n) for n in (2, 200))
    data = sum(x.nbytes for x in jax.tree.leaves(trainer.problem.data))
    state = 3 * 15 * 4  # parameters and two averages of float32
    assert small > data + 2 * state
    assert 198 * state < large - small < 198 * 40 * state


def test_waves_of_a_limit_give_the_same_numbers():
    runs = make_runs([0.02, 0.05], range(4))
    trainer = limited(None)
    whole = trainer.train(runs, 5)
    assert trainer.executable.compilations == 1
    assert re.match(r"8 runs, .*B each beside .*B of data, 8 at a time", trainer.notes[-1])
    limit = trainer.executable.memory_bytes(["learning_rate"], 4)
    narrow = limited(limit)
    assert_same(narrow.train(runs, 5), whole)
    assert narrow._width in {3, 4}
    assert narrow.notes[-1].endswith(f"{narrow._width} at a time")
    assert narrow.executable.memory_bytes(["learning_rate"], narrow._width) <= limit


def limited(limit):
    method = registry.get_method("sgd")
    return Trainer(
        softmax_regression(), method, eval_every=5, vectorize="vmap", memory_limit=limit
    )  # fmt: skip


def test_the_width_is_remembered_by_the_journal(tmp_path, monkeypatch):
    """Whatever memory there is when the study goes on: its waves are the same."""
    monkeypatch.setattr(memory, "plan_runs", lambda *arguments: memory.Plan(2, 1.0, 1))
    results = tmp_path / "results"
    with checkpoint.begin(results, {}) as journal:
        trainer = limited(None)
        trainer._width = None
        found = trainer._fitting(make_runs([0.1], range(3)), checkpoint.Waves(journal, "sgd"))
        assert found == 2
        journal.finish({"label": "sgd", "number": 0}, [], 0.0)
    monkeypatch.setattr(memory, "plan_runs", lambda *arguments: pytest.fail("measured again"))
    with checkpoint.resume(results) as journal:
        trainer = limited(None)
        waves = checkpoint.Waves(journal, "sgd")
        assert trainer._fitting(make_runs([0.1], range(3)), waves) == 2
        assert trainer.notes == ["3 runs, 1 B each beside 1 B of data, 2 at a time"]


def test_memory_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path / "memory.max")
    whole = memory.device_bytes()
    assert whole > 10**7
    for text, expected in (
        ("max\n", whole),
        ("8000000\n", 8_000_000 // 2 // jax.local_device_count()),
    ):
        (tmp_path / "memory.max").write_text(text)
        assert memory.device_bytes() == expected

    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()])
    assert memory.device_bytes() == 900


def test_waves_are_padded_to_one_width():
    runs = make_runs([0.1], range(3))
    trainer = limited(1)  # nothing fits: one at a time, and not none
    history = trainer.train(runs, 5)
    assert trainer._width == 1
    assert np.isfinite(history.metrics["test_loss"]).all()
