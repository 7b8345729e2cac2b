"""The gallery as one HTML page, which needs nothing beside it: all runs are in it, compressed."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from optgrad.experiments.gallery import numbers as numbers_lib
from optgrad.experiments.gallery import places as places_lib
from optgrad.experiments.gallery import runs as runs_lib
from optgrad.experiments.gallery.numbers import Numbers
from optgrad.experiments.gallery.places import Place

NAME = "interactive.html"
_TEMPLATES = Path(__file__).parents[1] / "templates"
_GRID = 160  # points of a landscape's heights, on each side
_FIRST = ("sgd", "momentum", "adam", "m_svag", "adaptive_sgd", "bfgs")


def html(numbers: Numbers) -> str:
    """The page."""
    scripts = [
        f'<script id="landscape-{index}" type="text/plain">{_data(numbers, index)}</script>'
        for index in range(len(numbers.places))
    ]
    parts = {
        "style": (_TEMPLATES / "gallery.css").read_text(encoding="utf-8"),
        "script": (_TEMPLATES / "gallery.js").read_text(encoding="utf-8"),
        "about": json.dumps(_about(numbers), ensure_ascii=False).replace("<", "\\u003c"),
        "landscapes": "\n".join(scripts),
    }
    text = (_TEMPLATES / "gallery.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    return text


def _about(numbers: Numbers) -> dict[str, Any]:
    settings = numbers.settings
    first = [name for name in _FIRST if name in numbers.methods]
    return {
        "methods": [
            {
                "name": name,
                **about,
                "values": numbers.values[j][~np.isnan(numbers.values[j])].tolist(),
            }
            for j, (name, about) in enumerate(numbers.methods.items())
        ],
        "places": [_place(numbers, places_lib.places()[name]) for name in numbers.places],
        "values": settings.values,
        "times": settings.times.astype(int).tolist(),
        "noises": list(places_lib.NOISES),
        "budgets": list(settings.budgets),
        "shown": settings.budgets.index(settings.shown),
        "grid": _GRID,
        "unit": numbers_lib.UNIT,
        "step": numbers_lib.STEP,
        "first": first or list(numbers.methods)[:6],
        "blind": "its residuals cannot hold this noise",
        "notes": notes(numbers),
    }


def _place(numbers: Numbers, place: Place) -> dict[str, Any]:
    (left, right), (low, high) = place.view

    def share(point: Any) -> list[float]:
        return [(point[0] - left) / (right - left), (point[1] - low) / (high - low)]

    lowest, highest = _heights(place)[1:]
    return {
        "name": place.name,
        "title": place.title,
        "text": place.text,
        "source": place.source,
        "view": place.view,
        "start": share(place.start),
        "minimizers": [share(point) for point in place.landscape.minimizers],
        "noises": place.noises,
        "own_noise": place.own_noise,
        "lowest": lowest,
        "highest": highest,
        "left_out": {m: why for (p, m), why in numbers.left_out.items() if p == place.name},
        "chosen": [
            None if (place.name, m) in numbers.left_out
            else [numbers.chosen(place.name, m, budget) for budget in numbers.settings.budgets]
            for m in numbers.methods
        ],
    }  # fmt: skip


def notes(numbers: Numbers) -> list[str]:
    """How the runs were made, in sentences."""
    settings = numbers.settings
    budgets = ", ".join(map(str, settings.budgets))
    return [
        f"Every method was given the same number of trials: {settings.values} values of the one "
        "hyperparameter that its record tunes, equidistant in their logarithm. Ranges of scales "
        "(rates and the like) are eight decades wide; all else stays at its default. A method with "
        "nothing to tune runs as it is.",
        f"Budgets are counted in gradient equivalents: {budgets}. A gradient costs 1, a product "
        "with the Hessian 2, a value of the loss ⅓, as the method itself counts them. No run "
        "exceeds its budget; many methods make one step per gradient, second-order ones fewer.",
        "The value is chosen anew for each landscape and budget: lowest mean log₁₀ (f − f*) at the "
        f"end, over {settings.starts} random starts around the named one, each with its own seed "
        f"of noise. Results are reported on {settings.starts} other starts and seeds. The path "
        "shown begins at the named start, with a seed that is neither.",
        "A run that diverged counts as 12, the worst; below −12 nothing is told apart, and of "
        "values that are equal the middle one is chosen.",
        "Values were chosen with the landscape's own noise: none, but large on the noisy "
        f"quadratic. Noise is normal and added to the gradients of {runs_lib.EXAMPLES} examples; "
        "σ is that of their mean. It is the same for all methods and values. The loss that methods "
        "see is f(x) + ξᵀ(x − start): at the minimum it is off, as that of a minibatch is.",
        "Functions are shifted to f* = 0, which methods that use the loss assume (Polyak's and "
        "L4's): an advantage that they rarely have. The diagonal of the curvature that idbd and "
        "vsgd are handed is exact, and not charged.",
        "Runs are in single precision, like most users'; f − f* is evaluated in double precision. "
        "On Goldstein–Price and Styblinski–Tang rounding hides about 10⁻⁵ of the loss from "
        "methods that compare losses.",
        "Where a record tunes something else than a rate (idbd and delta_bar_delta: how fast rates "
        "change), the first rate stays at its default; where that is too large, they diverge.",
        f"Positions are kept at {len(settings.times)} times, spaced geometrically, with straight "
        "lines between them, and rounded to 1/8192 of what is shown; log₁₀ (f − f*) to 0.1.",
        "Left out: " + "; ".join(left_out(numbers)) + "."
        if numbers.left_out
        else "Nobody was left out.",
    ]


def left_out(numbers: Numbers) -> list[str]:
    """Who was left out, where and why."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for (place, method), reason in numbers.left_out.items():
        by_reason.setdefault((method, reason), []).append(places_lib.places()[place].title)
    return [
        f"{method} {_where(titles, numbers)} ({reason})"
        for (method, reason), titles in by_reason.items()
    ]


def _where(titles: list[str], numbers: Numbers) -> str:
    return "everywhere" if len(titles) == len(numbers.places) else f"on {', '.join(titles)}"


def _heights(place: Place) -> tuple[Any, float, float]:
    """log₁₀ (f − f*) on the grid, from the upper left, as uint8 between two numbers."""
    (left, right), (low, high) = place.view
    x, y = np.linspace(left, right, _GRID), np.linspace(high, low, _GRID)
    height = place.log_excess(np.stack(np.meshgrid(x, y), axis=-1))
    highest = float(height.max())
    lowest = max(float(np.quantile(height, 0.005)), highest - 7.0)
    share = np.clip((height - lowest) / (highest - lowest), 0.0, 1.0)
    return np.round(255 * share).astype(np.uint8), lowest, highest


def _data(numbers: Numbers, index: int) -> str:
    """A landscape's runs and heights, deflated, in base64."""
    place = places_lib.places()[numbers.places[index]]
    parts = [
        numbers_lib.packed(numbers.positions[index]),
        numbers_lib.differences(numbers.excesses[index], axis=-1),
        _heights(place)[0],
    ]
    return base64.b64encode(zlib.compress(b"".join(p.tobytes() for p in parts), 9)).decode()
