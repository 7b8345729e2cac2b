"""Learning-rate schedules: a factor of the tuned learning rate, as a function of the update."""

import itertools
from typing import Annotated, Literal

import optax
import pydantic
from pydantic import BaseModel, ConfigDict, Field

Updates = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_FACTOR = 0.1


class ScheduleConfig(BaseModel):
    r"""How the learning rate changes over a run; the rate that is tuned is its peak.

    .. math::
      \alpha_t = \alpha\,\min\!\Big(1, \frac{t + 1}{w}\Big)\,s_t, \qquad
      s_t = \begin{cases}
        1 & \text{constant} \\
        f^{\,\#\{a \in \text{at}:\ a \le t\}} & \text{step} \\
        e + (1 - e)\,\tfrac12\Big(1 + \cos\pi\frac{t - w}{T - w}\Big),\ t \ge w & \text{cosine}
      \end{cases}

    for the optimizer's update t = 0, …, T − 1. With gradient accumulation an update takes several
    training steps, and t, w, T and ``at`` still count updates.

    Attributes:
      kind: ``"constant"``, ``"step"`` or ``"cosine"``.
      at: a, updates before which the step decay multiplies the rate, ascending.
      factor: f, by what.
      warmup: w, updates of linear warm-up; the first one already moves, by α/w.
      final: e, the end of the cosine decay relative to the peak.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["constant", "step", "cosine"] = "constant"
    at: tuple[Updates, ...] = ()
    factor: Annotated[float, Field(gt=0, le=1)] = _FACTOR
    warmup: Updates = 0
    final: Fraction = 0.0

    @pydantic.model_validator(mode="after")
    def _of_its_kind(self) -> "ScheduleConfig":
        if self.kind == "step" and not self.at:
            raise ValueError("schedule.at = []; accepted: the updates at which the rate decays")
        if self.kind != "step" and (self.at or self.factor != _FACTOR):
            given = f"at = {list(self.at)}" if self.at else f"factor = {self.factor}"
            raise ValueError(f"schedule.{given}; accepted: with kind = 'step' only")
        if self.kind != "cosine" and self.final:
            raise ValueError(f"schedule.final = {self.final}; accepted: with kind = 'cosine' only")
        return self

    @property
    def is_constant(self) -> bool:
        """Whether the factor is 1 throughout."""
        return self.kind == "constant" and self.warmup <= 1

    def check(self, updates: int) -> None:
        """Raises unless the schedule fits into a run of so many updates."""
        if self.warmup >= updates and not self.is_constant:
            raise ValueError(
                f"schedule.warmup = {self.warmup}; accepted: fewer than the run's {updates} updates"
            )
        edges = [max(self.warmup - 1, 0), *self.at, updates]
        if any(later <= earlier for earlier, later in itertools.pairwise(edges)):
            raise ValueError(
                f"schedule.at = {list(self.at)}; accepted: ascending, after the warm-up of "
                f"{self.warmup} and before the end of the run's {updates} updates"
            )

    def factor_at(self, updates: int) -> optax.Schedule:
        """The factor of the learning rate, as a function of the update's number.

        Args:
          updates: T, of the whole run.

        Examples:
          >>> factor = ScheduleConfig(kind="step", at=(3, 5), warmup=2).factor_at(6)
          >>> print([f"{float(factor(t)):g}" for t in range(6)])
          ['0.5', '1', '1', '0.1', '0.1', '0.01']
        """
        self.check(updates)
        if self.kind == "cosine":
            main = optax.cosine_decay_schedule(1.0, updates - self.warmup, alpha=self.final)
        elif self.kind == "step":
            boundaries = {at - self.warmup: self.factor for at in self.at}
            main = optax.piecewise_constant_schedule(1.0, boundaries)
        else:
            main = optax.constant_schedule(1.0)
        if not self.warmup:
            return main
        warmup = optax.linear_schedule(1 / self.warmup, 1.0, self.warmup - 1)
        return optax.join_schedules([warmup, main], [self.warmup])
