"""optgrad bench: what is counted and timed, and the command as a user runs it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

import optgrad
from optgrad.experiments import cli, cli_bench
from optgrad.experiments.bench import (
    compilation,
    networks,
    output,
    peers,
    programs,
    step,
    timing,
    trees,
)


def program(name, leaves=2, size=1000, **hyperparams):
    params = trees.parameters(trees.equal_leaves(leaves, size))
    return programs.StepProgram(optgrad.get_method(name), params, hyperparams)


# Parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "leaves", "entries"),
    [("one", 1, 10**7), ("hundred", 100, 10**7), ("small400", 400, 400_000),
     ("resnet18", 62, 11_173_962), ("transformer", 100, 6_868_992), ("few", 4, 200)],
)  # fmt: skip
def test_trees_have_the_sizes_that_they_are_said_to_have(name, leaves, entries):
    shapes = trees.get_tree(name).shapes()
    assert len(shapes) == leaves
    assert sum(math.prod(shape) for shape in shapes.values()) == entries


def test_parameters_are_in_range_and_never_zero():
    for size in (1, 2, 7):
        found = trees.parameters({"a": (size,), "b": (size, 3)}, jnp.bfloat16)
        for leaf in found.values():
            assert leaf.dtype == jnp.bfloat16
            assert np.all((np.abs(leaf) <= 1) & (np.abs(leaf) > 0))


def _resnet(images):
    return networks.ResNet18(rngs=nnx.Rngs(0))(images)


@pytest.mark.slow
def test_the_networks_compute():
    small = networks.Transformer(16, 8, 8, 1, 2, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    changed = tokens.at[0, 5].set(0)
    before, after = small(tokens), small(changed)
    assert before.shape == (1, 8, 16)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])  # causal
    assert np.any(before[0, 5:] != after[0, 5:])
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits = nnx.eval_shape(_resnet, images)
    assert logits.shape == (2, 10)


# Programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "vectors"),
    [("adam", "elementwise", 7), ("sgd", "elementwise", 3), ("adaptive_sgd", "elementwise", 11),
     ("m_svag_mb", "elementwise", 8), ("l4_momentum", "tree-wide", 2 + 2 * 3),
     ("truncated_newton", "functions", None), ("ogr_full", "dense", None)],
)  # fmt: skip
def test_traffic_counts_every_vector(name, kind, vectors):
    """Gradient, parameters and state are read, the latter two written; twice read for a sum."""
    found = program(name, size=1000 if kind != "dense" else 5)
    assert found.kind == kind
    if vectors is None:
        assert found.traffic() is None
    else:
        assert found.traffic() == pytest.approx(vectors * 8000, abs=200)


def test_counts_tell_a_step_in_place_from_one_that_copies():
    _, counts = programs.compiled_with_counts(program("momentum"))
    assert counts.copies == 0
    assert counts.alias_bytes == counts.param_bytes + counts.state_bytes == 16_000
    hlo = "  a = f32[10,200]{1,0} copy(b)\n  c = f32[3]{0} copy(d)\n  e = f32[2000]{0} add(f, f)"
    assert programs.copies(hlo, 1000) == 1


def test_a_runner_takes_steps_and_leaves_the_program_as_it_was():
    found = program("sgd", learning_rate=1.0)
    run = found.runner(found.lower().compile())
    run()
    params, _ = run()
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, found.params[name] - 2 * found.grad[name], rtol=1e-6)


@pytest.mark.parametrize("method", programs.measurable(), ids=lambda m: m.name)
def test_every_method_has_what_it_is_measured_with(method):
    found = program(method.name, leaves=2, size=3)
    shapes = jax.eval_shape(found.step, found.params, found.state, found.grad, found.extras)
    assert jax.tree.structure(shapes) == jax.tree.structure((found.params, found.state))


def test_only_methods_of_layers_cannot_be_measured():
    assert {m.name for m in optgrad.methods()} - {m.name for m in programs.measurable()} == {"kfac"}


# The clock ------------------------------------------------------------------------------------


def test_programs_are_timed_in_turn(monkeypatch):
    """Fast ones run several times in a sample; a drift of the machine cancels in the ratios."""
    now, order = [0.0], []
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def run(name, seconds):
        def once():
            order.append(name)
            now[0] += seconds * (1.0 + 0.01 * now[0])  # ever slower
            return jnp.zeros(())

        return once

    spent = timing.interleaved({"fast": run("fast", 0.001), "slow": run("slow", 0.02)}, 4)
    assert "".join(name[0] for name in order[6:]).replace("fffff", "F") == 4 * "Fs"
    ratio = timing.ratios(spent["slow"], spent["fast"])
    assert ratio.median == pytest.approx(20.0, rel=0.01)
    assert ratio.low <= ratio.median <= ratio.high


def test_the_stream_works_in_place():
    stream = timing.Stream(1000)
    first = stream()
    assert stream.bytes == 8000
    stream()
    assert first.is_deleted()


# Rows -----------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 1e-5)
    monkeypatch.setattr(timing, "STREAM_ENTRIES", 1000)
    small = trees.Tree("one", "one leaf", lambda: trees.equal_leaves(1, 100))
    monkeypatch.setitem(trees._TREES, "one", small)


def test_step_costs(fast):
    notes = []
    setting = step.Setting("one", "bfloat16", rounds=2)
    methods = [optgrad.get_method(name) for name in ("m_svag", "newton", "kfac")]
    (row,) = step.costs(methods, setting, on_note=notes.append)
    assert (row.method, row.kind, row.tree, row.param_dtype) == (
        "m_svag", "elementwise", "one", "bfloat16"
    )  # fmt: skip
    assert row.state_bytes == 804  # two float32 vectors, and a count
    # 3 bfloat16 vectors and 2 float32 ones read and written, beside 7 of bfloat16
    assert row.bound_ratio == pytest.approx((3 * 200 + 4 * 400) / (7 * 200), rel=0.02)
    assert row.over_bound == pytest.approx(row.ratio / row.bound_ratio)
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert len(step.cells(row)) == len(step.HEADER)
    assert [note.split(":")[0] for note in notes] == ["newton on one", "kfac on one"]


def test_a_state_type_is_for_methods_that_have_one(fast):
    notes = []
    setting = step.Setting("one", state_dtype="bfloat16", rounds=1)
    methods = [optgrad.get_method(name) for name in ("m_ssd", "momentum")]
    (row,) = step.costs(methods, setting, on_note=notes.append)
    assert row.state_bytes == 204
    assert notes == ["momentum on one: has no state_dtype"]
    setting = step.Setting("one", state_dtype="stochastic", rounds=1)
    (row,) = step.costs([optgrad.get_method("momentum")], setting)  # by the wrapper any has one
    assert row.state_bytes == 204


def test_compile_costs():
    (row,) = compilation.costs([optgrad.get_method("sgd")], 3)
    assert row.leaves == 3
    assert row.copies == 0
    assert row.instruction_ratio < 1
    assert 0 < row.accessed_ratio < 1
    assert row.reused_share == 1
    assert len(compilation.cells(row)) == len(compilation.HEADER)


def test_peers_are_measured_where_they_are_installed(fast):
    """Without torch there are none, and nothing fails."""
    found = list(step.costs([], step.Setting("one", rounds=1), with_peers=True))
    assert [row.method for row in found] == [peer.name for peer in peers.installed()]


# The command ----------------------------------------------------------------------------------


def invoke(monkeypatch, *arguments):
    monkeypatch.setattr(cli_bench.compilation, "without_cache", lambda: None)  # of this process
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_the_command_writes_markdown_and_json(fast, monkeypatch, tmp_path):
    folder = tmp_path / "cost"
    command = ["step", "sgd", "kfac", "--tree", "one", "--rounds", 1, "--output", folder]
    result = invoke(monkeypatch, *command)
    assert result.exit_code == 0, result.output
    content = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    (row,) = content["rows"]
    assert row["method"] == "sgd"
    assert row["bound_ratio"] == pytest.approx(3 / 7, rel=0.02)
    assert content["settings"]["tree"] == ["one"]
    text = (folder / "step.md").read_text(encoding="utf-8")
    assert "| sgd | elementwise |" in text
    assert "kfac on one" in text
    assert str(tmp_path) not in text + (folder / "config.toml").read_text(encoding="utf-8")
    again = invoke(monkeypatch, *command)
    assert again.exit_code == 2  # what is there is not lost
    assert "exists already" in again.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["step", "adm"], "unknown method 'adm'"), (["step", "--tree", "on"], "tree = 'on'"),
     (["step", "--param-dtype", "float8"], "param_dtype = 'float8'"),
     (["step", "--state-dtype", "int8"], "state_dtype = 'int8'"), (["compile", "adm"], "'adm'"),
     (["sweep", "--dataset", "digit"], "digit"), (["sweep", "adm"], "'adm'")],
    ids=str,
)  # fmt: skip
def test_what_is_refused(monkeypatch, arguments, expected):
    result = invoke(monkeypatch, *arguments)
    assert result.exit_code == 2
    assert expected in result.output


@pytest.mark.slow
def test_the_sweep_of_the_digits_network(monkeypatch):
    result = invoke(
        monkeypatch, "sweep", "adam", "--runs", 1, "--runs", 2, "--steps", 2, "--rounds", 1
    )
    assert result.exit_code == 0, result.output
    assert "adam, mlp_small on digits" in result.output


def test_a_table_without_rows_is_written_too():
    table = output.Table("none", ("a", "b"), [], [], (0,))
    assert "| a | b |" in output.markdown("step", [table], ["left out"], {"jax": "1"})
