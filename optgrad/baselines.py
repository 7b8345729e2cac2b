"""Records for the first-order methods that optax already has, the peers of every comparison.

Where the survey slides write an update differently from optax's defaults, the factory here has the
slides' arguments as defaults and its docstring says so.
"""

from typing import Any

import optax

from optgrad.core import shards
from optgrad.registry import Method, Tunable, register

SLIDES = 'J. Duda, "Improving convergence of stochastic gradient descent" (slides)'
SIGN_SGD = 'J. Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", 2018'


def sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Plain stochastic gradient descent, `optax.sgd` without momentum."""
    return optax.sgd(learning_rate)


def momentum(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum, m ← μm + g; the slides average instead: see `momentum_average`."""
    return optax.sgd(learning_rate, momentum=momentum)


def momentum_average(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Momentum as the slides write it, v ← γv + (1 − γ)g.

    The same steps as `momentum` with the rate (1 − γ)η: its best rate is 1/(1 − γ) larger. (optax's
    own `optax.ema` divides by 1 − γᵗ unless it is told not to.)
    """
    average = optax.ema(momentum, debias=False)
    return optax.chain(average, optax.scale_by_learning_rate(learning_rate))


def nesterov(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Nesterov's accelerated gradient; its parameters are the slides' look-ahead point θ − γv.

    The slides' θ is ``params`` + ηγ·trace, with the trace of the state. Exact for a constant rate:
    the slides have it within the velocity.
    """
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)


def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adagrad` with the slides' empty accumulator (optax starts at 0.1)."""
    return optax.adagrad(learning_rate, initial_accumulator_value, eps)


def adadelta(
    learning_rate: optax.ScalarOrSchedule = 1.0, rho: float = 0.9, eps: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """`optax.adadelta` with the slides' rate of 1 (optax's default of None ascends)."""
    return optax.adadelta(learning_rate, rho, eps)


def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.amsgrad`, without bias correction as in the slides."""
    return optax.amsgrad(
        learning_rate,
        b1,
        b2,
        eps,
        bias_correction_mu=bias_correction,
        bias_correction_nu=bias_correction,
    )


def lbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    max_linesearch_steps: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """`optax.lbfgs` with its zoom line search: needs value, grad and value_fn of one batch."""
    search = optax.scale_by_zoom_linesearch(
        max_linesearch_steps=max_linesearch_steps, initial_guess_strategy="one"
    )
    optimizer = optax.lbfgs(learning_rate, memory_size, scale_init_precond, search)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        shards.require_whole(updates, "optax.lbfgs")
        found: tuple[optax.Updates, optax.OptState] = optimizer.update(
            updates, state, params, **extra
        )
        return found

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def polyak_sgd(
    max_learning_rate: float = 1.0,
    scaling: optax.ScalarOrSchedule = 1.0,
    f_min: float = 0.0,
    eps: float = 0.0,
    variant: str = "sps",
) -> optax.GradientTransformationExtraArgs:
    """`optax.polyak_sgd`, as it is: the step (f − f_min)/‖g‖², capped; needs value.

    Its ``scaling`` s multiplies the gradient before that is squared: the step is
    min((f − f_min)/(s‖g‖²), s·γ_max), so that s = 2 halves it wherever the cap is inactive, where
    optax's documentation says s·min((f − f_min)/‖g‖², γ_max). Use `optgrad.polyak`, whose
    ``scaling`` is that. (optax also returns 0 where ‖g‖ < 1.5e-8, and with ``variant="sps"`` goes
    uphill where f < f_min.)
    """
    return optax.polyak_sgd(max_learning_rate, scaling, f_min, eps, variant)


def _rate(low: float, high: float) -> Tunable:
    return Tunable("learning_rate", low, high)


_ADAM_STATIC = ("mu_dtype", "nesterov")
_AVERAGES = "averages, by low_precision_state: of any decay"

for _method in (
    Method(
        name="sgd",
        factory=sgd,
        scale_by=None,
        family="baselines",
        title="Stochastic gradient descent",
        reference=SLIDES,
        equation="θ ← θ − ηg",
        tunes=_rate(1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.1},
        state_size=0,
    ),
    Method(
        name="momentum",
        factory=momentum,
        scale_by=None,
        family="baselines",
        title="SGD with momentum (M-SGD)",
        reference=SLIDES,
        equation="m ← μm + g; θ ← θ − ηm",
        tunes=_rate(1e-5, 1e0),
        test_hyperparams={"learning_rate": 0.02},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="momentum_average",
        factory=momentum_average,
        scale_by=None,
        family="baselines",
        title="SGD with averaged momentum",
        reference=SLIDES,
        equation="v ← γv + (1−γ)g; θ ← θ − ηv",
        tunes=_rate(1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.2},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="nesterov",
        factory=nesterov,
        scale_by=None,
        family="baselines",
        title="Nesterov's accelerated gradient (NAG)",
        reference=SLIDES,
        equation="m ← μm + g; θ ← θ − η(μm + g)",
        tunes=_rate(1e-5, 1e0),
        test_hyperparams={"learning_rate": 0.02},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="adagrad",
        factory=adagrad,
        scale_by=optax.scale_by_rss,
        family="baselines",
        title="Adagrad",
        reference=SLIDES,
        equation="G ← G + g²; θ ← θ − η g/√(G + ε)",
        tunes=_rate(1e-4, 1e1),
        test_hyperparams={"learning_rate": 0.3},
        state_size=1,
        low_precision="the sum of squares, by low_precision_state; to nearest it stops growing",
    ),
    Method(
        name="rmsprop",
        factory=optax.rmsprop,
        scale_by=optax.scale_by_rms,
        family="baselines",
        title="RMSprop",
        reference=SLIDES,
        equation="G ← γG + (1−γ)g²; θ ← θ − η g/√(G + ε)",
        static_args=("eps_in_sqrt", "centered", "nesterov", "bias_correction"),
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="adadelta",
        factory=adadelta,
        scale_by=optax.scale_by_adadelta,
        family="baselines",
        title="Adadelta",
        reference=SLIDES,
        equation="θ ← θ − √(Δ + ε)/√(G + ε)·g, averages G of g² and Δ of the squared steps",
        needs=frozenset({"params"}),
        tunes=_rate(1e-2, 1e2),
        test_hyperparams={"learning_rate": 1.0, "eps": 3e-4},
        state_size=2,
        low_precision=_AVERAGES,
    ),
    Method(
        name="adam",
        factory=optax.adam,
        scale_by=optax.scale_by_adam,
        family="baselines",
        title="Adam",
        reference=SLIDES,
        equation="θ ← θ − η m̂/(√v̂ + ε), bias-corrected averages m̂ of g and v̂ of g²",
        static_args=_ADAM_STATIC,
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.02},
        state_size=2,
        published={"learning_rate": 1e-3},  # D. P. Kingma and J. Ba, 2015, Algorithm 1
        low_precision=_AVERAGES,
    ),
    Method(
        name="adamw",
        factory=optax.adamw,
        scale_by=optax.scale_by_adam,
        family="baselines",
        title="AdamW",
        reference='I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019',
        equation="θ ← θ − η(m̂/(√v̂ + ε) + λθ)",
        needs=frozenset({"params"}),
        static_args=(*_ADAM_STATIC, "mask"),
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.02},
        state_size=2,
        low_precision=_AVERAGES,
    ),
    Method(
        name="adamax",
        factory=optax.adamax,
        scale_by=optax.scale_by_adamax,
        family="baselines",
        title="AdaMax",
        reference=SLIDES,
        equation="u ← max(β₂u, |g|); θ ← θ − η m̂/u",
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.02},
        state_size=2,
        published={"learning_rate": 2e-3},  # D. P. Kingma and J. Ba, 2015, Algorithm 2
        low_precision=_AVERAGES,
    ),
    Method(
        name="nadam",
        factory=optax.nadam,
        scale_by=None,
        family="baselines",
        title="Nadam",
        reference=SLIDES,
        equation="Adam with m̂ one step ahead: β₁m/(1−β₁ᵗ⁺¹) + (1−β₁)g/(1−β₁ᵗ) (Dozat)",
        static_args=_ADAM_STATIC,
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.02},
        state_size=2,
        low_precision=_AVERAGES,
    ),
    Method(
        name="amsgrad",
        factory=amsgrad,
        scale_by=optax.scale_by_amsgrad,
        family="baselines",
        title="AMSGrad",
        reference=SLIDES,
        equation="v̂ ← max(v̂, v); θ ← θ − η m/(√v̂ + ε)",
        static_args=("bias_correction",),
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.02},
        state_size=3,
        low_precision=f"{_AVERAGES}; the maximum is that of rounded values, a little too large",
    ),
    Method(
        name="sign_sgd",
        factory=optax.sign_sgd,
        scale_by=optax.scale_by_sign,
        family="baselines",
        title="signSGD (optax's ssd)",
        reference=SIGN_SGD,
        equation="θ ← θ − α·sign(g): the same as ssd",
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=0,
    ),
    Method(
        name="signum",
        factory=optax.signum,
        scale_by=None,
        family="baselines",
        title="Signum (optax's m_ssd)",
        reference=SIGN_SGD,
        equation="m ← βm + (1−β)g; θ ← θ − α·sign(m): the same as m_ssd",
        static_args=("accumulator_dtype",),
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="lion",
        factory=optax.lion,
        scale_by=optax.scale_by_lion,
        family="baselines",
        title="Lion",
        reference='X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023',
        equation="θ ← θ − η(sign(β₁m + (1−β₁)g) + λθ); m ← β₂m + (1−β₂)g",
        needs=frozenset({"params"}),
        static_args=("mu_dtype", "mask"),
        tunes=_rate(1e-6, 1e-1),
        test_hyperparams={"learning_rate": 0.01},
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="lbfgs",
        factory=lbfgs,
        scale_by=optax.scale_by_lbfgs,
        family="baselines",
        title="L-BFGS with zoom line search",
        reference=SLIDES,
        equation="θ ← θ − αH⁻¹g, H⁻¹ from the last m pairs of steps and gradient differences",
        needs=frozenset({"params", "value", "grad", "value_fn"}),
        static_args=("memory_size", "scale_init_precond", "max_linesearch_steps"),
        test_hyperparams={"memory_size": 4},
        state_size=23,  # 2m + 2 vectors for m = 10, and the line search's gradient
        cost=2.0,
        low_precision="nothing: differences of positions and of gradients need their digits",
        wide_state=("params", "updates", "grad", "diff_params_memory", "diff_updates_memory"),
    ),
    Method(
        name="polyak_sgd",
        factory=polyak_sgd,
        scale_by=optax.scale_by_polyak,
        family="baselines",
        title="SGD with the Polyak step size (optax)",
        reference='N. Loizou et al., "Stochastic Polyak Step-size for SGD", 2021',
        equation="θ ← θ − min((f − f*)/(s|g|²), s·γ_max)·g; s·min((f − f*)/|g|², γ_max) is polyak",
        needs=frozenset({"value"}),
        static_args=("variant",),
        tunes=Tunable("max_learning_rate", 1e-3, 1e2),
        test_hyperparams={"max_learning_rate": 1.0},
        state_size=0,
    ),
):
    register(_method)
