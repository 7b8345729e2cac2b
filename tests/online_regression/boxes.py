"""Algorithms 1–7 of Duda, "SGD momentum optimizer with step estimation by online parabola model".

Transcribed line by line from the paper, with its raw averages (s included), from the paper and the
specification and not from the package. They run in extended precision where the machine has it,
so that what the raw form loses by cancellation stays below the tolerance of a comparison.

Mended, as the specification says:

* Algorithm 5 pairs g_t with θ_{t+1}; here ``upd_avg`` comes before the move.
* Algorithm 7 shifts as if the weights summed to 1; here by s·Δ.
* v̂ ← v/‖v‖ flips where the momentum reverses, the averages do not; here v̂·v̂_old ≥ 0.

What the paper has right and is easily lost: in Algorithms 6 and 7 the direction does not contain
the current gradient, and Algorithm 7 measures Δθ along the direction that was in force.

A box is called once per step, ``box(theta, gradient) -> update``, for one vector.
`WRONG_PORTS` change one line each: a comparison that cannot tell them is worth nothing.
"""

from dataclasses import dataclass, field

import numpy as np

LONG = np.longdouble
ZERO = LONG(0)


# --- Algorithm 2 -----------------------------------------------------------------------------


@dataclass
class Averages:
    """(θ̄, ḡ, gθ, θ²; s), and g² for σ_g of Eq. (7)."""

    theta: LONG = ZERO
    g: LONG = ZERO
    g_theta: LONG = ZERO
    theta2: LONG = ZERO
    g2: LONG = ZERO
    s: LONG = ZERO

    def update(self, theta, g, beta):
        """Algorithm 2: avg ← β avg + (1 − β)(θ, g, gθ, θ², 1)."""
        self.theta = beta * self.theta + (1 - beta) * theta
        self.g = beta * self.g + (1 - beta) * g
        self.g_theta = beta * self.g_theta + (1 - beta) * g * theta
        self.theta2 = beta * self.theta2 + (1 - beta) * theta**2
        self.g2 = beta * self.g2 + (1 - beta) * g**2
        self.s = beta * self.s + (1 - beta)

    def shift(self, delta, weight=None):
        """Algorithm 7: all positions measured from an origin moved by Δ; printed with s = 1."""
        s = self.s if weight is None else weight
        self.theta2 = self.theta2 - 2 * self.theta * delta + s * delta**2
        self.g_theta = self.g_theta - self.g * delta
        self.theta = self.theta - s * delta

    @property
    def covariance(self):
        return (self.s * self.g_theta - self.g * self.theta) / self.s**2

    @property
    def variance(self):
        return (self.s * self.theta2 - self.theta**2) / self.s**2

    @property
    def gradient_variance(self):
        return (self.s * self.g2 - self.g**2) / self.s**2

    @property
    def mean_position(self):
        return self.theta / self.s

    @property
    def mean_gradient(self):
        return self.g / self.s

    @property
    def curvature(self):
        """λ of Eq. (2)."""
        return (self.s * self.g_theta - self.g * self.theta) / (
            self.s * self.theta2 - self.theta**2
        )

    @property
    def minimum(self):
        """p of Eq. (2)."""
        return (self.curvature * self.theta - self.g) / (self.s * self.curvature)


# --- Algorithms 3 and 4 ----------------------------------------------------------------------


@dataclass
class Options:
    """Algorithm 4, and what the text offers besides.

    ``paper``: no bound on 1/|λ|, no clip in standard deviations, no fallback where the positions
    have no spread, momentum steps −ηv.
    """

    eta: float
    alpha: float = 0.5
    beta: float = 0.9
    gamma: float = 0.99
    epsilon: float = 0.3
    clip_sigmas: float | None = None
    lr_max: float | None = None
    step: str = "regression"
    negative_curvature: str = "reverse"
    warmup_steps: int = 10
    stage_steps: int = 1
    paper: bool = False

    def __post_init__(self):
        guard = np.inf if self.paper else None
        self.clip_sigmas = next(x for x in (self.clip_sigmas, guard, 10.0) if x is not None)
        self.lr_max = next(x for x in (self.lr_max, guard, 100.0) if x is not None)
        reals = ("eta", "alpha", "beta", "gamma", "epsilon", "clip_sigmas", "lr_max")
        for name in reals:
            setattr(self, name, LONG(getattr(self, name)))

    def clip(self, x, avg):
        """C(x) = sign(x) min(|x|, ε); robust: ε or κ standard deviations of the positions."""
        limit = self.epsilon
        if np.isfinite(self.clip_sigmas):
            limit = min(limit, self.clip_sigmas * np.sqrt(max(avg.variance, ZERO)))
        return np.sign(x) * min(abs(x), limit)

    def along(self, avg, theta, g):
        """Signed length of the step along v̂, "proper step" of Algorithm 3."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if not self.paper and not avg.variance > 1e-300:
                return -self.eta * g
            step = self._along(avg, theta, g)
        if not self.paper and not np.isfinite(step):
            return -self.eta * g
        return step

    def _along(self, avg, theta, g):
        if self.step == "sigma_ratio":  # Eq. (9); always downhill
            ratio = np.sqrt(avg.variance / avg.gradient_variance)
            return -self.alpha * self.clip(min(ratio, self.lr_max) * g, avg)
        slope = avg.curvature
        if self.negative_curvature == "gradient_descent" and slope < 0:
            return -self.eta * g
        if self.negative_curvature == "tanh":
            # tanh(λ/λ₀) in place of the sign, λ₀ = 1/lr_max; the paper's has no scale.
            scale = LONG(1) if self.paper else self.lr_max
            start, gradient = (
                (avg.mean_position, avg.mean_gradient) if self.step == "regression" else (theta, g)
            )
            p = start - gradient / slope  # Eqs. (5), (6)
            product = np.tanh(slope * scale) * (p - theta)
            return self.alpha * self.clip(product if slope != 0 else -gradient * scale, avg)
        sign = LONG(-1) if slope < 0 else LONG(1)  # downhill where λ = 0 and p is infinite
        bounded = sign * max(abs(slope), 1 / self.lr_max)  # λ, no nearer to 0 than 1/lr_max
        if self.step == "last_point":
            p = theta - g / bounded  # Eq. (6)
        elif np.isfinite(self.lr_max):
            p = avg.mean_position - avg.mean_gradient / bounded  # Eq. (5)
        else:
            p = avg.minimum  # Eq. (2)
        return self.alpha * sign * self.clip(p - theta, avg)  # Eq. (4)


def step(avg, theta, gradient, v_hat, options):
    """Algorithm 3, "optional gradient descent in remaining directions" included."""
    g = gradient @ v_hat
    return options.along(avg, theta, g) * v_hat - options.eta * (gradient - g * v_hat)


def unit(v, like=None):
    """v/‖v‖; what it replaces where v = 0, and never against it."""
    norm = np.sqrt(v @ v)
    if norm == 0:
        return like
    return -v / norm if like is not None and v @ like < 0 else v / norm


# --- Algorithms 5, 1, 6, 7, one gradient per call --------------------------


@dataclass
class Box:
    """Algorithm 5, 2m calls; then ``stage`` of a method."""

    options: Options
    v: np.ndarray = None
    v_hat: np.ndarray = None
    avg: Averages = field(default_factory=Averages)
    t: int = 0
    direction: np.ndarray = None  # along which the last step was modelled

    def __call__(self, theta, gradient):
        theta, gradient = np.asarray(theta, LONG), np.asarray(gradient, LONG)
        if self.t == 0:
            self.v = np.zeros_like(theta)
            self.v_hat = np.zeros_like(theta)
            self.start(theta)
        m = self.options.warmup_steps
        update = self.warmup(theta, gradient) if self.t < 2 * m else self.stage(theta, gradient)
        self.t += 1
        return update

    def start(self, theta):
        pass

    def add_momentum(self, gradient):
        self.v = self.options.gamma * self.v + gradient

    def warmup(self, theta, gradient):
        o, m = self.options, self.options.warmup_steps
        self.add_momentum(gradient)
        if self.t >= m:
            self.avg.update(theta @ self.v_hat, gradient @ self.v_hat, o.beta)
        if self.t == m - 1:
            self.v_hat = unit(self.v, like=self.v_hat)
        if o.paper:
            return -o.eta * self.v
        return -o.eta * self.v * (1 - o.gamma) / (1 - o.gamma ** (self.t + 1))

    def stage(self, theta, gradient):
        raise NotImplementedError

    @property
    def stage_step(self):
        """Which step of the inner loop this is, from 0."""
        return (self.t - 2 * self.options.warmup_steps) % self.options.stage_steps


class Ogr1d(Box):
    """Algorithm 1."""

    def stage(self, theta, gradient):
        self.add_momentum(gradient)
        x = theta @ self.v_hat
        self.avg.update(x, gradient @ self.v_hat, self.options.beta)
        update = step(self.avg, x, gradient, self.v_hat, self.options)
        self.direction, self.v_hat = self.v_hat, unit(self.v, like=self.v_hat)
        return update


class Ogr1ds(Box):
    """Algorithm 6."""

    def stage(self, theta, gradient):
        beta = self.options.beta
        if self.stage_step == 0:
            self.w_hat, self.v_hat = self.v_hat, unit(self.v, like=self.v_hat)
            self.avg_w, self.avg = self.avg, Averages()
        self.add_momentum(gradient)
        self.avg_w.update(theta @ self.w_hat, gradient @ self.w_hat, beta)
        self.avg.update(theta @ self.v_hat, gradient @ self.v_hat, beta)
        self.direction = self.w_hat
        return step(self.avg_w, theta @ self.w_hat, gradient, self.w_hat, self.options)


class Ogr1dc(Box):
    """Algorithm 7; θ there is the position relative to c."""

    def start(self, theta):
        self.c = np.zeros_like(theta)

    def turn(self, theta, gradient):
        del gradient
        delta = (theta - self.c) @ self.v_hat  # along the direction in force until now
        self.v_hat = unit(self.v, like=self.v_hat)
        self.avg.shift(delta)
        self.c = theta

    def stage(self, theta, gradient):
        if self.stage_step == 0:
            self.turn(theta, gradient)
        self.add_momentum(gradient)
        x = (theta - self.c) @ self.v_hat
        self.avg.update(x, gradient @ self.v_hat, self.options.beta)
        self.direction = self.v_hat
        return step(self.avg, x, gradient, self.v_hat, self.options)


BOXES = {"ogr1d": Ogr1d, "ogr1ds": Ogr1ds, "ogr1dc": Ogr1dc}


# --- what must not pass ----------------------------------------------------------------------


def _flipping(box):
    """Erratum: the new direction may point against the old one (not Ogr1ds: its sets are new)."""

    class Flipping(box):
        def stage(self, theta, gradient):
            before = self.v_hat
            update = super().stage(theta, gradient)
            if self.v_hat is not before:
                self.v_hat = unit(self.v)
            return update

    return Flipping


class _FlippingCentred(Ogr1dc):
    def turn(self, theta, gradient):
        super().turn(theta, gradient)
        self.v_hat = unit(self.v)


class _PrintedShift(Ogr1dc):
    """Erratum: Σw taken as 1."""

    def turn(self, theta, gradient):
        delta = (theta - self.c) @ self.v_hat
        self.v_hat = unit(self.v, like=self.v_hat)
        self.avg.shift(delta, weight=LONG(1))
        self.c = theta


class _CurrentGradient(Ogr1dc):
    """The direction contains the gradient that is sampled along it."""

    def turn(self, theta, gradient):
        delta = (theta - self.c) @ self.v_hat
        self.v_hat = unit(self.options.gamma * self.v + gradient, like=self.v_hat)
        self.avg.shift(delta)
        self.c = theta


class _NewDirectionShift(Ogr1dc):
    """Δθ along the new direction."""

    def turn(self, theta, gradient):
        del gradient
        self.v_hat = unit(self.v, like=self.v_hat)
        self.avg.shift((theta - self.c) @ self.v_hat)
        self.c = theta


class _OldDirections(Ogr1ds):
    """Steps along the new direction instead of the one whose statistics are complete."""

    def stage(self, theta, gradient):
        super().stage(theta, gradient)
        return step(self.avg_w, theta @ self.w_hat, gradient, self.v_hat, self.options)


class _LateSwitch(Ogr1ds):
    """The stage counted from another step."""

    @property
    def stage_step(self):
        return (self.t - 2 * self.options.warmup_steps + 1) % self.options.stage_steps

    def stage(self, theta, gradient):
        if self.t == 2 * self.options.warmup_steps:
            self.w_hat, self.avg_w = self.v_hat, self.avg
            self.v_hat, self.avg = unit(self.v, like=self.v_hat), Averages()
        return super().stage(theta, gradient)


def _late_pairs(box):
    """Erratum: the warm-up pairs a gradient with the position after the move."""

    class LatePairs(box):
        def warmup(self, theta, gradient):
            if self.t > self.options.warmup_steps:
                self.avg.update(theta @ self.v_hat, self.last @ self.v_hat, self.options.beta)
            kept, self.avg = self.avg, Averages()
            update = super().warmup(theta, gradient)
            self.avg, self.last = kept, gradient
            return update

    return LatePairs


WRONG_PORTS = {
    "ogr1d": {"flips": _flipping(Ogr1d), "pairs g_t with θ_{t+1}": _late_pairs(Ogr1d)},
    "ogr1ds": {
        "steps along v̂": _OldDirections,
        "switches late": _LateSwitch,
        "pairs g_t with θ_{t+1}": _late_pairs(Ogr1ds),
    },
    "ogr1dc": {
        "flips": _FlippingCentred,
        "shift without s": _PrintedShift,
        "v̂ of the current gradient": _CurrentGradient,
        "Δθ along the new v̂": _NewDirectionShift,
        "pairs g_t with θ_{t+1}": _late_pairs(Ogr1dc),
    },
}
