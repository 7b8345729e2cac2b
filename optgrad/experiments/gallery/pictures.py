"""The gallery's pictures: paths in small multiples, tuning curves, a map of results, animations."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, withStroke
from PIL import Image

from optgrad.core import checks
from optgrad.experiments import plots
from optgrad.experiments.gallery import numbers as numbers_lib
from optgrad.experiments.gallery import places as places_lib
from optgrad.experiments.gallery.numbers import Numbers, Row
from optgrad.experiments.gallery.places import Float, Place

FORMATS = ("png", "svg")
_WIDTH = 8.0  # inches, of every picture but those of single methods
_COLUMNS = 4
_SIZE = 8  # points, of the smallest letters
_PIXELS = 264  # of a landscape's picture, on each side: as many as a panel has
_LEVELS = 14
_STYLE: Any = {
    **plots.STYLE,
    "figure.constrained_layout.use": False,
    "font.size": _SIZE,
    "axes.titlesize": _SIZE,
    "axes.labelsize": _SIZE,
    "xtick.labelsize": _SIZE,
    "ytick.labelsize": _SIZE,
    "legend.fontsize": _SIZE,
}
# Light, so that every path is darker than what is below it.
_GROUND = LinearSegmentedColormap.from_list("ground", ["#9fb8cf", "#d5e1ea", "#fbfaf5"])
_PATH, _HALO = "#b3260a", "#ffffff"
_ALWAYS_ANIMATED = ("sgd", "momentum", "adam")
_SHORT = {
    "learning_rate": "rate",
    "max_learning_rate": "max. rate",
    "initial_step_size": "first step",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKERS = "os^Dv<>PX*ph"
_FRAMES, _FRAME_SIZE, _FRAME_MS = 36, (6.6, 4.3), 110
_CLEAR = 255  # the number of the colour that is none


def names(numbers: Numbers) -> list[str]:
    """Stems of the files that `write` draws, as PNG and SVG."""
    found = ["overview"]
    for place in numbers.places:
        found += [f"{place}_{family}" for family in numbers.families]
        found += [f"{place}_tuning_{family}" for family in numbers.families]
    return found


def write(
    numbers: Numbers,
    folder: Path,
    progress: numbers_lib.Progress,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draws everything: figures in each of the formats, and a GIF for each landscape."""
    todo = dict(_drawings(numbers, formats))
    for done, (name, draw) in enumerate(todo.items(), start=1):
        draw(folder / name)
        progress(done / len(todo), name)


def _drawings(
    numbers: Numbers, formats: Sequence[str]
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Names of files, the suffix of figures left out, and what draws them."""

    def figure(make: Callable[..., Figure], *arguments: str) -> Callable[[Path], None]:
        return lambda path: _save_all(make, numbers, arguments, path, formats)

    yield "overview", figure(overview)
    for place in numbers.places:
        for family in numbers.families:
            yield f"{place}_{family}", figure(paths, place, family)
            yield f"{place}_tuning_{family}", figure(tuning, place, family)
        yield f"{place}.gif", functools.partial(animate, numbers, place)


def _save_all(
    make: Any, numbers: Numbers, arguments: Sequence[str], path: Path, formats: Sequence[str]
) -> None:
    with mpl.rc_context(_STYLE):
        figure = make(numbers, *arguments)
    for suffix in formats:
        save(figure, path.with_name(f"{path.name}.{suffix}"))


def save(figure: Figure, path: Path) -> None:
    """Writes PNG or SVG by the suffix, without a time stamp."""
    with mpl.rc_context(_STYLE):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


# Landscapes -------------------------------------------------------------------------------------


@functools.cache
def ground(place: Place, pixels: int = _PIXELS) -> Any:
    """The landscape as a picture, RGB: bands of log₁₀ (f − f*), the lowest the darkest."""
    (left, right), (low, high) = place.view
    x, y = np.linspace(left, right, pixels), np.linspace(high, low, pixels)
    height = place.log_excess(np.stack(np.meshgrid(x, y), axis=-1))
    bottom = max(float(np.quantile(height, 0.005)), float(height.max()) - 7.0)
    share = np.clip((height - bottom) / (height.max() - bottom), 0.0, 1.0)
    bands = np.floor(share * _LEVELS * 0.999) / (_LEVELS - 1)
    colours = _GROUND(bands)[..., :3]
    edges = np.zeros(bands.shape, bool)
    edges[1:] |= bands[1:] != bands[:-1]
    edges[:, 1:] |= bands[:, 1:] != bands[:, :-1]
    colours[edges] *= 0.86
    return np.round(colours * 255).astype(np.uint8)


def _draw_ground(axis: Axes, place: Place, pixels: int = _PIXELS) -> None:
    (left, right), (low, high) = place.view
    axis.imshow(ground(place, pixels), extent=(left, right, low, high), aspect="auto",
                interpolation="none", zorder=0)  # fmt: skip
    axis.set(xlim=(left, right), ylim=(low, high))
    axis.grid(visible=False)
    for x, y in place.landscape.minimizers:
        axis.plot(x, y, "*", color="#ffd400", markeredgecolor="#1a1a1a", markeredgewidth=0.6,
                  markersize=9, zorder=3)  # fmt: skip


def _draw_start(axis: Axes, place: Place) -> None:
    axis.plot(*place.start, "o", color="#ffffff", markeredgecolor="#1a1a1a", markeredgewidth=1.2,
              markersize=5, zorder=5)  # fmt: skip


def _finite(path: Float) -> Float:
    """The path until it is first not finite."""
    ends = np.flatnonzero(np.isnan(path).any(axis=-1))
    return path[: ends[0]] if len(ends) else path


def _thinned(path: Float, place: Place, share: float) -> Float:
    """The path without positions that are nearer to the last one kept than a share of the view."""
    low, high = np.array(place.view).T
    kept = [0]
    for number, point in enumerate(path):
        if np.max(np.abs(point - path[kept[-1]]) / (high - low)) > share:
            kept.append(number)
    return path[[*kept, len(path) - 1]]


# Paths in small multiples -----------------------------------------------------------------------


def paths(numbers: Numbers, place_name: str, family: str) -> Figure:
    """One panel for each method of a family: its path with the value that was chosen."""
    place = places_lib.places()[place_name]
    methods = numbers.of_family(family)
    rows = -(-len(methods) // _COLUMNS)
    top, bottom, panel = 0.5, 0.1, 2.25  # inches
    height = top + bottom + rows * panel
    figure = Figure(figsize=(_WIDTH, height))
    figure.suptitle(
        f"{place.title}: {family}, {numbers.settings.shown} gradient equivalents\n"
        "circle: start; star: minimum; in the second line the tuned value and log₁₀ (f − f*) "
        "at the end",
        fontsize=9, y=1 - 0.1 / height, va="top",
    )  # fmt: skip
    for index, method in enumerate(methods):
        row, column = divmod(index, _COLUMNS)
        left = 0.02 + column * 0.2475
        below = 1 - (top + (row + 1) * panel) / height
        axis = figure.add_axes((left, below, 0.2175, (panel - 0.48) / height))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="#8a8a8a")
        _draw_panel(axis, numbers, place, method)
    return figure


def _draw_panel(axis: Axes, numbers: Numbers, place: Place, method: str) -> None:
    reason = numbers.left_out.get((place.name, method))
    if reason:
        axis.set_title(f"{method}\nleft out", linespacing=1.3)
        axis.text(0.5, 0.5, _wrapped(reason), ha="center", va="center", color="#444444",
                  transform=axis.transAxes)  # fmt: skip
        return
    _draw_ground(axis, place)
    path = _finite(numbers.path(place.name, method))
    halo = [withStroke(linewidth=3.0, foreground=_HALO), Normal()]
    axis.plot(*_thinned(path, place, 0.006).T, color=_PATH, linewidth=1.1, path_effects=halo,
              zorder=4)  # fmt: skip
    axis.plot(*_thinned(path, place, 0.02).T, ".", color=_PATH, markersize=2.6, zorder=4)
    axis.plot(*path[-1], "s", color=_PATH, markeredgecolor=_HALO, markersize=5, zorder=5)
    _draw_start(axis, place)
    row = numbers.row(place.name, method, numbers.settings.shown)
    assert row is not None
    end = numbers.shown_excess(place.name, method)
    reached = "diverged" if end == numbers_lib.WORST else f"{end:.1f}".replace("-", "−")
    axis.set_title(f"{method}\n{_setting(row)}: {reached}", linespacing=1.3)


def _setting(row: Any) -> str:
    if row["value"] is None:
        return "not tuned"
    name = _SHORT.get(row["hyperparameter"], row["hyperparameter"])
    return f"{name} {numbers_lib.value_text(row['value'])}" + (" (edge)" if row["edge"] else "")


def _wrapped(text: str, width: int = 26) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# Tuning -----------------------------------------------------------------------------------------


def tuning(numbers: Numbers, place_name: str, family: str) -> Figure:
    """One panel for each method of a family: what every tried value reached, for each budget."""
    place = places_lib.places()[place_name]
    methods = [
        m for m in numbers.of_family(family) if (place_name, m) not in numbers.left_out
        and numbers.methods[m]["tunes"]
    ]  # fmt: skip
    rows = max(1, -(-len(methods) // _COLUMNS))
    top, bottom, panel = 0.7, 0.05, 1.6
    height = top + bottom + rows * panel
    figure = Figure(figsize=(_WIDTH, height))
    figure.suptitle(
        f"{place.title}: tuning of {family}\n"
        "mean log₁₀ (f − f*) over tuning starts; circles: chosen values",
        fontsize=9, y=1 - 0.08 / height, va="top",
    )  # fmt: skip
    lines: dict[str, Any] = {}
    for index, method in enumerate(methods):
        row, column = divmod(index, _COLUMNS)
        below = 1 - (top + (row + 1) * panel - 0.35) / height
        axis = figure.add_axes((0.05 + column * 0.241, below, 0.19, (panel - 0.65) / height))
        for k, budget in enumerate(numbers.settings.budgets):
            label = f"{budget} gradient equivalents"
            lines[label] = _draw_curve(axis, numbers, place_name, method, budget, plots.look(k))
        _set_ticks(axis, numbers.values[list(numbers.methods).index(method)], column == 0)
        tunes = numbers.methods[method]["tunes"]
        axis.set_title(f"{method}: {_SHORT.get(tunes, tunes)}", pad=3)
    if lines:
        figure.legend(lines.values(), lines, loc="upper center", ncols=len(lines), frameon=False,
                      bbox_to_anchor=(0.5, 1 - 0.36 / height))  # fmt: skip
    else:
        figure.text(0.5, 0.3, "no method of this family has anything to tune here", ha="center")
    return figure


def _draw_curve(  # noqa: PLR0917
    axis: Axes, numbers: Numbers, place: str, method: str, budget: int, look: Any, label: str = ""
) -> Any:
    """What every tried value reached, and a circle around the chosen one."""
    k = numbers.settings.budgets.index(budget)
    where = numbers.places.index(place), list(numbers.methods).index(method)
    reached, values = numbers.tuned[(*where, slice(None), k)], numbers.values[where[1]]
    (line,) = axis.plot(values, np.minimum(reached, 6.0), **look, label=label)
    chosen = numbers.chosen(place, method, budget)
    axis.plot(values[chosen], reached[chosen], "o", color=look["color"], fillstyle="none",
              markersize=6)  # fmt: skip
    return line


def _set_ticks(axis: Axes, values: Float, with_heights: bool) -> None:
    """Powers of ten in plain text below, which is drawn faster than formulas; heights beside."""
    axis.set_xscale("log")
    axis.set_ylim(-12.9, 6.4)
    axis.set_yticks([-12, -6, 0, 6], ["−12", "−6", "0", "6"] if with_heights else [""] * 4)
    low, high = np.log10(np.nanmin(values)), np.log10(np.nanmax(values))
    powers = np.arange(np.ceil(low - 1e-9), np.floor(high + 1e-9) + 1).astype(int)
    powers = powers[:: -(-len(powers) // 5)]
    labels = [f"10{str(power).translate(_SUPERSCRIPTS)}" for power in powers]
    axis.set_xticks(10.0**powers, labels)
    axis.set_xticks([], minor=True)


def sensitivity(folder_with_csv: Path, method_name: str) -> Figure:
    """A method's tuning curves on all landscapes, with the values that were chosen.

    Args:
      folder_with_csv: with the numbers of a gallery.
      method_name: one of its methods.

    Returns:
      A figure of 7 × 3 inches, for the budget that the gallery shows.

    Raises:
      ValueError: if the gallery does not have the method.
    """
    numbers = _read_once(Path(folder_with_csv).resolve())
    checks.check_one_of("method_name", method_name, numbers.methods)
    about = numbers.methods[method_name]
    budget = numbers.settings.shown
    able = [p for p in numbers.places if (p, method_name) not in numbers.left_out]
    titles = [places_lib.places()[p].title for p in able]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.0, 3.0))
        axis = figure.add_axes((0.085, 0.16, 0.68, 0.74))
        if not able:
            axis.set_axis_off()
            reasons = {why for (_, m), why in numbers.left_out.items() if m == method_name}
            axis.text(0.5, 0.5, f"left out: {_wrapped('; '.join(sorted(reasons)), 60)}",
                      ha="center", transform=axis.transAxes)  # fmt: skip
            return figure
        axis.set_title(f"{method_name}: log₁₀ (f − f*) after {budget} gradient equivalents")
        if about["tunes"]:
            for number, place in enumerate(numbers.places):
                if place in able:
                    _draw_curve(axis, numbers, place, method_name, budget, plots.look(number),
                                places_lib.places()[place].title)  # fmt: skip
            _set_ticks(axis, numbers.values[list(numbers.methods).index(method_name)], True)
            axis.set_xlabel(about["tunes"])
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        else:
            rows = [numbers.row(place, method_name, budget) for place in able]
            axis.plot([r["tuning_log10_excess"] for r in rows if r], "o", color=plots.COLOURS[0])
            axis.set(xlim=(-0.5, len(able) - 0.5), ylim=(-12.9, 6.4))
            axis.set_yticks([-12, -6, 0, 6], ["−12", "−6", "0", "6"])
            axis.set_xticks(range(len(able)), titles, rotation=20, ha="right")
            axis.set_position((0.085, 0.25, 0.9, 0.64))
            axis.set_xlabel("nothing is tuned")
        return figure


@functools.lru_cache(maxsize=2)
def _read_once(folder: Path) -> Numbers:
    return numbers_lib.read(folder)


# Overview ---------------------------------------------------------------------------------------


def overview(numbers: Numbers) -> Figure:
    """log₁₀ excess of every method on every landscape, on held-out starts."""
    budget = numbers.settings.shown
    methods = list(numbers.methods)
    table = np.full((len(methods), len(numbers.places)), np.nan)
    for i, method in enumerate(methods):
        for j, place in enumerate(numbers.places):
            if (row := numbers.row(place, method, budget)) is not None:
                table[i, j] = row["log10_excess"]
    row_height, top = 0.2, 1.2
    height = top + 0.2 + row_height * len(methods)
    figure = Figure(figsize=(_WIDTH, height))
    axis = figure.add_axes((0.21, 0.2 / height, 0.69, (height - top - 0.2) / height))
    axis.imshow(table, cmap="cividis", vmin=-12, vmax=3, aspect="auto", interpolation="none")
    for i, reached in enumerate(table):
        for j, number in enumerate(reached):
            text = "–" if np.isnan(number) else f"{number:.1f}".replace("-", "−")
            colour = "#1a1a1a" if np.isnan(number) or number > -4.5 else "#ffffff"
            axis.text(j, i, text, ha="center", va="center", color=colour)
    titles = [places_lib.places()[p].title for p in numbers.places]
    axis.set_xticks(range(len(titles)), titles, rotation=25, ha="left", rotation_mode="anchor")
    axis.set_yticks(range(len(methods)), methods)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    first: dict[str, int] = {}
    for i, method in enumerate(methods):
        first.setdefault(numbers.methods[method]["family"], i)
    for start in list(first.values())[1:]:
        axis.axhline(start - 0.5, color="#ffffff", linewidth=2.5)
    figure.suptitle(
        f"log₁₀ (f − f*) after {budget} gradient equivalents: tuned, mean over held-out starts\n"
        "lower is better, −12 is the lowest that is told apart; – : left out; white lines divide "
        "families",
        fontsize=9, y=1 - 0.1 / height, va="top",
    )  # fmt: skip
    return figure


# Animations -------------------------------------------------------------------------------------


def animated(numbers: Numbers, place: str) -> list[str]:
    """The best method of each family on held-out starts, and three that everybody knows."""
    budget = numbers.settings.shown
    found = [m for m in _ALWAYS_ANIMATED if numbers.row(place, m, budget)]
    for family in numbers.families:
        members = numbers.of_family(family)
        found += [r["method"] for r in ranking(numbers, place, budget) if r["method"] in members][
            :1
        ]
    return list(dict.fromkeys(found))


def animate(numbers: Numbers, place_name: str, file: Path) -> None:
    """A GIF of the shown paths of `animated`, which lasts a few seconds and repeats."""
    place = places_lib.places()[place_name]
    methods = animated(numbers, place_name)
    times = numbers.settings.times
    shown = times[times <= numbers.settings.shown]
    tracks = [_track(numbers, place, method)[: len(shown)] for method in methods]
    moments = np.linspace(0, len(shown) - 1, _FRAMES)
    with mpl.rc_context(_STYLE | {"font.size": 9, "legend.fontsize": 9}):
        figure = Figure(figsize=_FRAME_SIZE, dpi=100)
        canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not type what it draws
        axis = figure.add_axes((0.02, 0.03, 0.62, 0.89))
        axis.set(xticks=[], yticks=[])
        _draw_ground(axis, place, 440)
        _draw_start(axis, place)
        axis.set_title(f"{place.title}, tuned for {numbers.settings.shown} gradient equivalents",
                       fontsize=10)  # fmt: skip
        lines = []
        for index, method in enumerate(methods):
            look = {**plots.look(index), "linewidth": 1.8}
            marker = _MARKERS[index % len(_MARKERS)]
            (line,) = axis.plot([], [], **look, zorder=4, animated=True)
            (head,) = axis.plot([], [], marker, color=look["color"], markersize=7,
                                markeredgecolor=_HALO, zorder=5, animated=True)  # fmt: skip
            row = numbers.row(place_name, method, numbers.settings.shown)
            y = 0.86 - 0.088 * index
            axis.plot([1.04, 1.14], [y, y], transform=axis.transAxes, clip_on=False, marker=marker,
                      markevery=[1], markersize=7, **look)  # fmt: skip
            axis.text(1.18, y, f"{method}\n{_setting(row)}", transform=axis.transAxes, fontsize=9,
                      va="center", linespacing=1.15)  # fmt: skip
            lines.append((line, head))
        clock = axis.text(1.04, 0.96, "", transform=axis.transAxes, animated=True, fontsize=9)
        canvas.draw()
        background = canvas.copy_from_bbox(figure.bbox)
        frames = []
        for moment in moments:
            canvas.restore_region(background)
            clock.set_text(
                f"gradient equivalents: {np.interp(moment, range(len(shown)), shown):.0f}"
            )
            for (line, head), track in zip(lines, tracks, strict=True):
                part = _until(track, moment)
                line.set_data(*part.T)
                head.set_data(*part[-1:].T)
                axis.draw_artist(line)
                axis.draw_artist(head)
            axis.draw_artist(clock)
            frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    palette = _palette(place, [plots.look(i)["color"] for i in range(len(methods))])
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    changes = [small[0], *itertools.starmap(_change, itertools.pairwise(small))]
    durations = [_FRAME_MS] * (len(small) - 1) + [2500]
    changes[0].save(file, "GIF", save_all=True, append_images=changes[1:], duration=durations,
                    loop=0, optimize=False, disposal=1, transparency=_CLEAR)  # fmt: skip


def _change(before: Any, after: Any) -> Any:
    """The frame with what has not changed transparent, which is a small part of its size."""
    old, new = np.asarray(before), np.asarray(after)
    changed = Image.fromarray(np.where(old == new, np.uint8(_CLEAR), new))
    changed.putpalette(after.getpalette())
    return changed


def _palette(place: Place, colours: Sequence[str]) -> Any:
    """An image whose palette has the landscape's colours, those of the lines, and greys."""
    lines = np.array([to_rgb(colour) for colour in (*colours, "#ffd400")])
    blends = [lines, *(share * lines + (1 - share) for share in (0.35, 0.7))]
    greys = np.linspace(0, 1, 12)[:, None] * np.ones(3)
    found = np.concatenate([*blends, greys]) * 255
    below = np.unique(ground(place).reshape(-1, 3), axis=0)
    image = Image.new("P", (1, 1))
    used = np.concatenate([found.round(), below]).astype(np.uint8)
    # The rest repeats the first, which is never chosen instead of it; the last is transparent.
    rest = np.broadcast_to(used[:1], (_CLEAR + 1 - len(used), 3))
    image.putpalette(np.concatenate([used, rest]).tobytes())
    return image


def _track(numbers: Numbers, place: Place, method: str) -> Float:
    """Positions at `Settings.times`, with the value that was chosen for the shown budget."""
    where = numbers.places.index(place.name), list(numbers.methods).index(method)
    chosen = numbers.chosen(place.name, method, numbers.settings.shown)
    found = numbers.positions[(*where, chosen, place.own_noise)]
    return numbers_lib.unrounded(found, place.view)


def _until(track: Float, moment: float) -> Float:
    """The track until a moment between two of its positions."""
    whole = int(moment)
    part = track[: whole + 1]
    if whole + 1 < len(track):
        between = track[whole] + (moment - whole) * (track[whole + 1] - track[whole])
        part = np.concatenate([part, between[None]])
    return _finite(part) if len(_finite(part)) else track[:1]


def ranking(numbers: Numbers, place: str, budget: int) -> list[Row]:
    """Rows of the summary, the lowest excess on held-out starts first.

    Among equals the one that was lower with the next smaller budget, and so on.
    """
    smaller = [b for b in numbers.settings.budgets if b <= budget][::-1]

    def key(row: Row) -> Any:
        rows = (numbers.row(place, row["method"], b) for b in smaller)
        return [*(r["log10_excess"] for r in rows if r), row["method"]]

    rows = [row for m in numbers.methods if (row := numbers.row(place, m, budget))]
    return sorted(rows, key=key)
