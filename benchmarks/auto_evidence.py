"""Tables and figures of the studies that `auto_suite.py` ran: how good no tuning is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from optgrad.experiments import gaps, plots, profiles, report, results, stored
from optgrad.experiments.compare import Comparison

AUTO, PLANNED = "auto", "auto, total_steps"
RATE_FREE = ("auto", "parameter_free")  # groups
TUNED = ("constant", "cosine")
GROUPS = (*RATE_FREE, *TUNED)
BAR, BAR_COSINE = 1.0, 0.3  # percent; the second on images, with total_steps
BEST = ("best parameter-free", "best constant rate", "best cosine")
FACTORS = (1.0, 1.1, 1.5, 2.0, 5.0)  # of the profile's table
_LARGEST = 1000.0  # percent, in the picture of the gaps
_NEAR = 2.0  # the last factor of the near view of the profiles
_COLUMNS = 4  # of the picture of all curves


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One study: the comparison of each group that was run, and of which revision it is."""

    name: str
    groups: Mapping[str, Comparison]
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def any(self) -> Comparison:
        """One of them, for what they have in common."""
        return next(iter(self.groups.values()))

    @property
    def kind(self) -> gaps.Kind:
        """How its gaps are measured."""
        return gaps.kind_of(self.any.score)

    def results(self, *groups: str) -> dict[str, gaps.Result]:
        """Label -> what it reached, of the optimizers of these groups."""
        found = {}
        for group in groups:
            if comparison := self.groups.get(group):
                metric = comparison.score.name
                for outcome in comparison.outcomes:
                    values, final = np.empty((0, 1)), outcome.tuned.final
                    if final is not None:
                        values = final.history.metrics[metric]
                    label = outcome.config.label
                    found[label] = gaps.Result(label, values[:, 0].tolist(), values[:, -1].tolist())
        return found

    def best(self, group: str) -> gaps.Result | None:
        """The best one of a group."""
        return gaps.best(self.results(group).values(), self.kind)

    def rate(self, group: str, label: str) -> float | None:
        """What was tuned for it."""
        outcomes = self.groups[group].outcomes
        found: float | None = next(o.tuned.best for o in outcomes if o.config.label == label)
        return found


def read(folder: Path, names: Sequence[str]) -> list[Evidence]:
    """The studies of which something is finished in a folder, in the order of their names."""
    found = []
    for name in names:
        studies = {
            group: stored.load_study(folder / name / group)
            for group in GROUPS
            if (folder / name / group / results.SUMMARY).is_file()
        }
        if studies:
            groups = {group: study.comparison for group, study in studies.items()}
            revisions = {group: study.environment["revision"] for group, study in studies.items()}
            found.append(Evidence(name, groups, revisions))
    return found


# The numbers ------------------------------------------------------------------------------------


def gap_rows(studies: Sequence[Evidence]) -> list[dict[str, object]]:
    """A record for each study, optimizer without a tuned rate, and group of tuned ones."""
    rows = []
    for study in studies:
        for group in TUNED:
            best = study.best(group)
            if best is None:
                continue
            for label, result in study.results(*RATE_FREE).items():
                found = gaps.gap(result, best, study.kind)
                bar = bar_of(study, group, label)
                rows.append({
                    "study": study.name, "optimizer": label, "against": group,
                    "best": best.label, "kind": study.kind, "percent": found.percent,
                    "error": found.error, "ratio": found.ratio, "bar": bar,
                    "passes": None if bar is None else found.within(bar),
                })  # fmt: skip
    return rows


def bar_of(study: Evidence, group: str, label: str) -> float | None:
    """What is asked of it there; None if nothing is."""
    if group == "constant":
        return BAR if label == AUTO else None
    return BAR_COSINE if label == PLANNED and study.kind == "points" else None


def profile_costs(studies: Sequence[Evidence], labels: Sequence[str]) -> dict[str, list[float]]:
    """Label -> its cost on each study: share of errors, loss or excess; ∞ where it failed."""
    costs: dict[str, list[float]] = {label: [] for label in labels}
    for study in studies:
        found = study.results(*RATE_FREE)
        for label in labels:
            value = gaps.typical(found[label], study.kind)
            costs[label].append(1.0 - value if study.kind == "points" else value)
    return costs


def common_labels(studies: Sequence[Evidence]) -> list[str]:
    """The optimizers that all studies have and that know neither a rate nor the budget."""
    everywhere = [study.results(*RATE_FREE) for study in studies]
    common = [name for name in everywhere[0] if all(name in found for found in everywhere)]
    return [name for name in common if name != PLANNED]


def share_at(profile: profiles.Profile, factor: float) -> float:
    """The profile's value at a factor of at least 1."""
    return float(profile.shares[np.searchsorted(profile.factors, factor, side="right") - 1])


def first_below(mine: profiles.Profile, other: profiles.Profile) -> float | None:
    """The smallest factor at which a profile is below another; None if it is nowhere."""
    factors = np.union1d(mine.factors, other.factors)
    below = (f for f in factors if share_at(mine, f) < share_at(other, f))
    return next((float(factor) for factor in below), None)


# Tables -----------------------------------------------------------------------------------------


def _best_text(study: Evidence, group: str) -> str:
    best = study.best(group) if group in study.groups else None
    if best is None:
        return "–"
    text = f"{best.label} {_score(study, best)}"
    return text + (f" at {study.rate(group, best.label):.2g}" if group in TUNED else "")


def _score(study: Evidence, result: gaps.Result | None) -> str:
    if result is None:
        return "–"
    if result.failed:
        return "diverged"
    return study.any.score.text(gaps.typical(result, study.kind))


def scores_table(studies: Sequence[Evidence]) -> str:
    """What was reached."""
    header = ("study", "score", AUTO, PLANNED, "best constant rate", "best cosine",
              "best parameter-free")  # fmt: skip
    rows = []
    for study in studies:
        found = study.results("auto")
        rows.append([
            study.name, study.any.score.heading, *(_score(study, found.get(label))
            for label in (AUTO, PLANNED)),
            *(_best_text(study, group) for group in ("constant", "cosine", "parameter_free")),
        ])  # fmt: skip
    return report.markdown_table(header, rows)


def percent(value: float) -> str:
    """A gap for a table, three digits at most.

    Examples:
      >>> percent(0.123), percent(-3.21), percent(1234.0), percent(math.inf)
      ('+0.12', '-3.21', '+1.2e+03', 'diverged')
    """
    if math.isinf(value):
        return "diverged"
    return f"{value:+.2f}" if abs(value) < 100 else f"{value:+.2g}"


def verdicts_table(rows: Sequence[Mapping[str, object]]) -> str:
    """The bar: `auto` against the best constant rate, and where it is asked for, the cosine."""
    header = ("study", "optimizer", "against", "behind [%]", "±", "ratio of the excess", "bar [%]",
              "passes")  # fmt: skip
    lines = []
    for row in rows:
        if row["bar"] is None:
            continue
        ratio = float(row["ratio"])
        lines.append([
            row["study"], row["optimizer"], f"{row['best']}, {row['against']}",
            percent(row["percent"]), f"{row['error']:.2f}",
            f"{ratio:.3g}" if math.isfinite(ratio) else "", f"{row['bar']:g}",
            "yes" if row["passes"] else "**no**",
        ])  # fmt: skip
    return report.markdown_table(header, lines)


def matrix_table(rows: Sequence[Mapping[str, object]], against: str) -> str:
    """How far each optimizer without a tuned rate is behind the best of a group, in percent."""
    chosen = [row for row in rows if row["against"] == against]
    labels = list(dict.fromkeys(row["optimizer"] for row in chosen))
    by_study: dict[str, dict[str, float]] = {}
    for row in chosen:
        by_study.setdefault(row["study"], {})[row["optimizer"]] = row["percent"]
    lines = [
        [study, *(percent(found[label]) if label in found else "–" for label in labels)]
        for study, found in by_study.items()
    ]
    columns = [[found[label] for found in by_study.values() if label in found] for label in labels]
    lines.append(["**worst**", *(percent(max(column)) for column in columns)])
    lines.append(["**median**", *(percent(float(np.median(column))) for column in columns)])
    within = (f"{sum(x <= BAR for x in column)} of {len(column)}" for column in columns)
    lines.append([f"**within {BAR:g} %**", *within])
    return report.markdown_table(("study", *labels), lines)


def profile_table(found: Mapping[str, profiles.Profile]) -> str:
    """The shares at some factors, the last factor, and whether `auto` is nowhere below."""
    header = ("optimizer", *(f"τ = {factor:g}" for factor in FACTORS), "all within",
              "auto is nowhere below")  # fmt: skip
    lines = []
    for label, profile in found.items():
        last = f"{profile.factors[-1]:.3g}" if profile.shares[-1] == 1.0 else "never"
        verdict = ""
        if label != AUTO and AUTO in found:
            below = first_below(found[AUTO], profile)
            verdict = "yes" if below is None else f"**no**, at τ = {below:.3g}"
        shares = (f"{share_at(profile, factor):.2f}" for factor in FACTORS)
        lines.append([label, *shares, last, verdict])
    return report.markdown_table(header, lines)


def times_table(studies: Sequence[Evidence]) -> str:
    """How long each took, and which chosen rates lie at an edge of what was tried."""
    header = ("study", "steps", "batch", *(f"{group} [s]" for group in GROUPS), "rates at an edge")
    lines = []
    for study in studies:
        seconds = []
        for group in GROUPS:
            outcomes = study.groups[group].outcomes if group in study.groups else ()
            seconds.append(f"{sum(o.seconds for o in outcomes):.0f}" if outcomes else "not run")
        edges = [f"{o.config.label} ({group})" for group in TUNED if group in study.groups
                 for o in study.groups[group].outcomes if o.tuned.at_edge]  # fmt: skip
        settings = study.any.config
        sizes = str(settings.steps), str(settings.batch_size)
        lines.append([study.name, *sizes, *seconds, ", ".join(edges)])
    return report.markdown_table(header, lines)


# Figures ----------------------------------------------------------------------------------------


def gaps_figure(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Each study a line: how far each optimizer without a tuned rate is behind, in percent."""
    studies = list(dict.fromkeys(row["study"] for row in rows))
    labels = list(dict.fromkeys(row["optimizer"] for row in rows))
    groups = [group for group in TUNED if any(row["against"] == group for row in rows)]
    figure = Figure(figsize=(5.2 * len(groups) + 2.5, 1.6 + 0.24 * len(studies)))
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
        for number, label in enumerate(labels):
            chosen = [r for r in rows if r["against"] == group and r["optimizer"] == label]
            values = [min(float(row["percent"]), _LARGEST) for row in chosen]
            places = [studies.index(row["study"]) for row in chosen]
            is_own = label.startswith(AUTO)
            axis.plot(
                values, places, "s" if is_own else "o", color=plots.look(number)["color"],
                markersize=7 if is_own else 4.5, label=label, zorder=3 if is_own else 2,
                markerfacecolor=None if number % 2 == 0 else "white",
            )  # fmt: skip
        axis.axvline(BAR, color="0.3", linewidth=1, linestyle="--")
        axis.set_xscale("symlog", linthresh=1.0)
        failed = any(math.isinf(row["percent"]) for row in rows if row["against"] == group)
        note = f"; diverged: at {_LARGEST:g}" if failed else ""
        axis.set(title=f"behind the best {group} rate", xlabel=f"percent (dashed: 1{note})")
    axes[0].set_yticks(range(len(studies)), studies)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    return figure


def profile_figure(found: Mapping[str, profiles.Profile]) -> Figure:
    """The performance profiles, near the best and whole; `auto`'s line the thickest."""
    figure = Figure(figsize=(10.5, 3.8))
    near, whole = figure.subplots(1, 2, sharey=True)
    last = 1.2 * max([_NEAR, *(p.factors[-1] for p in found.values())])
    for number, (label, profile) in enumerate(found.items()):
        factors = np.append(profile.factors, last)
        shares = np.append(profile.shares, profile.shares[-1])
        line = plots.look(number) | {"linewidth": 2.5 if label == AUTO else 1.3}
        for axis in (near, whole):
            axis.step(factors, shares, where="post", label=label, **line)
    near.set(xlim=(0.98, _NEAR), ylim=(-0.02, 1.02), ylabel="share of studies")
    whole.set(xscale="log")
    for axis in (near, whole):
        axis.set_xlabel("factor τ of the best cost")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper")
    return figure


def shown_curves(study: Evidence) -> dict[str, tuple[str, str]]:
    """Title -> (group, label) of what the picture of its curves has."""
    shown = {label: ("auto", label) for label in study.results("auto")}
    for title, group in zip(BEST, GROUPS[1:], strict=True):
        if best := study.best(group):
            shown[title] = (group, best.label)
    return shown


def curve(study: Evidence, group: str, label: str) -> tuple[list[int], list[float]] | None:
    """Steps and the mean score of the final runs; of an excess the geometric mean."""
    outcome = next(o for o in study.groups[group].outcomes if o.config.label == label)
    if (final := outcome.tuned.final) is None:
        return None
    values = final.history.metrics[study.any.score.name]
    if study.kind == "decades":
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.exp(np.mean(np.log(values), axis=0))
    else:
        means = np.mean(values, axis=0)
    return final.history.steps.tolist(), means.tolist()


def curves_figure(studies: Sequence[Evidence]) -> Figure:
    """A panel for each study: `auto` and the best of each group."""
    count = math.ceil(len(studies) / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.3 * count + 0.6))
    axes = figure.subplots(count, _COLUMNS, squeeze=False).ravel()
    titles = (AUTO, PLANNED, *BEST)
    shown = {}
    for axis, study in zip(axes, studies, strict=False):
        for title, (group, label) in shown_curves(study).items():
            if found := curve(study, group, label):
                (line,) = axis.plot(*found, **plots.look(titles.index(title)))
                shown.setdefault(title, line)
        axis.set_yscale("linear" if study.kind == "points" else "log")
        axis.set_title(study.name, fontsize=8)
        axis.set_ylabel(study.any.score.title, fontsize=7)
    for axis in axes[len(studies) :]:
        axis.axis("off")
    figure.legend([shown[t] for t in titles if t in shown], [t for t in titles if t in shown],
                  loc="outside lower center", ncols=len(titles))  # fmt: skip
    return figure


# Everything -------------------------------------------------------------------------------------


def record(study: Evidence) -> dict[str, object]:
    """What is kept of a study: scores by seed, chosen rates, mean curves of the final runs."""
    optimizers = []
    for group in study.groups:
        for label, result in study.results(group).items():
            found = curve(study, group, label)
            optimizers.append({
                "optimizer": label, "group": group,
                "rate": study.rate(group, label),
                "finals": [float(f"{x:.6g}") for x in result.finals],
                "steps": found[0] if found else [],
                "mean": [float(f"{x:.6g}") for x in found[1]] if found else [],
            })  # fmt: skip
    return {
        "study": study.name, "score": study.any.score.name, "revisions": dict(study.revisions),
        "optimizers": optimizers,
    }  # fmt: skip


def text_of(
    studies: Sequence[Evidence], rows: Sequence[Mapping[str, object]], missing: Sequence[str],
    found: Mapping[str, profiles.Profile], compared: Sequence[str],
) -> str:  # fmt: skip
    """The report, Markdown."""
    revisions = sorted({revision for s in studies for revision in s.revisions.values()})
    lines = [
        "# No tuning against tuned peers", "",
        "Written by `python benchmarks/auto_suite.py evidence`; the studies are in `configs/auto` "
        f"or a folder of it, run at {', '.join(revisions) or 'unknown revisions'}. Means over the "
        "final runs, of an excess the geometric mean.", "",
        "## What was reached", "", scores_table(studies), "",
        "## The bar", "",
        "Behind, in percent: of an accuracy, points; of a loss, the relative difference; of an "
        "excess over a known minimum, the share of the best one's decades that is missing. "
        "Negative is ahead; ± is a standard error, from the spread over seeds.", "",
        verdicts_table(rows) if rows else "", "",
    ]  # fmt: skip
    for group in TUNED:
        if any(row["against"] == group for row in rows):
            lines += [f"## Behind the best {group} rate, in percent", "",
                      matrix_table(rows, group), ""]  # fmt: skip
    lines += ["![gaps](gaps.png)", ""] if rows else []
    if found:
        lines += ["## Performance profile", "",
                  "The share of studies on which the cost (share of errors, loss or excess, mean "
                  "over seeds) is within the factor τ of the smallest of these optimizers. The "
                  f"large factors are those of the excess. Over {', '.join(compared)}.", "",
                  profile_table(found), "", "![profile](profile.png)", ""]  # fmt: skip
    lines += ["## Curves", "", "![curves](curves.png)", "",
              "## Times, and what is missing", "", times_table(studies), ""]  # fmt: skip
    lines += [f"Not run: {', '.join(missing)}.", ""] if missing else []
    return "\n".join(lines)


def write(folder: Path, names: Sequence[str], output: Path) -> None:
    """Writes report, tables and figures of all studies that are finished in a folder."""
    studies = read(folder, names)
    if not studies:
        raise SystemExit(f"FOLDER = {folder} holds no finished study of {', '.join(names)}")
    rows = gap_rows(studies)
    compared = [s for s in studies if all(group in s.groups for group in RATE_FREE)]
    labels = common_labels(compared) if compared else []
    found = profiles.performance_profiles(profile_costs(compared, labels)) if labels else {}
    output.mkdir(parents=True, exist_ok=True)
    results.write_csv(output / "gaps.csv", rows)
    results.write_json(output / "results.json", [record(study) for study in studies])
    missing = [name for name in names if name not in {study.name for study in studies}]
    text = text_of(studies, rows, missing, found, [study.name for study in compared])
    (output / "report.md").write_text(text, encoding="utf-8")
    with mpl.rc_context(plots.STYLE):
        plots.save(curves_figure(studies), output / "curves.png")
        if rows:
            plots.save(gaps_figure(rows), output / "gaps.png")
        if found:
            plots.save(profile_figure(found), output / "profile.png")
    print(text)
