"""Eight simulated devices: the numbers of one, one compilation, and no needless traffic."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optgrad import registry
from optgrad.experiments import config, data, problems, quadratics
from optgrad.experiments.engine import Runs, Trainer
from optgrad.experiments.mesh import RunMesh, parse

from .test_engine import assert_same, compiled_functions, make_runs, softmax_regression

MESHES = ("runs=4,data=2", "runs=8", "data=8")
SIX = make_runs([0.02, 0.05], range(3))  # which four and eight devices do not divide
EVERY = 3


def make_trainer(mesh=None, name="momentum", problem=None, *, vectorize="vmap", **hyperparams):
    return Trainer(
        problem or softmax_regression(),
        registry.get_method(name),
        hyperparams,
        eval_every=EVERY,
        vectorize=vectorize,
        mesh=RunMesh(parse(mesh)) if mesh else None,
    )


@functools.cache
def expected():
    return make_trainer(vectorize="map").train(SIX, 2 * EVERY)


@pytest.mark.parametrize(
    "mesh",
    [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])],
)
def test_a_mesh_gives_the_numbers_of_one_device(mesh):
    trainer = make_trainer(mesh)
    with compiled_functions() as names:
        history = trainer.train(SIX, 2 * EVERY)
    assert_same(history, expected())
    assert trainer.compilations == 1
    assert names.count("interval") == 1, names
    state = trainer.executable.init({"learning_rate": np.zeros(8, np.float32)}, np.arange(8))
    kernel = state.params["out"]["kernel"]
    assert len(kernel.devices()) == 8
    runs = trainer.program.mesh.runs
    assert kernel.addressable_shards[0].data.shape == (8 // runs, 4, 3)

    found = collectives(trainer)
    if "data" not in mesh:
        assert not found
        return
    # The sums of gradient and loss, over the examples; no data, no parameters.
    assert {kind for kind, _ in found} == {"all-reduce"}
    numbers = 4 * 3 + 3 + 1
    assert max(size for _, size in found) <= numbers * 8 // runs


def collectives(trainer, width=8):
    """(kind, numbers that it moves) of each collective of an interval."""
    _, training, _ = trainer.executable.lowered(["learning_rate"], width)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(
        rf"= (.*?) ({kinds})(?:-start)?\(", training.compile().as_text()
    ):
        sizes = [
            math.prod(map(int, shape.split(","))) if shape else 1
            for shape in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        found.append((kind, sum(sizes)))
    return found


def test_the_search_for_collectives_finds_them():
    trainer = make_trainer("data=8")

    def sorting(params, batch):
        return jnp.sum(jnp.sort(batch["x"], axis=0) @ params["out"]["kernel"])

    gathering = dataclasses.replace(trainer.problem, loss=sorting)
    found = {kind for kind, _ in collectives(make_trainer("data=8", problem=gathering))}
    assert found - {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["runs=2,data=4"])
@pytest.mark.parametrize("name", ["m_svag_mb", "natural_gradient"])
def test_methods_that_need_more_than_gradients(name, mesh):
    method = registry.get_method(name)
    fixed = dict(method.test_hyperparams)
    runs = Runs({}, np.arange(3))
    histories = [make_trainer(m, name, **fixed).train(runs, EVERY) for m in (None, mesh)]
    assert_same(histories[1], histories[0], rtol=1e-3, atol=1e-4)
    assert histories[0].metrics["test_loss"][0, -1] != histories[0].metrics["test_loss"][0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["runs=4,data=2"])
@pytest.mark.parametrize("kind", ["images", "quadratic", "stepped"])
def test_kinds_of_problems(kind, mesh):
    problem = {
        "images": images,
        "quadratic": lambda: quadratics.noisy_quadratic(batch_size=4, dimension=6),
        "stepped": lambda: softmax_regression(has_convolutions=True),
    }[kind]()
    trainers = [make_trainer(m, "adam", problem) for m in (None, mesh)]
    histories = [trainer.train(SIX, 2 * EVERY) for trainer in trainers]
    assert_same(histories[1], histories[0], rtol=1e-4, atol=1e-5)
    assert trainers[1].compilations == 1


def images():
    return problems.image_classification(
        data.load("digits").split_validation(0.1),
        "mlp_small",
        batch_size=8,
        model_options={"hidden": (5,)},
        evaluation_batch=100,  # of 1000 in three splits: two devices do not divide them
    )


@pytest.mark.slow
def test_one_run_after_the_other_with_the_examples_divided():
    trainer = make_trainer("data=8", vectorize="map")
    assert trainer.vectorize == "map"
    assert_same(trainer.train(SIX, 2 * EVERY), expected())
    assert trainer.compilations == 1


def test_an_axis_of_runs_makes_them_go_together():
    trainer = make_trainer("runs=2", vectorize="map")
    assert trainer.vectorize == "vmap"
    assert trainer.notes == ["together, not one after the other, on the mesh runs=2,data=1"]
    assert make_trainer("runs=2", vectorize="auto").vectorize == "vmap"


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("runs=4,dta=2", "mesh axis = 'dta' .*did you mean 'data'"),
        ("runs=0", "mesh runs = 0 .*integer ≥ 1"),
        ("runs", "mesh = 'runs'; accepted: AXIS=SIZE"),
        ("runs=2,runs=3", "accepted: AXIS=SIZE"),
        ("runs=-1", "accepted: AXIS=SIZE"),
        ({"runs": 1.5}, r"mesh runs = 1\.5 .*integer"),
        ({"rows": 2}, "mesh axis = 'rows'"),
    ],
)
def test_impossible_meshes_are_refused(mesh, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load_config(overrides={"mesh": mesh})


def test_meshes_are_read():
    for mesh in ("runs=4, data=2", {"runs": 4, "data": 2}):
        assert config.load_config(overrides={"mesh": mesh}).mesh == {"runs": 4, "data": 2}
    assert config.load_config(overrides={"memory_limit": "8GB"}).memory_limit == 8 * 10**9
    with pytest.raises(config.ConfigError, match="memory_limit"):
        config.load_config(overrides={"memory_limit": "much"})


def test_more_devices_than_there_are():
    with pytest.raises(
        ValueError, match=r"mesh = runs=99,data=2 needs 198 devices.*xla_force_host"
    ):
        RunMesh({"runs": 99, "data": 2})


def test_a_batch_that_cannot_be_divided_is_refused_before_any_work():
    trainer = make_trainer("data=3")
    with pytest.raises(ValueError, match=r"batch of 8 examples .* data = 3; accepted: a multiple"):
        trainer.check(["learning_rate"])
    make_trainer("runs=3,data=2").check(["learning_rate"])
    assert trainer.compilations == 0


def test_runs_are_padded():
    assert [RunMesh({"runs": 4}).padded(n) for n in (1, 4, 5)] == [4, 4, 8]
    assert str(RunMesh({})) == f"runs={jax.device_count()},data=1"
