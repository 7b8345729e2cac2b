"""One table of step costs from the folders that ``optgrad bench step --output`` wrote.

    python benchmarks/step_table.py FOLDER ... > table.md

A row for each method, a column for each tree: the time of a step over Adam's, and that over the
ratio of their memory traffic. Of a method that several folders have on one tree, the last counts;
every folder's revision is listed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PARAM_DTYPE, STATE_DTYPE = "float32", "default"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured in float32, with the methods' own types of state."""
    rows = json.loads((folder / "step.json").read_text())["rows"]
    return [r for r in rows if (r["param_dtype"], r["state_dtype"]) == (PARAM_DTYPE, STATE_DTYPE)]


def cell(row: dict[str, Any] | None) -> str:
    """``× Adam (÷ bound)``."""
    if row is None:
        return "–"
    over = "" if row["over_bound"] is None else f" ({row['over_bound']:.2f})"
    return f"{row['ratio']:.2f}{over}"


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    found: dict[str, dict[str, Any]] = {}
    trees: dict[str, None] = {}
    for folder in folders:
        for row in rows_of(folder):
            found.setdefault(row["method"], {})[row["tree"]] = row
            trees[row["tree"]] = None
    print("# What a step costs: all methods\n")
    print(f"| method | state, bytes on {next(iter(trees))} | bound |", " | ".join(trees), "|")
    print("|---" * (len(trees) + 3) + "|")
    for method, by_tree in found.items():
        row = next(iter(by_tree.values()))
        bound = "–" if row["bound_ratio"] is None else f"{row['bound_ratio']:.2f}"
        cells = [cell(by_tree.get(tree)) for tree in trees]
        print(f"| `{method}` | {row['state_bytes']:,} | {bound} |", " | ".join(cells), "|")
    for folder in folders:
        environment = json.loads((folder / "step.json").read_text())["environment"]
        about = ", ".join(f"{key} {environment[key]}" for key in ("revision", "jax", "platform"))
        print(f"\n{folder.name}: {about}", end="")
    print()


if __name__ == "__main__":
    main()
