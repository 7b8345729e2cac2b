"""What the tests recorded: JSON of one line for each method, so that changes are seen by line."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """Method -> its record; empty if there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Sorted by method."""
    lines = (f'"{name}": {json.dumps(record[name])}' for name in sorted(record))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
