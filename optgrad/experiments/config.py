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
from optgrad.experiments import catalogue, data, mesh, models, user_problems
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

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _known(self) -> "OptimizerConfig":
        method = registry.get_method(self.method)
        for name in self.hyperparams:
            method.check_hyperparameter(name)
        tuned = {method.tunes.hyperparameter: method.tunes.low} if method.tunes else {}
        try:  # a value that the method refuses is found here and not after hours of training
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
        return self


class TuningConfig(_Model):
    """How the tuned hyperparameter (nearly always the learning rate) is chosen.

    ``"search"`` is the protocol of Balles & Hennig, appendix A.2: find the largest stable value,
    then search downwards over ``decades`` at 6, 3 and 1 × 10^m. ``"grid"`` trains every value of
    ``rates`` (default: the method's whole range) with every seed, in one batch of runs.
    """

    protocol: Literal["search", "grid", "none"] = "search"
    rates: Rates = None
    decades: Annotated[float, Field(gt=0, le=12)] = 2.0
    seeds: PositiveInt = 1
    select_by: str = ""  # the validation split and the problem's score, where there are both


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
    schedule: ScheduleConfig = ScheduleConfig()
    validation: (
        Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0, lt=1)]
    ) = 0.15
    tuning: TuningConfig = TuningConfig()
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    vectorize: Literal["auto", "vmap", "map"] = "auto"
    mesh: Annotated[dict[str, int], pydantic.BeforeValidator(_mesh_sizes)] = {}
    memory_limit: Annotated[pydantic.ByteSize, Field(gt=0)] | None = None
    microbatch_size: PositiveInt | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 5.0  # between two, at least; 0 is each time
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
        return {name: value for name, value in handler(self).items() if name not in other}

    @property
    def updates(self) -> int:
        """Updates of the optimizer in a run: training steps without gradient accumulation."""
        return self.steps // self.accumulate

    @property
    def features(self) -> features_lib.Features:
        """What surrounds each method."""
        schedule = None if self.schedule.is_constant else self.schedule.factor_at(self.updates)
        return features_lib.Features(
            schedule=schedule,
            weight_decay=self.weight_decay,
            ema=self.ema,
            accumulate=self.accumulate,
            batch_size=self.batch_size,
        )

    @pydantic.model_validator(mode="after")
    def _resolved(self) -> "CompareConfig":
        if self.problem:
            self._check_problem()
        else:
            self._check_images()
        self._resolve_intervals()
        for optimizer in self.optimizers:
            self.features.check(registry.get_method(optimizer.method))
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
        if self.steps % self.accumulate:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of accumulate = {self.accumulate}"
            )
        if self.eval_every is None:
            most = next(n for n in range(_EVALUATIONS, 0, -1) if self.updates % n == 0)
            object.__setattr__(self, "eval_every", self.steps // most)
        elif self.steps % self.eval_every:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of eval_every = {self.eval_every}"
            )
        elif self.eval_every % self.accumulate:
            raise ValueError(
                f"eval_every = {self.eval_every} is not a multiple of accumulate = "
                f"{self.accumulate}, so that evaluations would fall within an update"
            )


def expected_steps(config: CompareConfig, optimizer: OptimizerConfig) -> int:
    """About how many training steps an optimizer will take, for progress bars."""
    tunable = registry.get_method(optimizer.method).tunes
    fixed = tunable is None or tunable.hyperparameter in optimizer.hyperparams
    if config.tuning.protocol == "none" or tunable is None or fixed:
        return config.steps * config.seeds
    rates = optimizer.rates or config.tuning.rates
    if config.tuning.protocol == "grid":
        decades = math.log10(tunable.high / tunable.low)
        return config.steps * config.seeds * (len(rates) if rates else round(3 * decades) + 1)
    tried = len(rates) if rates else round(3 * config.tuning.decades) + 1
    trials = 3 * (config.eval_every or 0)  # values found unstable, one interval each
    return trials + config.steps * (tried * config.tuning.seeds + config.seeds)


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
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is not a table")
    tree[path[-1]] = value


def _find_problem_beside(tree: dict[str, Any], folder: Path) -> None:
    """A configuration file names a user's problem by its place relative to itself."""
    problem = tree.get("problem")
    if isinstance(problem, str) and (place := user_problems.file_of(problem)):
        path, function = place
        tree["problem"] = f"{folder / path}:{function}"


def _messages(error: pydantic.ValidationError) -> Iterable[str]:
    for item in error.errors():
        # A union adds names of its branches to the path, such as "constrained-int".
        path = [str(part) for part in item["loc"] if not re.search(r"[\[\]()-]", str(part))]
        field, given = ".".join(path), item["input"]
        if item["type"] == "extra_forbidden":
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
    if path[:1] == ["optimizers"]:
        return OptimizerConfig.model_fields
    return CompareConfig.model_fields
