"""Real sizes and GPU tests run when their marker is asked for (-m full, -m gpu), and say so otherwise."""

from __future__ import annotations

import pytest

REASONS = {"full": "real sizes: run with -m full", "gpu": "needs a CUDA device: run with -m gpu"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    for item in items:
        for marker, reason in REASONS.items():
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))
