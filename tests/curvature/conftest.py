"""The family's own tests are left to the marker ``slow``: most of their time is compilation."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all of this folder; the kernels in tests/core stay in the default run."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
