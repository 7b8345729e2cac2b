"""The configuration of a comparison: a pydantic model, read from TOML, overridden by flags."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from optgrad import registry
from optgrad.core import checks
from optgrad.experiments import budgets, catalogue, data, mesh, models, search_space, user_problems
from optgrad.experiments import features as features_lib
from optgrad.experiments.schedules import ScheduleConfig

DEFAULT_MODELS = {
    "digits": "mlp_small",
    "mnist": "mlp",
    "fashion_mnist": "mlp",
    "cifar10": "cifar10_cnn",
    "cifar100": "all_cnn_c",
}
SELECT_BY = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")
# Fields that speak of images and networks, and those that speak of another problem.
IMAGE_FIELDS = frozenset(
    {"dataset", "data_dir", "model", "model_options", "augment", "l2", "validation"}
    | {"target_accuracy", "label_smoothing", "precision"}
)
PROBLEM_FIELDS = frozenset({"problem", "problem_options", "target"})
PAPER_METHODS = ("momentum", "adam", "m_ssd", "m_svag")
_EVALUATIONS = 10  # per run, unless eval_every says otherwise


class ConfigError(ValueError):
    """A configuration that is refused; one line per field, naming it."""


PositiveInt = Annotated[int, Field(strict=True, gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _distinct(rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if rates is not None and (not rates or len(set(rates)) < len(rates)):
        raise ValueError(f"rates = {list(rates)}; accepted: distinct positive numbers")
    return rates


def _mesh_sizes(value: Any) -> Any:
    """``"runs=4,data=2"`` or a table of the same."""
    if isinstance(value, str):
        return mesh.parse(value)
    if isinstance(value, Mapping):
        try:
            mesh.check_sizes(value)
        except TypeError as error:
            raise ValueError(str(error)) from error
    return value


Rates = Annotated[tuple[PositiveFloat, ...] | None, pydantic.AfterValidator(_distinct)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(_Model):
    """One optimizer of a comparison; in TOML either its name or a table with these fields."""

    method: str
    label: str = ""
    hyperparams: dict[str, Any] = {}
    rates: Rates = None
    space: dict[str, search_space.Dimension] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _known(self) -> "OptimizerConfig":
        method = registry.get_method(self.method)
        for name in self.hyperparams:
            method.check_hyperparameter(name)
        search_space.check(method, self.space, self.hyperparams)
        tuned = {method.tunes.hyperparameter: method.tunes.low} if method.tunes else {}
        try:  # a value that the method refuses is found here and not after hours of training
            if not self.space:  # with one it is tried within the space
                method.factory(**{**tuned, **self.hyperparams})
        except (TypeError, ValueError) as error:
            raise ValueError(f"hyperparams = {self.hyperparams}: {error}") from error
        if not self.label:
            object.__setattr__(self, "label", self.method)
        elif not self.label.strip():
            raise ValueError(f"label = {self.label!r} is blank; accepted: any text")
        if self.rates and (method.tunes is None or method.tunes.hyperparameter in self.hyperparams):
            raise ValueError(
                f"rates = {list(self.rates)}; accepted: none, {self.label} has nothing to tune"
            )
        if self.rates and self.space:
            raise ValueError(f"rates = {list(self.rates)}; accepted: none, beside a space")
        return self


class TuningConfig(_Model):
    """How the tuned hyperparameter (nearly always the learning rate) is chosen.

    ``"search"`` is the protocol of Balles & Hennig, appendix A.2: find the largest stable value,
    then search downwards over ``decades`` at 6, 3 and 1 × 10^m. ``"grid"`` trains every value of
    ``rates`` (default: the method's whole range) with every seed, in one batch of runs; of an
    optimizer with a ``space`` every point of it with ``seeds``, and the best one with fresh seeds.
    So do ``"random"`` and ``"halton"``, at ``samples`` points of the space (default: the method's
    whole range) that ``sample_seed`` determines.
    """

    protocol: Literal["search", "grid", "random", "halton", "none"] = "search"
    rates: Rates = None
    samples: PositiveInt | None = None
    sample_seed: Annotated[int, Field(strict=True, ge=0)] = 0
    decades: Annotated[float, Field(gt=0, le=12)] = 2.0
    seeds: PositiveInt = 1
    select_by: str = ""  # the validation split and the problem's score, where there are both

    @pydantic.model_validator(mode="after")
    def _of_its_protocol(self) -> "TuningConfig":
        if self.samples is None and self.draws_points:
            raise ValueError(
                f"tuning.samples = None; accepted: how many points protocol = {self.protocol!r} "
                "draws for each optimizer"
            )
        if self.samples is not None and not self.draws_points:
            raise ValueError(
                f"tuning.samples = {self.samples}; accepted: with protocol = 'random' or 'halton' "
                f"only, and not with {self.protocol!r}"
            )
        if self.rates and self.draws_points:
            raise ValueError(
                f"tuning.rates = {list(self.rates)}; accepted: none with protocol = "
                f"{self.protocol!r}, which draws values from the optimizer's space"
            )
        return self

    @property
    def draws_points(self) -> bool:
        """Whether the values are drawn, and not given."""
        return self.protocol in {"random", "halton"}


class CompareConfig(_Model):
    """Everything that determines the numbers of one comparison, and where they go.

    It is about a network on images, or with ``problem`` about another problem: a name from
    `catalogue.problems`, or a file ``FILE.py`` or ``FILE.py:FUNCTION``.
    """

    problem: str = ""
    problem_options: dict[str, Any] = {}
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None
    dataset: str = "digits"
    data_dir: Path | None = None
    model: str = ""
    model_options: dict[str, Any] = {}
    optimizers: tuple[OptimizerConfig, ...] = tuple(
        OptimizerConfig(method=name) for name in PAPER_METHODS
    )
    steps: PositiveInt = 1000
    budget: Literal["steps", "gradient_evaluations", "seconds"] = "steps"
    budget_seconds: PositiveFloat | None = None  # of each run
    measure_seconds: bool = False  # of a step; a budget in seconds does
    eval_every: PositiveInt | None = None
    batch_size: PositiveInt = 64
    seeds: PositiveInt = 5
    augment: tuple[Literal["crop", "mirror", "colour"], ...] = ()
    l2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: PositiveInt = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    guard: Annotated[int, Field(strict=True, ge=0)] = 0  # updates left out in a row; 0: no guard
    monitor: bool = False  # record what the methods model
    schedule: ScheduleConfig = ScheduleConfig()
    validation: (
        Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0, lt=1)]
    ) = 0.15
    tuning: TuningConfig = TuningConfig()
    published_defaults: bool = False
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    vectorize: Literal["auto", "vmap", "map"] = "auto"
    mesh: Annotated[dict[str, int], pydantic.BeforeValidator(_mesh_sizes)] = {}
    memory_limit: Annotated[pydantic.ByteSize, Field(gt=0)] | None = None
    microbatch_size: PositiveInt | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 5.0  # between two, at least; 0 is each time
    tensorboard: bool = False  # event files of all runs among the results
    output: Path | None = None

    @pydantic.field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        checks.check_one_of("dataset", value, data.datasets())
        return value

    @pydantic.model_serializer(mode="wrap")
    def _what_applies(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields of the other kind of problem, which would be refused with it."""
        other = IMAGE_FIELDS if self.problem else PROBLEM_FIELDS
        other |= {"steps"} if self.budget == "seconds" else set()
        return {name: value for name, value in handler(self).items() if name not in other}

    def length(self, optimizer: OptimizerConfig) -> budgets.Length:
        """How long a run of an optimizer is; of a budget in seconds, one interval of it."""
        assert self.eval_every is not None  # resolved
        if self.budget == "seconds":
            return budgets.Length(self.eval_every, self.eval_every)
        if self.budget == "steps":
            return budgets.Length(self.steps, self.eval_every)
        cost = registry.get_method(optimizer.method).cost
        return budgets.of_gradient_evaluations(self.steps, self.eval_every, cost)

    def points(self, optimizer: OptimizerConfig) -> list[search_space.Point]:
        """The points of an optimizer's search space; none where no space is tuned over."""
        method, tuning = registry.get_method(optimizer.method), self.tuning
        space: search_space.Space = optimizer.space
        if tuning.draws_points and not space and self.tunes(optimizer):
            assert method.tunes is not None
            space = search_space.default_space(method.tunes)
        if not space:
            return []
        ordered = search_space.ordered(space, method)
        return search_space.points(ordered, tuning.protocol, tuning.samples, tuning.sample_seed)

    def tunes(self, optimizer: OptimizerConfig) -> tuple[str, ...]:
        """The hyperparameters that are tuned: none if they are fixed, or there are none."""
        method = registry.get_method(optimizer.method)
        if self.tuning.protocol == "none":
            return ()
        if optimizer.space:
            return tuple(search_space.ordered(optimizer.space, method))
        if method.tunes is None or method.tunes.hyperparameter in optimizer.hyperparams:
            return ()
        return (method.tunes.hyperparameter,)

    @property
    def first_seed(self) -> int:
        """Of all final runs: the first that no tuning apart from them has seen."""
        apart = self.tuning.protocol == "search" and any(map(self.tunes, self.optimizers))
        return self.tuning.seeds if apart or any(map(self.points, self.optimizers)) else 0

    @property
    def updates(self) -> int:
        """Updates of the optimizer in a run: training steps without gradient accumulation."""
        return self.steps // self.accumulate

    @property
    def features(self) -> features_lib.Features:
        """What surrounds each method, in a run of ``steps`` steps."""
        return self.features_over(self.steps)

    def features_over(self, steps: int) -> features_lib.Features:
        """What surrounds a method in a run of so many steps."""
        constant, updates = self.schedule.is_constant, steps // self.accumulate
        return features_lib.Features(
            schedule=None if constant else self.schedule.factor_at(updates),
            weight_decay=self.weight_decay,
            ema=self.ema,
            guard=self.guard,
            monitor=(self.eval_every or 1) // self.accumulate if self.monitor else 0,
            accumulate=self.accumulate,
            batch_size=self.batch_size,
        )

    @pydantic.model_validator(mode="after")
    def _resolved(self) -> "CompareConfig":
        if self.problem:
            self._check_problem()
        else:
            self._check_images()
        self._check_budget()
        self._resolve_intervals()
        for optimizer in self.optimizers:
            steps = self.length(optimizer).steps
            self.features_over(steps).check(registry.get_method(optimizer.method))
            self._check_protocol(optimizer)
        if self.tuning.protocol == "none":
            for optimizer in self.optimizers:
                method = registry.get_method(optimizer.method)
                registry.check_hyperparams(method, optimizer.hyperparams)
        if not self.optimizers:
            raise ValueError("optimizers = []; accepted: at least one")
        labels = [optimizer.label for optimizer in self.optimizers]
        if len(set(labels)) < len(labels):
            raise ValueError(f"optimizers have the labels {labels}; accepted: distinct labels")
        if (
            not self.problem
            and not self.validation
            and self.tuning.protocol != "none"
            and self.tuning.select_by.startswith("validation")
        ):
            raise ValueError(
                f"validation = 0 leaves nothing to select by {self.tuning.select_by}; "
                "accepted: a positive validation, or tuning.select_by = 'test_accuracy'"
            )
        return self

    def _check_budget(self) -> None:
        in_seconds = self.budget == "seconds"
        if in_seconds and self.budget_seconds is None:
            raise ValueError("budget_seconds = None; accepted: the seconds of a run")
        if self.budget_seconds is not None and not in_seconds:
            raise ValueError(
                f"budget_seconds = {self.budget_seconds:g}; accepted: with budget = 'seconds' only"
            )
        if in_seconds and not self.schedule.is_constant:
            raise ValueError(
                f"schedule.kind = {self.schedule.kind!r}; accepted with budget = 'seconds': a "
                "constant rate, as the number of steps is not known before"
            )
        if self.budget == "gradient_evaluations" and self.accumulate > 1:
            raise ValueError(
                f"accumulate = {self.accumulate}; accepted with budget = 'gradient_evaluations': 1"
            )

    def _check_protocol(self, optimizer: OptimizerConfig) -> None:
        protocol = self.tuning.protocol
        if optimizer.space and protocol in {"search", "none"}:
            raise ValueError(
                f"tuning.protocol = {protocol!r}: {optimizer.label} has a space; accepted with "
                "it: 'grid', 'random' or 'halton'"
            )
        if optimizer.rates and self.tuning.draws_points:
            raise ValueError(
                f"rates = {list(optimizer.rates)} of {optimizer.label}; accepted: none with "
                f"protocol = {protocol!r}, which draws values from the optimizer's space"
            )

    def _check_images(self) -> None:
        for name in sorted(PROBLEM_FIELDS & self.model_fields_set):
            if getattr(self, name) not in (None, "", {}):
                raise ValueError(f"{name} = {getattr(self, name)!r} needs the field problem")
        if not self.model:
            object.__setattr__(self, "model", DEFAULT_MODELS[self.dataset])
        checks.check_one_of("model", self.model, models.models())
        options = models.models()[self.model].accepted_options
        for name, value in self.model_options.items():
            if name not in options:
                near = checks.did_you_mean(name, options)
                raise ValueError(f"model_options.{name} = {value!r}: no such option; {near}")
        select_by = self.tuning.select_by or SELECT_BY[0]
        checks.check_one_of("tuning.select_by", select_by, SELECT_BY)
        tuning = self.tuning.model_copy(update={"select_by": select_by})
        object.__setattr__(self, "tuning", tuning)

    def _check_problem(self) -> None:
        if given := sorted(IMAGE_FIELDS & self.model_fields_set):
            raise ValueError(
                f"{given[0]} = {getattr(self, given[0])!r} does not go with problem = "
                f"{self.problem!r}; accepted: fields that do not speak of images"
            )
        catalogue.check_name(self.problem, self.problem_options)
        if "batch_size" not in self.model_fields_set:
            object.__setattr__(self, "batch_size", 1)

    def _resolve_intervals(self) -> None:
        """Every run is made of whole intervals, and these of whole updates."""
        if self.budget == "seconds":
            self._check_interval_of_seconds()
        elif self.steps % self.accumulate:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of accumulate = {self.accumulate}"
            )
        elif self.eval_every is None:
            most = next(n for n in range(_EVALUATIONS, 0, -1) if self.updates % n == 0)
            object.__setattr__(self, "eval_every", self.steps // most)
        elif self.steps % self.eval_every:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of eval_every = {self.eval_every}"
            )
        if self.eval_every is not None and self.eval_every % self.accumulate:
            raise ValueError(
                f"eval_every = {self.eval_every} is not a multiple of accumulate = "
                f"{self.accumulate}, so that evaluations would fall within an update"
            )

    def _check_interval_of_seconds(self) -> None:
        if "steps" in self.model_fields_set:
            raise ValueError(
                f"steps = {self.steps}; accepted: none with budget = 'seconds', which determines it"
            )
        if self.eval_every is None:
            raise ValueError("eval_every = None; accepted with budget = 'seconds': a number")


def expected_steps(config: CompareConfig, optimizer: OptimizerConfig) -> int:
    """About how many training steps an optimizer will take, for progress bars.

    Under a budget in seconds nobody knows, and it is 0.
    """
    if config.budget == "seconds":
        return 0
    steps, eval_every = config.length(optimizer)
    method = registry.get_method(optimizer.method)
    defaults = config.published_defaults and method.runs_at_published_defaults
    final = steps * config.seeds
    known = final if defaults else 0
    if points := config.points(optimizer):
        return known + final + steps * len(points) * config.tuning.seeds
    if not config.tunes(optimizer) or method.tunes is None:
        return known + final
    rates = optimizer.rates or config.tuning.rates
    if config.tuning.protocol == "grid":
        decades = math.log10(method.tunes.high / method.tunes.low)
        return known + final * (len(rates) if rates else round(3 * decades) + 1)
    tried = len(rates) if rates else round(3 * config.tuning.decades) + 1
    trials = 3 * eval_every  # values found unstable, one interval each
    return known + trials + final + steps * tried * config.tuning.seeds


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> CompareConfig:
    """The configuration of a TOML file (or the default), with overrides by dotted field name.

    Args:
      path: a TOML file, or None for the defaults: the paper's four optimizers on digits.
      overrides: e.g. ``{"steps": 200, "tuning.seeds": 2}``; None values are left out.

    Raises:
      ConfigError: names every refused field, its value and what is accepted.

    Examples:
      >>> load_config(overrides={"steps": 50, "tuning.protocol": "grid"}).tuning.protocol
      'grid'
      >>> load_config(overrides={"stepz": 50})
      Traceback (most recent call last):
      ...
      optgrad.experiments.config.ConfigError: stepz = 50: no such field; did you mean 'steps'?
    """
    tree: dict[str, Any] = {}
    where = ""
    if path is not None:
        where = f"{path}: "
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}cannot be read as TOML: {error}") from error
        _find_problem_beside(tree, Path(path).parent)
    for name, value in (overrides or {}).items():
        if value is not None:
            _set(tree, name.split("."), value)
    try:
        return CompareConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = (where + line for line in _messages(error))
        raise ConfigError("\n".join(lines)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """``"tuning.seeds=2"`` as a field name and a value (TOML, or else a plain string).

    Examples:
      >>> parse_override("tuning.seeds=2"), parse_override("model=mlp")
      (('tuning.seeds', 2), ('model', 'mlp'))
    """
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise ConfigError(f"{text!r} is not an override; accepted: FIELD=VALUE")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    if path[0] == "optimizers" and len(path) > 1:
        names = [optimizer.method for optimizer in CompareConfig().optimizers]
        given = tree.setdefault("optimizers", names)
        if not isinstance(given, list):
            raise ConfigError(f"{'.'.join(path)}: optimizers is not a list")
        tree["optimizers"] = [{"method": o} if isinstance(o, str) else dict(o) for o in given]
        tree, path = _optimizer_of(tree["optimizers"], path), path[2:]
        if not path:
            raise ConfigError("an override of an optimizer names a field of it")
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is not a table")
    tree[path[-1]] = value


def _optimizer_of(given: list[dict[str, Any]], path: list[str]) -> dict[str, Any]:
    """The table of one optimizer: by its label, its method's name, or its number from 0."""
    for key in ("label", "method"):
        for optimizer in given:
            if isinstance(optimizer, dict) and optimizer.get(key) == path[1]:
                return optimizer
    if path[1].isdecimal() and int(path[1]) < len(given):
        return given[int(path[1])]
    known = [str(o.get("label") or o.get("method")) for o in given]
    raise ConfigError(f"{'.'.join(path)}: no such optimizer; {checks.did_you_mean(path[1], known)}")


def _find_problem_beside(tree: dict[str, Any], folder: Path) -> None:
    """A configuration file names a user's problem by its place relative to itself."""
    problem = tree.get("problem")
    if isinstance(problem, str) and (place := user_problems.file_of(problem)):
        path, function = place
        tree["problem"] = f"{folder / path}:{function}"


def _messages(error: pydantic.ValidationError) -> Iterable[str]:
    for item in error.errors():
        # A union adds names of its branches to the path, such as "constrained-int".
        is_unknown = item["type"] == "extra_forbidden"  # then the last part is the user's
        users = len(item["loc"]) - 1 if is_unknown else None
        parts = enumerate(map(str, item["loc"]))
        path = [x for i, x in parts if i == users or not re.search(r"[\[\]()-]", x)]
        field, given = ".".join(path), item["input"]
        if is_unknown:
            fields = _fields(path[:-1])
            near = checks.did_you_mean(path[-1], fields).split(" Accepted")[0]
            yield f"{field} = {given!r}: no such field; {near}"
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            yield text if not field or text.startswith(field) else f"{field}: {text}"
        else:
            yield f"{field} = {given!r}: {item['msg']}"


def _fields(path: list[str]) -> Iterable[str]:
    if path[:1] == ["tuning"]:
        return TuningConfig.model_fields
    if path[:1] == ["schedule"]:
        return ScheduleConfig.model_fields
    if "space" in path:
        return search_space.Interval.model_fields
    if path[:1] == ["optimizers"]:
        return OptimizerConfig.model_fields
    return CompareConfig.model_fields
