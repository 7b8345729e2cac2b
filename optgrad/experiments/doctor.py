"""What ``optgrad doctor`` looks at: versions, devices, extras, data, caches, and a self test."""

import importlib.metadata
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optgrad
from optgrad.experiments import data, results

_STEPS = 5


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    is_fine: bool = True  # False: something that a user may miss


def findings(data_dir: Path | None = None) -> Iterator[Finding]:
    """All of them, in order; the last one is the self test."""
    yield from (Finding(*item) for item in results.describe_environment().items())
    kinds = [" ".join(dict.fromkeys((d.platform, d.device_kind))) for d in jax.devices()]
    yield Finding("devices", ", ".join(f"{kinds.count(k)} × {k}" for k in dict.fromkeys(kinds)))
    yield Finding(
        "64-bit floats", "on" if jnp.result_type(float) == jnp.float64 else "off, as by default"
    )
    for extra, missing in _extras().items():
        yield Finding(f"extra {extra}", f"lacks {', '.join(missing)}" if missing else "installed",
                      is_fine=not missing)  # fmt: skip
    for name in data.datasets():
        place = data.whereabouts(name, data_dir)
        yield Finding(f"data {name}", str(place or "not here; downloaded when first used"),
                      is_fine=place is not None)  # fmt: skip
    yield from _caches()
    yield self_test()


def self_test() -> Finding:
    """Five steps of `m_svag`, compiled, against its formula in NumPy.

    Examples:
      >>> self_test().is_fine
      True
    """
    began = time.perf_counter()
    gradients = np.random.default_rng(0).normal(0.5, 1.0, (_STEPS, 3))
    optimizer = optgrad.m_svag(0.1, beta=0.9)

    def run(gradients: jax.Array) -> jax.Array:
        state = optimizer.init(jnp.zeros(3))
        steps: jax.Array = jax.lax.scan(
            lambda s, g: optimizer.update(g, s)[::-1], state, gradients
        )[1]
        return steps

    found = jax.jit(run)(jnp.asarray(gradients, jnp.float32))
    error = float(np.max(np.abs(found - _by_formula(gradients))))
    seconds = time.perf_counter() - began
    return Finding(
        "self test",
        f"m_svag differs from its formula by {error:.0e} ({seconds:.1f} s)",
        error < 1e-5,
    )


def _by_formula(gradients: np.ndarray, rate: float = 0.1, mu: float = 0.9) -> np.ndarray:
    """Algorithm 2 of Balles & Hennig, with their bias corrections."""
    m = v = np.zeros(3)
    steps = []
    for t, g in enumerate(gradients, 1):
        m, v = mu * m + (1 - mu) * g, mu * v + (1 - mu) * g**2
        mean, second = m / (1 - mu**t), v / (1 - mu**t)
        rho = (1 - mu) * (1 + mu**t) / ((1 + mu) * (1 - mu**t))
        variance = rho * (second - mean**2)
        steps.append(-rate * mean**2 / (mean**2 + variance) * mean)
    return np.array(steps)


def _extras() -> dict[str, list[str]]:
    """Extra -> the packages of it that are not installed."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("optgrad") or ():
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package is None or extra is None or package[0] == "optgrad":
            continue
        missing = found.setdefault(extra[1], [])
        try:
            importlib.metadata.version(package[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(package[0])
    return found


def _caches() -> Iterator[Finding]:
    """Downloaded data, and compiled programs, which by default lie in a folder below it."""
    downloads = data.user_cache()
    settings: Any = jax.config  # whose fields have no types
    compiled = Path(settings.jax_compilation_cache_dir or downloads / "compiled")
    kept = [path for path in _files(downloads) if not path.is_relative_to(compiled)]
    yield _cache("cache of data", downloads, kept)
    if settings.jax_enable_compilation_cache:
        yield _cache("cache of programs", compiled, _files(compiled))
    else:
        yield Finding("cache of programs", "switched off", is_fine=False)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _cache(name: str, folder: Path, files: Sequence[Path]) -> Finding:
    size = sum(path.stat().st_size for path in files) / 2**20
    is_writable = os.access(next(p for p in (folder, *folder.parents) if p.exists()), os.W_OK)
    note = "" if is_writable else ", which cannot be written"
    return Finding(name, f"{folder}{note}, {len(files):,} files, {size:,.0f} MiB", is_writable)
