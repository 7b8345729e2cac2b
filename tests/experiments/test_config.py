"""The configuration: defaults, files, overrides, and refusals that say what to do instead."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

import optgrad
from optgrad import registry
from optgrad.experiments import config
from optgrad.experiments.config import CompareConfig, ConfigError, load_config, parse_override

CONFIGS = Path(optgrad.__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
IDS = [path.stem for path in FILES]

EVERYTHING = """
dataset = "mnist"
data_dir = "/data/images"
model = "mlp"
optimizers = [
  "momentum",
  { method = "adam", label = "Adam, slow", hyperparams = { b1 = 0.5, nesterov = true } },
  { method = "m_svag", rates = [1.0, 0.3] },
  { method = "lbfgs", hyperparams = { memory_size = 4 } },
]
steps = 300
budget = "gradient_evaluations"
measure_seconds = true
published_defaults = true
eval_every = 50
batch_size = 32
seeds = 3
augment = ["crop", "mirror"]
l2 = 1e-4
weight_decay = 0.0
label_smoothing = 0.1
precision = "bfloat16"
accumulate = 1
ema = 0.99
guard = 5
monitor = true
tensorboard = true
validation = 5000
target_accuracy = 0.9
vectorize = "vmap"
mesh = { runs = 4, data = 2 }
memory_limit = "8GB"
microbatch_size = 8
checkpoint_seconds = 60.0
output = "/tmp/somewhere"

[model_options]
hidden = [32, 16]

[schedule]
kind = "constant"
at = []
factor = 0.1
warmup = 0
final = 0.0

[tuning]
protocol = "grid"
rates = [0.1, 0.01]
decades = 1.5
seeds = 2
select_by = "test_loss"
sample_seed = 3
"""
# Fields that go with other values of those above only.
ELSEWHERE = {"budget_seconds", "samples"}


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and returns its path."""

    def write(text, name="my.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path=None, **overrides):
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# What is accepted -----------------------------------------------------------------------------


def test_the_defaults_are_the_digits_configuration():
    assert load_config(CONFIGS / "dissecting_adam_digits.toml") == load_config()


def test_the_defaults_are_the_papers_four_on_digits():
    default = load_config()
    assert [o.method for o in default.optimizers] == ["momentum", "adam", "m_ssd", "m_svag"]
    assert [o.label for o in default.optimizers] == [o.method for o in default.optimizers]
    assert (default.dataset, default.model) == ("digits", "mlp_small")
    assert (default.steps, default.eval_every, default.seeds) == (1000, 100, 5)
    assert default.validation > 0
    assert default.tuning.select_by == "validation_accuracy"  # nothing leaks by default
    assert default.tuning.protocol == "search"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_configurations_of_the_repository_load(path):
    loaded = load_config(path)
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    methods = [o if isinstance(o, str) else o["method"] for o in given["optimizers"]]
    assert [o.method for o in loaded.optimizers] == methods
    kind = "problem" if "problem" in given else "dataset"
    assert (getattr(loaded, kind), loaded.steps) == (given[kind], given["steps"])
    assert loaded.steps % loaded.eval_every == 0


def test_there_are_configurations():
    assert {"dissecting_adam_digits", "dissecting_adam_mnist"} <= set(IDS)


def test_every_field_is_read(toml):
    loaded = load_config(toml(EVERYTHING))
    assert loaded.data_dir == Path("/data/images")
    assert loaded.model_options == {"hidden": [32, 16]}
    assert [o.label for o in loaded.optimizers] == ["momentum", "Adam, slow", "m_svag", "lbfgs"]
    assert loaded.optimizers[1].hyperparams == {"b1": 0.5, "nesterov": True}
    assert loaded.optimizers[2].rates == (1.0, 0.3)
    assert loaded.augment == ("crop", "mirror")
    assert loaded.tuning.rates == (0.1, 0.01)
    assert (loaded.validation, type(loaded.validation)) == (5000, int)
    assert (loaded.mesh, loaded.memory_limit) == ({"runs": 4, "data": 2}, 8 * 10**9)
    # The example leaves out nothing, so that a new field is covered too.
    tree = tomllib.loads(EVERYTHING)
    assert set(tree) == set(CompareConfig.model_fields) - config.PROBLEM_FIELDS - ELSEWHERE
    assert set(tree["tuning"]) == set(config.TuningConfig.model_fields) - ELSEWHERE
    assert set(tree["schedule"]) == set(config.ScheduleConfig.model_fields)


@pytest.mark.parametrize("path", [None, *FILES, "everything"], ids=["default", *IDS, "everything"])
def test_a_resolved_configuration_makes_the_round_trip(toml, path):
    loaded = load_config(toml(EVERYTHING) if path == "everything" else path)
    text = tomli_w.dumps(loaded.model_dump(mode="json", exclude_none=True))
    again = load_config(toml(text, "resolved.toml"))
    assert again == loaded
    assert tomli_w.dumps(again.model_dump(mode="json", exclude_none=True)) == text


@pytest.mark.parametrize("dataset", sorted(config.DEFAULT_MODELS))
def test_every_data_set_has_a_default_network(dataset):
    assert load_config(overrides={"dataset": dataset}).model == config.DEFAULT_MODELS[dataset]


def test_default_networks_cover_all_data_sets():
    assert set(config.DEFAULT_MODELS) == set(config.data.datasets())


@pytest.mark.parametrize(
    ("steps", "eval_every"), [(1000, 100), (50, 5), (7, 1), (13, 13), (21, 3), (22, 11), (1, 1)]
)
def test_eval_every_defaults_to_ten_evaluations_or_the_most_below_that_divide(steps, eval_every):
    assert load_config(overrides={"steps": steps}).eval_every == eval_every


def test_overrides_go_into_the_file(toml):
    path = toml('steps = 60\n[tuning]\nprotocol = "grid"\nseeds = 3')
    loaded = load_config(path, {"steps": 30, "tuning.seeds": 2, "seeds": None, "l2": 0.5})
    assert (loaded.steps, loaded.tuning.seeds, loaded.seeds, loaded.l2) == (30, 2, 5, 0.5)
    assert loaded.tuning.protocol == "grid"
    assert load_config(path).steps == 60  # the file is as it was


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=20", ("steps", 20)),
        ("l2 = 1e-3", ("l2", 1e-3)),
        ("tuning.rates=[0.1, 0.01]", ("tuning.rates", [0.1, 0.01])),
        ("model_options.hidden=[8]", ("model_options.hidden", [8])),
        ('model="mlp"', ("model", "mlp")),
        ("model=mlp", ("model", "mlp")),
        ("output=/tmp/a=b", ("output", "/tmp/a=b")),
        ("output=", ("output", "")),
    ],
)
def test_override_syntax(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["steps", "=3", "", " = 3"])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not an override; accepted: FIELD=VALUE"):
        parse_override(text)


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_config().steps = 3


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("stepz", 50, ["stepz = 50: no such field; did you mean 'steps'?"]),
        ("tuning.decade", 1, ["tuning.decade = 1: no such field; did you mean 'decades'?"]),
        ("xyzzy", 1, ["xyzzy = 1: no such field", "'steps'", "'tuning'"]),
        ("eval-every", 1, ["eval-every = 1: no such field; did you mean 'eval_every'?"]),
        ("steps", "many", ["steps = 'many'", "integer"]),
        ("steps", 0, ["steps = 0", "greater than 0"]),
        ("steps", 10.5, ["steps = 10.5", "integer"]),
        ("seeds", -1, ["seeds = -1", "greater than 0"]),
        ("batch_size", [], ["batch_size = []", "integer"]),
        ("eval_every", 300, ["steps = 1000", "not a multiple of eval_every = 300"]),
        ("l2", -1e-4, ["l2 = -0.0001", "greater than or equal to 0"]),
        ("l2", float("nan"), ["l2 = nan", "finite"]),
        ("l2", float("inf"), ["l2 = inf", "finite"]),
        ("validation", -1, ["validation", "-1", "greater than"]),
        ("validation", 1.5, ["validation", "1.5", "less than 1"]),
        ("target_accuracy", 97, ["target_accuracy = 97", "less than or equal to 1"]),
        ("microbatch_size", 0, ["microbatch_size = 0", "greater than 0"]),
        ("augment", ["flip"], ["augment.0 = 'flip'", "'crop', 'mirror' or 'colour'"]),
        ("vectorize", "pmap", ["vectorize = 'pmap'", "'auto', 'vmap' or 'map'"]),
        ("dataset", "mnits", ["dataset = 'mnits'", "did you mean 'mnist'", "'cifar100'"]),
        ("dataset", 3, ["dataset = 3", "string"]),
        ("model", "mlpp", ["model = 'mlpp'", "did you mean 'mlp'", "'all_cnn_c'"]),
        ("model_options", [1], ["model_options = [1]", "dictionary"]),
        ("tuning", 3, ["tuning = 3", "dictionary"]),
        ("tuning.protocol", "serch",
         ["tuning.protocol = 'serch'", "'search', 'grid', 'random', 'halton' or 'none'"]),
        ("tuning.select_by", "accuracy", ["tuning.select_by = 'accuracy'", "'test_loss'"]),
        ("tuning.seeds", 0, ["tuning.seeds = 0", "greater than 0"]),
        ("tuning.decades", -1.0, ["tuning.decades = -1.0", "greater than 0"]),
        ("tuning.rates", [0.1, 0], ["tuning.rates.1 = 0", "greater than 0"]),
        ("tuning.protocol", "halton", ["tuning.samples = None", "how many points"]),
        ("tuning.samples", 5, ["tuning.samples = 5", "'random' or 'halton'", "'search'"]),
        ("tuning.sample_seed", -1, ["tuning.sample_seed = -1", "greater than or equal to 0"]),
        ("budget", "time", ["budget = 'time'", "'gradient_evaluations' or 'seconds'"]),
        ("budget", "seconds", ["budget_seconds = None", "the seconds of a run"]),
        ("budget_seconds", 2.0, ["budget_seconds = 2", "with budget = 'seconds' only"]),
        ("budget_seconds", -1.0, ["budget_seconds = -1.0", "greater than 0"]),
        ("tuning.rates", ["x"], ["tuning.rates.0 = 'x'", "number"]),
        ("validation", 0, ["validation = 0", "validation_accuracy", "tuning.select_by"]),
        ("optimizers", [], ["optimizers = []", "at least"]),
        ("optimizers", "adam", ["optimizers = 'adam'"]),
        ("optimizers", ["adm"], ["optimizers.0", "'adm'", "did you mean 'adam'", "'m_svag'"]),
        ("optimizers", ["sgd", "adam", "sgd"],
         ["optimizers have the labels ['sgd', 'adam', 'sgd']", "distinct"]),
        ("optimizers", [{"label": "a"}], ["optimizers.0.method", "required"]),
        ("optimizers", [{"method": "adam", "lable": "a"}],
         ["optimizers.0.lable = 'a': no such field; did you mean 'label'?"]),
        ("optimizers", ["sgd", {"method": "adam", "hyperparams": {"b11": 1}}],
         ["optimizers.1", "adam has no hyperparameter 'b11'", "did you mean 'b1'"]),
        ("optimizers", [{"method": "adam", "rates": [0.1, 0.0]}],
         ["optimizers.0.rates.1 = 0.0", "greater than 0"]),
        ("optimizers", [{"method": "adam", "rates": []}], ["optimizers.0", "rates = []"]),
        ("optimizers", [{"method": "lbfgs", "rates": [0.1]}],
         ["optimizers.0", "rates = [0.1]", "none, lbfgs has nothing to tune"]),
        ("optimizers", [{"method": "adam", "hyperparams": 3}],
         ["optimizers.0.hyperparams = 3", "dictionary"]),
        *((f"optimizers.adam.{field}", value, ["optimizers.1", *expected])
          for field, value, expected in (
              ("space", 3, ["space = 3", "dictionary"]),
              ("space.b1", 0.9, ["space.b1", "a list of values, or a table with low and high"]),
              ("space.b1", [], ["space.b1 = []", "one or more"]),
              ("space.b11", [0.9], ["adam has no hyperparameter 'b11'", "did you mean 'b1'"]),
              ("space.learning_rate", {"low": 1.0, "high": 0.1}, ["low = 1, high = 0.1", "low <"]),
              ("space.learning_rate", {"low": 0.1, "high": 0.1}, ["low = 0.1, high = 0.1"]),
              ("space.learning_rate", {"low": 0, "high": 0.1}, ["low = 0", "scale = 'linear'"]),
              ("space.learning_rate", {"low": 0.1}, ["learning_rate.high", "required"]),
              ("space.learning_rate", {"low": 0.1, "high": 1.0, "num": 1}, ["num = 1", "than or"]),
              ("space.learning_rate", {"low": 0.1, "high": 1.0, "nun": 3}, ["nun", "'num'"]),
              ("space.learning_rate", {"low": 0.1, "high": 1.0, "scale": "ln"}, ["'log' or 'lin"]),
          )),
        ("optimizers.adamm.space", {}, ["optimizers.adamm", "did you mean 'adam'"]),
        ("optimizers.9.space", {}, ["optimizers.9.space", "no such optimizer"]),
        ("tuning.protocol", "none", ["momentum requires learning_rate"]),
        ("steps.x", 3, ["steps", "integer"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_refusals_name_field_value_and_remedy(field, value, expected):
    message = refused(**{field: value})
    for part in expected:
        assert part in message, message


def test_same_method_twice_with_labels_is_accepted():
    twice = [{"method": "adam", "label": f"b1={b}", "hyperparams": {"b1": b}} for b in (0.9, 0.5)]
    assert len(load_config(overrides={"optimizers": twice}).optimizers) == 2


def test_every_wrong_field_is_named_with_the_file(toml):
    path = toml("steps = 0\nstepz = 3\n[tuning]\nseeds = 'x'")
    lines = refused(path).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)
    for field in ("steps = 0", "stepz = 3", "tuning.seeds = 'x'"):
        assert sum(field in line for line in lines) == 1


@pytest.mark.parametrize(
    "text", ["steps = ", "optimizers = ['adam'", "steps = 1\nsteps = 2", "steps: 3"]
)
def test_bad_toml_is_refused_with_its_place(toml, text):
    path = toml(text)
    message = refused(path)
    assert message.startswith(f"{path}: cannot be read as TOML: ")
    assert "line" in message or "end of document" in message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refused(path)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, name):
    path = tmp_path / name
    assert refused(path).startswith(f"{path}: cannot be read as TOML: ")


def test_an_override_below_something_that_is_no_table_is_refused(toml):
    message = refused(toml("steps = 10"), **{"steps.x": 3})
    assert "steps.x" in message
    assert "not a table" in message


def test_all_methods_that_tune_may_be_given_by_name_alone():
    names = [m.name for m in registry.methods()]
    loaded = load_config(overrides={"optimizers": names})
    assert [o.method for o in loaded.optimizers] == names


@pytest.mark.parametrize(
    "optimizers", [["adm"], [], [{"method": "adam", "foo": 1}]], ids=["name", "none", "field"]
)
def test_one_mistake_gives_one_line(optimizers):
    assert len(refused(optimizers=optimizers).splitlines()) == 1


def test_the_field_is_named_once():
    assert refused(dataset="mnits").startswith("dataset = 'mnits'")


@pytest.mark.parametrize(
    "hyperparams", [{"learning_rate": -1}, {"beta": 1.5}, {"beta": "x"}, {"variance": "exact"}]
)
def test_bad_hyperparameters_are_refused_before_any_work(hyperparams):
    message = refused(optimizers=["sgd", {"method": "m_svag", "hyperparams": hyperparams}])
    assert message.startswith("optimizers.1: ")
    (name,) = hyperparams
    assert message.count(name) > 1  # what was given, and why it is refused


# Studies --------------------------------------------------------------------------------------

SPACE = {"learning_rate": {"low": 1e-3, "high": 1e-1}, "b1": [0.5, 0.9]}


def test_a_space_is_a_table_of_the_optimizer_and_can_be_overridden(toml):
    path = toml("""
tuning.protocol = "grid"
[[optimizers]]
method = "adam"
label = "Adam"
[optimizers.space]
learning_rate = { low = 1e-3, high = 0.1, num = 3, scale = "log" }
[[optimizers]]
method = "sgd"
""")
    overrides = [
        parse_override(text)
        for text in (
            "optimizers.Adam.space.b1=[0.5, 0.9]",
            "optimizers.0.space.learning_rate.num=2",
            "optimizers.1.rates=[0.5]",
        )
    ]
    loaded = load_config(path, dict(overrides))
    adam, sgd = loaded.optimizers
    assert [tuple(point.values()) for point in loaded.points(adam)] == [
        (1e-3, 0.5), (1e-3, 0.9), (0.1, 0.5), (0.1, 0.9),
    ]  # fmt: skip
    assert (loaded.points(sgd), sgd.rates) == ([], (0.5,))
    assert len(load_config(path).points(load_config(path).optimizers[0])) == 3


def test_an_override_of_one_of_the_default_optimizers():
    overrides = {"tuning.protocol": "grid", "optimizers.adam.space": SPACE}
    loaded = load_config(overrides=overrides)
    assert [len(loaded.points(optimizer)) for optimizer in loaded.optimizers] == [0, 14, 0, 0]
    assert [o.method for o in loaded.optimizers] == [o.method for o in load_config().optimizers]


def test_drawn_points_are_of_the_space_or_of_the_whole_range():
    overrides = {
        "tuning.protocol": "halton", "tuning.samples": 6,
        "optimizers": ["sgd", {"method": "adam", "space": SPACE},
                       {"method": "ogr1d", "hyperparams": {"eta": 0.1}}],
    }  # fmt: skip
    loaded = load_config(overrides=overrides)
    sgd, adam, fixed = (loaded.points(optimizer) for optimizer in loaded.optimizers)
    assert ([list(p) for p in sgd], fixed) == ([["learning_rate"]] * 6, [])
    assert [list(p) for p in adam] == [["learning_rate", "b1"]] * 6


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tuning.protocol": "search"}, ["protocol = 'search'", "adam has a space", "'grid'"]),
        ({"tuning.protocol": "none"}, ["tuning.protocol = 'none'", "adam has a space"]),
        ({"optimizers.adam.rates": [0.1]}, ["rates = [0.1]", "none, beside a space"]),
        ({"optimizers.adam.hyperparams": {"b1": 0.5}}, ["space.b1", "hyperparams.b1 fixes it"]),
        ({"tuning.protocol": "random", "tuning.samples": 3, "tuning.rates": [0.1]},
         ["tuning.rates = [0.1]", "none with protocol = 'random'"]),
        ({"tuning.protocol": "random", "tuning.samples": 3, "optimizers.sgd.rates": [0.1]},
         ["rates = [0.1] of sgd", "none with protocol = 'random'"]),
        ({"budget": "seconds", "budget_seconds": 1.0, "steps": 10, "eval_every": 5},
         ["steps = 10", "budget = 'seconds'"]),
        ({"budget": "seconds", "budget_seconds": 1.0}, ["eval_every = None"]),
        ({"budget": "seconds", "budget_seconds": 1.0, "eval_every": 5, "schedule.warmup": 3},
         ["schedule", "a constant rate"]),
        ({"budget": "gradient_evaluations", "accumulate": 2}, ["accumulate = 2"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(fields, expected):
    optimizers = [{"method": "adam", "space": SPACE}, "sgd"]
    message = refused(**{"optimizers": optimizers, "tuning.protocol": "grid", **fields})
    for part in expected:
        assert part in message, message


def test_a_schedule_must_fit_into_the_steps_that_the_budget_pays_for():
    fields = {"schedule.kind": "step", "schedule.at": [60], "steps": 100, "optimizers": ["kfac"]}
    assert load_config(overrides=fields).length(load_config().optimizers[0]).steps > 60
    message = refused(**fields, budget="gradient_evaluations")
    assert "50 updates" in message


def test_a_study_in_seconds_makes_the_round_trip(toml):
    fields = {"budget": "seconds", "budget_seconds": 1.5, "eval_every": 10}
    loaded = load_config(overrides=fields)
    text = tomli_w.dumps(loaded.model_dump(mode="json", exclude_none=True))
    assert "steps" not in tomllib.loads(text)  # which would be refused
    assert load_config(toml(text)) == loaded


# Known defects --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, True])
def test_a_validation_share_of_one_is_refused(value):
    assert "validation" in refused(validation=value)


@pytest.mark.parametrize(("field", "value"), [("seeds", True), ("steps", "10")])
def test_wrong_types_are_not_coerced(field, value):
    assert field in refused(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tuning.decades", float("inf")),
        ("tuning.rates", [float("inf")]),
        ("tuning.rates", []),
        ("tuning.rates", [0.1, 0.1]),
        ("optimizers", [{"method": "adam", "rates": [float("nan")]}]),
        ("optimizers", [{"method": "adam", "label": "  "}]),
    ],
)
def test_useless_numbers_and_labels_are_refused(field, value):
    assert field.split(".")[-1] in refused(**{field: value})


def test_nothing_to_tune_needs_no_validation():
    fixed = [{"method": "adam", "hyperparams": {"learning_rate": 0.01}}]
    overrides = {"optimizers": fixed, "tuning.protocol": "none", "validation": 0}
    assert load_config(overrides=overrides).validation == 0


def test_messages_name_only_fields_that_exist():
    assert "constrained" not in refused(validation=-0.5)


def test_unknown_model_options_are_refused_at_the_door():
    message = refused(**{"model_options.hiden": [8]})
    assert "model_options.hiden" in message
    assert "did you mean 'hidden'" in message
