"""Finds what was reduced over one device's shard only, in a program for all devices.

Within `jax.shard_map`, while `shards.across` is active. Every value is of one of three kinds: it is
*common* to all devices, or a *shard* of something larger, or *partial*: it comes from a reduction
of a shard and has not been combined with those of the other devices, so that each device has
another one where there should be one for all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend

from optgrad.core import shards

_COMMON, _SHARD, _PARTIAL = 0, 1, 2

# What makes one value of several entries, or several that depend on all.
_REDUCTIONS = frozenset({
    *(f"reduce_{x}" for x in ("sum", "max", "min", "prod", "and", "or", "xor", "window")),
    *(f"cum{x}" for x in ("sum", "max", "min", "prod", "logsumexp")),
    *("reduce", "argmax", "argmin", "sort", "top_k", "approx_top_k", "scatter-add"),
    *("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window_general"),
    *("conv_general_dilated", "fft", "cholesky", "eigh", "eig", "svd", "qr", "geqrf", "lu"),
    *("householder_product", "triangular_solve", "schur", "tridiagonal", "hessenberg"),
})  # fmt: skip


def outputs(closed: Any) -> list[bool]:
    """Which results of a traced function (`jax.make_jaxpr`) are partial."""
    jaxpr = closed.jaxpr
    return [kind == _PARTIAL for kind in _of_jaxpr(jaxpr, [_typed(x) for x in jaxpr.invars])]


def _typed(x: Any) -> int:
    """The kind of an array that was not computed here."""
    return _SHARD if shards.varying_axes(x.aval) else _COMMON


def _of_jaxpr(jaxpr: Any, given: Sequence[int]) -> list[int]:
    kinds = {var: _typed(var) for var in jaxpr.constvars}
    kinds.update(zip(jaxpr.invars, given, strict=True))

    def kind(x: Any) -> int:
        return _COMMON if isinstance(x, jax.extend.core.Literal) else kinds[x]

    for eqn in jaxpr.eqns:
        found = _of_equation(eqn, [kind(x) for x in eqn.invars])
        for var, one in zip(eqn.outvars, found, strict=True):
            kinds[var] = one if shards.varying_axes(var.aval) else _COMMON  # such as a sum of all
    return [kind(x) for x in jaxpr.outvars]


def _of_equation(eqn: Any, given: list[int]) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return _of_cond(params, given)
    if name == "while":
        return _of_while(params, given)
    if name == "scan":
        return _of_scan(eqn, given)
    inner = [x for x in map(_jaxpr_in, params.values()) if x is not None]
    if inner and len(inner[0].invars) == len(given):  # a call
        return _of_jaxpr(inner[0], given)
    one = max(given, default=_SHARD)  # without operands: a device's number
    # Coefficients that are common combine whole rows; they sum over no shard.
    if name in _REDUCTIONS or (name == "dot_general" and min(given) > _COMMON):
        one = _PARTIAL if one > _COMMON else _COMMON
    return [one] * len(eqn.outvars)


def _of_cond(params: Any, given: list[int]) -> list[int]:
    branches = [_of_jaxpr(branch.jaxpr, given[1:]) for branch in params["branches"]]
    return [max(given[0], *column) for column in zip(*branches, strict=True)]


def _of_while(params: Any, given: list[int]) -> list[int]:
    split = params["cond_nconsts"]
    ends = split + params["body_nconsts"]
    condition, body, carry = given[:split], given[split:ends], given[ends:]
    carry = _settled(params["body_jaxpr"].jaxpr, body, carry, [])[: len(carry)]
    decides = _of_jaxpr(params["cond_jaxpr"].jaxpr, [*condition, *carry])[0]
    return [max(one, decides) for one in carry]


def _of_scan(eqn: Any, given: list[int]) -> list[int]:
    """Constants, carry and rows are told apart by their shapes: rows have an axis more outside.

    How the equation says it otherwise depends on the version of jax.
    """
    body = _jaxpr_in(eqn.params["jaxpr"])
    ends = sum(map(_same_rank, eqn.invars, body.invars))
    split = ends - sum(map(_same_rank, eqn.outvars, body.outvars))
    return _settled(body, given[:split], given[split:ends], given[ends:])


def _same_rank(outside: Any, inside: Any) -> bool:
    return len(getattr(outside.aval, "shape", ())) == len(getattr(inside.aval, "shape", ()))


def _settled(body: Any, consts: list[int], carry: list[int], rest: list[int]) -> list[int]:
    """The kinds of a loop's results after as many turns as can change one."""
    while True:
        found = _of_jaxpr(body, [*consts, *carry, *rest])
        joined = [max(pair) for pair in zip(carry, found[: len(carry)], strict=True)]
        if joined == carry:
            return [*carry, *found[len(carry) :]]
        carry = joined


def _jaxpr_in(value: Any) -> Any:
    """The jaxpr in an equation's parameter, None if it is something else."""
    jaxpr = getattr(value, "jaxpr", value)
    return jaxpr if hasattr(jaxpr, "eqns") else None
