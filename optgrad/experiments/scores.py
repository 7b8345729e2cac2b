"""By what the runs of a problem are judged."""

import dataclasses

import numpy as np
import numpy.typing as npt

_ROUNDING = 1e-6  # relative, of a float32 quotient
_SHARE = 0.99  # of the way from the start to the best result: there, unless a target is given


@dataclasses.dataclass(frozen=True)
class Score:
    """The metric by which runs are compared, and which of its values are good.

    Attributes:
      metric: a key of what ``Problem.evaluate`` returns.
      larger_is_better: as of an accuracy; otherwise smaller, as of a loss.
      in_percent: whether it is a fraction that tables give in percent; others have four digits,
        whatever their size, and logarithmic axes.
      is_exact: whether it is the objective itself and no estimate from some test examples: then
        choosing a learning rate by it leaks nothing.

    Examples:
      >>> ACCURACY.name, ACCURACY.heading, LOSS.heading
      ('test_accuracy', 'test accuracy [%]', 'test loss')
    """

    metric: str
    larger_is_better: bool = False
    in_percent: bool = False
    is_exact: bool = False

    @property
    def name(self) -> str:
        """Its column among the metrics of a run."""
        return f"test_{self.metric}"

    @property
    def title(self) -> str:
        """In words."""
        return self.name.replace("_", " ")

    @property
    def heading(self) -> str:
        """In words, with the unit."""
        return self.title + (" [%]" if self.in_percent else "")

    def text(self, value: float) -> str:
        """A value for a table.

        Examples:
          >>> ACCURACY.text(0.9744), LOSS.text(0.000123456)
          ('97.44', '0.0001235')
        """
        return f"{100 * value:.2f}" if self.in_percent else f"{value:.4g}"

    def sign(self, column: str) -> float:
        """1 if larger values of a column of metrics are better, −1 if smaller ones are.

        Examples:
          >>> ACCURACY.sign("validation_accuracy"), ACCURACY.sign("validation_loss")
          (1.0, -1.0)
        """
        _, _, metric = column.partition("_")
        return 1.0 if self.larger_is_better and metric == self.metric else -1.0

    def reaches(self, values: npt.ArrayLike, target: float) -> npt.NDArray[np.bool_]:
        """Which values are at least as good as a target, but for the rounding of float32.

        Examples:
          >>> ACCURACY.reaches(np.float32(950) / np.float32(1000), 0.95).item()
          True
        """
        found, rounding = np.asarray(values, float), _ROUNDING * abs(target)
        if self.larger_is_better:
            return np.asarray(found >= target - rounding)
        return np.asarray(found <= target + rounding)

    def default_target(self, start: float, best: float) -> float:
        """What counts as "there": 99 % of an accuracy; of anything else, 99 % of the way to it.

        Examples:
          >>> [round(x.default_target(100.0, 2.0), 4) for x in (ACCURACY, LOSS)]
          [1.98, 2.98]
        """
        if self.in_percent:
            return _SHARE * best
        return _SHARE * best + (1 - _SHARE) * start


ACCURACY = Score("accuracy", larger_is_better=True, in_percent=True)
LOSS = Score("loss")
