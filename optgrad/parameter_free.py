"""Records for the methods of `optax.contrib` that set their own step size, peers at their defaults.

Every factory is optax's with its defaults, under the argument names of `optgrad.baselines`, and can
be called without arguments. What optax does is left as it is, but for the types and the buffers,
which `_in_wide_types` mends for all of them. Each docstring says where the defaults are not those
of the paper or of its authors' own code.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from optgrad.core import checks, diagnostics, transforms, trees
from optgrad.registry import Method, Tunable, register


def _in_wide_types(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, computed in float32 at least, whose state has buffers and types of its own.

    optax keeps the scalars that drive a step in the narrowest type of the parameters, where 1e-6
    or 1e-8 may be 0; on trees of mixed types updates and state change their types; and the state
    begins with the parameters' own buffers, which cannot be donated beside these.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> optax.OptState:
        return transforms.strongly_typed(jax.tree.map(jnp.copy, optimizer.init(_widened(params))))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        params = transforms.require_params(params)
        new_updates, new_state = optimizer.update(
            _widened(updates), state, _widened(params), **extra
        )
        new_state = transforms.strongly_typed(transforms.cast_like(new_state, state))
        return transforms.cast_like(new_updates, params), new_state

    return transforms.transformation(init, update)


def _widened(tree: Any) -> Any:
    return jax.tree.map(trees.wide, tree)


def prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    estim_lr0: chex.Numeric = 1e-6,
    estim_lr_coef: chex.Numeric = 1.0,
    weight_decay: chex.Numeric = 0.0,
    safeguard_warmup: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.prodigy`: Adam whose rate is an estimate of the distance to the solution.

    The defaults are the paper's (a rate of 1, which its experiments anneal by a cosine, and a first
    estimate of 1e-6). optax corrects Adam's biases, the authors' code only if it is asked to. optax
    becomes NaN where the first gradients are all 0.
    """
    checks.check_in_range("estim_lr0", estim_lr0, 0.0, low_open=True, high_open=True)
    return _in_wide_types(
        contrib.prodigy(
            learning_rate,
            (b1, b2),
            eps=eps,
            estim_lr0=estim_lr0,
            estim_lr_coef=estim_lr_coef,
            weight_decay=weight_decay,
            safeguard_warmup=safeguard_warmup,
        )
    )


def dadapt_adamw(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    estim_lr0: chex.Numeric = 1e-6,
    weight_decay: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.dadapt_adamw`: Adam with the rate of D-Adaptation.

    The defaults are the paper's. optax corrects Adam's biases, the authors' code only if it is
    asked to. optax becomes NaN where the first gradients are all 0.
    """
    checks.check_in_range("estim_lr0", estim_lr0, 0.0, low_open=True, high_open=True)
    return _in_wide_types(
        contrib.dadapt_adamw(learning_rate, (b1, b2), eps, estim_lr0, weight_decay)
    )


def dog(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    reps_rel: chex.Numeric = 1e-6,
    eps: chex.Numeric = 1e-8,
    weight_decay: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.dog`: SGD by the distance from the start over the gradients' norms.

    ``reps_rel`` is the authors' name of what optax calls ``("heuristic", reps_rel)``: the first
    distance is reps_rel·(1 + ‖θ₀‖). The default is theirs; with batch normalisation they take 1e-4.
    They evaluate an average of the iterates, which optax has not (``ema`` of the harness is another
    one). The weight decay is L2 regularisation.
    """
    checks.check_in_range("reps_rel", reps_rel, 0.0, low_open=True, high_open=True)
    return _in_wide_types(
        contrib.dog(learning_rate, ("heuristic", reps_rel), eps, weight_decay=weight_decay)
    )


def dowg(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    eps: chex.Numeric = 1e-4,
    weight_decay: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.dowg`: as `dog`, with gradients weighted by the distance at their time.

    ``eps`` is the first squared distance, and is added to the denominator. The weight decay is L2
    regularisation.
    """
    checks.check_in_range("eps", eps, 0.0, low_open=True, high_open=True)
    return _in_wide_types(contrib.dowg(learning_rate, None, eps, weight_decay))


def momo(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    beta: chex.Numeric = 0.9,
    lower_bound: chex.Numeric = 0.0,
    weight_decay: chex.Numeric = 0.0,
    adapt_lower_bound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.momo`: momentum with a Polyak step of averaged losses; needs value.

    The rate is the largest step. The defaults are the paper's.
    """
    return _in_wide_types(
        contrib.momo(learning_rate, beta, lower_bound, weight_decay, adapt_lower_bound)
    )


def momo_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    *,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    lower_bound: chex.Numeric = 0.0,
    weight_decay: chex.Numeric = 0.0,
    adapt_lower_bound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.momo_adam`: as `momo`, in Adam's metric; needs value.

    The rate is the largest step. The defaults are the paper's.
    """
    return _in_wide_types(
        contrib.momo_adam(learning_rate, b1, b2, eps, lower_bound, weight_decay, adapt_lower_bound)
    )


def schedule_free_adamw(
    learning_rate: optax.ScalarOrSchedule = 0.0025,
    *,
    warmup_steps: int | None = None,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    weight_decay: chex.Numeric = 0.0,
    weight_lr_power: chex.Numeric = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.schedule_free_adamw`: no schedule, but a rate; evaluated at an average x.

    The trained parameters are y = (1 − b1)z + b1·x; ``Method.evaluation_params`` gives x. The
    defaults are those of the authors' code, a rate of 0.0025 without a warm-up; the authors tune
    the rate for each problem, and use a warm-up where training is long.
    """
    checks.check_in_range("b1", b1, 0.0, 1.0, low_open=True)
    if warmup_steps is not None and callable(learning_rate):
        raise ValueError(
            f"warmup_steps = {warmup_steps} with a schedule as learning_rate; accepted: a number "
            "as learning_rate, or warmup_steps = None"
        )
    return _in_wide_types(
        contrib.schedule_free_adamw(
            learning_rate, warmup_steps, b1, b2, eps, weight_decay, weight_lr_power
        )
    )


def cocob(
    alpha: chex.Numeric = 100.0,
    *,
    eps: chex.Numeric = 1e-8,
    weight_decay: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.cocob`: a bet of each coordinate on the sign of its next gradient.

    The first step of a coordinate is 1/alpha, whatever its gradient. The defaults are the paper's.
    optax's ``learning_rate`` is left out: it multiplies the gradients, of whose scale the steps are
    independent. The weight decay is L2 regularisation.
    """
    checks.check_in_range("eps", eps, 0.0, low_open=True, high_open=True)
    return _in_wide_types(contrib.cocob(1.0, alpha, eps, weight_decay))


def schedule_free_average(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The average x at which `schedule_free_adamw` is evaluated.

    Args:
      state: its state, alone or within any other (a chain's, a guard's, an injected one …).
      params: the trained parameters y.

    Raises:
      ValueError: if no such state is within ``state``.
    """
    found = diagnostics.state_of(state, contrib.ScheduleFreeState, "schedule_free_adamw")
    return transforms.cast_like(contrib.schedule_free_eval_params(found, params), params)


_FACTOR = Tunable("learning_rate", 1e-2, 1e2)
_PARAMS = frozenset({"params"})
_PRODIGY = 'K. Mishchenko, A. Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner"'
_MOMO = 'F. Schaipp et al., "MoMo: Momentum Models for Adaptive Learning Rates", 2023'
_AVERAGES = "averages, by low_precision_state: of any decay"
_START = "nothing: the start needs the digits of the difference that is taken from it"

for _method in (
    Method(
        name="prodigy",
        factory=prodigy,
        scale_by=None,
        family="baselines",
        title="Prodigy",
        reference=f"{_PRODIGY}, 2023",
        equation="d ← max(d, Σ wᵢ⟨gᵢ, θ₀ − θᵢ⟩/|Σ wᵢgᵢ|₁), wᵢ = dᵢ²√β₂ᵗ⁻ⁱ; θ ← θ − ηd·Adam",
        needs=_PARAMS,
        static_args=("safeguard_warmup",),
        tunes=_FACTOR,
        test_hyperparams={"learning_rate": 1.0},
        state_size=4,
        low_precision="averages and the sum of gradients, by low_precision_state; not the start",
        wide_state=("params0",),
    ),
    Method(
        name="dadapt_adamw",
        factory=dadapt_adamw,
        scale_by=None,
        family="baselines",
        title="AdamW by D-Adaptation",
        reference='A. Defazio, K. Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023',
        equation="d ← max(d, Σ wᵢ⟨gᵢ, sᵢ/√vᵢ⟩/|s|₁), s = Σ wᵢgᵢ, wᵢ = dᵢ√β₂ᵗ⁻ⁱ; θ ← θ − ηd·Adam",
        needs=_PARAMS,
        tunes=_FACTOR,
        test_hyperparams={"learning_rate": 1.0},
        state_size=3,
        low_precision=_AVERAGES,
    ),
    Method(
        name="dog",
        factory=dog,
        scale_by=None,
        family="baselines",
        title="Distance over gradients (DoG)",
        reference='M. Ivgi, O. Hinder, Y. Carmon, "DoG is SGD\'s Best Friend", 2023',
        equation="θ ← θ − η r/√(Σ|gᵢ|² + ε)·g, r the largest distance |θᵢ − θ₀| so far",
        needs=_PARAMS,
        tunes=_FACTOR,
        test_hyperparams={"learning_rate": 1.0},
        state_size=1,
        low_precision=_START,
        wide_state=("init_params",),
    ),
    Method(
        name="dowg",
        factory=dowg,
        scale_by=None,
        family="baselines",
        title="Distance over weighted gradients (DoWG)",
        reference='A. Khaled, K. Mishchenko, C. Jin, "DoWG Unleashed", 2023',
        equation="θ ← θ − η r²/(√(Σ rᵢ²|gᵢ|²) + ε)·g, r the largest distance |θᵢ − θ₀| so far",
        needs=_PARAMS,
        tunes=_FACTOR,
        test_hyperparams={"learning_rate": 1.0},
        state_size=1,
        low_precision=_START,
        wide_state=("init_params",),
    ),
    Method(
        name="momo",
        factory=momo,
        scale_by=None,
        family="baselines",
        title="Momentum models (MoMo)",
        reference=_MOMO,
        equation="θ ← θ − min(η, (f̄ − f* + ⟨m, θ⟩ − γ)₊/|m|²)m, averages f̄, m, γ of f, g, ⟨g, θ⟩",
        needs=frozenset({"params", "value"}),
        static_args=("adapt_lower_bound",),
        tunes=Tunable("learning_rate", 1e-3, 1e2),
        test_hyperparams={"learning_rate": 0.1},  # a cap that is met
        state_size=1,
        low_precision=_AVERAGES,
    ),
    Method(
        name="momo_adam",
        factory=momo_adam,
        scale_by=None,
        family="baselines",
        title="Momentum models in Adam's metric (MoMo-Adam)",
        reference=_MOMO,
        equation="θ ← θ − min(η/(1 − β₁ᵗ), (f̄ − f* + ⟨m, θ⟩ − γ)₊/⟨m, m/D⟩)m/D, D = √v̂ + ε",
        needs=frozenset({"params", "value"}),
        static_args=("adapt_lower_bound",),
        tunes=Tunable("learning_rate", 1e-5, 1e0),
        test_hyperparams={"learning_rate": 0.02},
        state_size=2,
        low_precision=_AVERAGES,
    ),
    Method(
        name="schedule_free_adamw",
        factory=schedule_free_adamw,
        scale_by=None,
        family="baselines",
        title="Schedule-free AdamW",
        reference='A. Defazio et al., "The Road Less Scheduled", 2024',
        equation="z ← z − ηg(y)/(√v̂ + ε); x ← (1 − c)x + cz, c = 1/t; y ← (1 − β₁)z + β₁x",
        needs=_PARAMS,
        static_args=("warmup_steps",),
        tunes=Tunable("learning_rate", 1e-5, 1e0),
        test_hyperparams={"learning_rate": 0.05},
        state_size=2,
        low_precision="the average of g², by low_precision_state; not the iterate z",
        wide_state=("z",),
        evaluation_params=schedule_free_average,
    ),
    Method(
        name="cocob",
        factory=cocob,
        scale_by=None,
        family="baselines",
        title="Continuous coin betting (COCOB)",
        reference='F. Orabona, T. Tommasi, "Training Deep Networks without Learning Rates", 2017',
        equation="θ ← θ₀ − Σg·(L + R)/(L·max(Σ|g| + L, αL)), L = max|g|, reward R",
        needs=_PARAMS,
        tunes=Tunable("alpha", 1e0, 1e4),
        test_hyperparams={"alpha": 100.0},
        state_size=5,
        low_precision="sums, by low_precision_state, to nearest they stop growing; not the start",
        wide_state=("init_particles",),
    ),
):
    register(_method)
