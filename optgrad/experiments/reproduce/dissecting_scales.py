"""How much of Balles & Hennig's experiments is run: the paper's budget, or what two cores do."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optgrad.experiments.reproduce import Settings

_AUGMENTED = ("crop", "mirror", "colour")
_DECAY = (2 / 3, 5 / 6)  # the paper's 40k and 50k of 60k steps


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the paper's test problems, A.1, and its budget.

    Attributes:
      title: for headings.
      dataset: name for `optgrad.experiments.data.load`.
      model: name for `optgrad.experiments.models.create_model`.
      steps: of a run.
      batch_size: examples per step.
      model_options: what makes the network smaller than the paper's.
      augment: of the training images.
      decay_at: fractions of the steps after which the learning rate is divided by ten.
      l2: strength of the regularisation; the paper prints none.
      seeds: replications of the best learning rate.
      decades: how far below the largest stable rate the tuning goes.
      evaluations: per run.
      test_images: how many of the test set are evaluated; None: all.
      classes: how many classes the data is restricted to; None: all.
      microbatch_size: per-example gradients held at once by the mini-batch versions.
      differs: what is not the paper's, in words.
    """

    title: str
    dataset: str
    model: str
    steps: int
    batch_size: int
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augment: tuple[str, ...] = ()
    decay_at: tuple[float, ...] = ()
    l2: float = 0.0
    seeds: int = 10
    decades: float = 2.0
    evaluations: int = 20
    test_images: int | None = None
    classes: int | None = None
    microbatch_size: int | None = None
    differs: str = ""

    @property
    def eval_every(self) -> int:
        """Steps from one evaluation to the next."""
        return self.steps // self.evaluations

    @property
    def runs(self) -> int:
        """Full runs of one method: the tuning's and the replications."""
        return round(3 * self.decades) + 1 + self.seeds


@dataclasses.dataclass(frozen=True)
class Scale:
    """Everything that a scale determines.

    Attributes:
      name: ``"paper"``, ``"cpu"`` or ``"quick"``.
      networks: test problem -> its budget.
      dimension: of the quadratics of figure 2 and theorem 1.
      quadratic_seeds: problems of each kind.
      quadratic_steps: steps on each.
      samples: of the simulations of one step and of figure 5.
      theorem_steps: steps for theorem 1.
      theorem_runs: runs whose mean is E[f − f*].
    """

    name: str
    networks: Mapping[str, Network]
    dimension: int = 100
    quadratic_seeds: int = 20
    quadratic_steps: int = 100
    samples: int = 20_000
    theorem_steps: int = 100_000
    theorem_runs: int = 10


_MNIST = Network("MNIST, MLP 1000-500-100", "mnist", "mlp", 20_000, 128, l2=1e-4)
_CIFAR10 = Network(
    "CIFAR-10, three convolutions",
    "cifar10",
    "cifar10_cnn",
    20_000,
    256,
    augment=_AUGMENTED,
    l2=2e-3,
)
_CIFAR100 = Network(
    "CIFAR-100, All-CNN-C", "cifar100", "all_cnn_c", 60_000, 256,
    augment=_AUGMENTED, decay_at=_DECAY, l2=5e-4,
)  # fmt: skip

PAPER = Scale(
    "paper",
    {
        "mnist": dataclasses.replace(_MNIST, microbatch_size=None),
        "cifar10": dataclasses.replace(_CIFAR10, microbatch_size=32),
        "cifar100": dataclasses.replace(_CIFAR100, microbatch_size=32),
    },
)
CPU = Scale(
    "cpu",
    {
        "mnist": dataclasses.replace(
            _MNIST, steps=420, seeds=5, evaluations=6, test_images=5000,
            differs="420 steps of 20,000, five seeds",
        ),
        "cifar10": dataclasses.replace(
            _CIFAR10, steps=120, batch_size=32, seeds=5, evaluations=4,
            test_images=1000, model_options={"channels": (16, 24, 32), "hidden": (128, 64)},
            differs="a quarter of the channels and units, batches of 32 not 256, 120 steps of "
            "20,000, five seeds",
        ),
        "cifar100": dataclasses.replace(
            _CIFAR100, steps=200, batch_size=32, seeds=5, evaluations=4,
            test_images=1000, classes=10, model_options={"width": 8},
            differs="the first ten classes alone, a twelfth of the channels, batches of 32 not "
            "256, 200 steps of 60,000, five seeds",
        ),
    },
)  # fmt: skip
_TINY: Mapping[str, Any] = {
    "steps": 24, "batch_size": 16, "seeds": 2, "decades": 0.1, "evaluations": 3, "test_images": 20
}  # fmt: skip
QUICK = Scale(
    "quick",
    {
        "mnist": dataclasses.replace(_MNIST, **_TINY, model_options={"hidden": (8,)}),
        "cifar10": dataclasses.replace(
            _CIFAR10, **_TINY, model_options={"channels": (2, 2, 2), "hidden": (4, 4)}
        ),
        "cifar100": dataclasses.replace(_CIFAR100, **_TINY, model_options={"width": 2}),
    },
    dimension=10,
    quadratic_seeds=3,
    quadratic_steps=10,
    samples=500,
    theorem_steps=1000,
    theorem_runs=4,
)


def scale_of(settings: Settings) -> Scale:
    """What the settings ask for."""
    if settings.quick:
        return QUICK
    return {"paper": PAPER, "cpu": CPU}[settings.scale]
