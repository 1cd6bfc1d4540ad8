"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helmr import registry


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    """What a test declares is forgotten afterwards."""
    registry.clear()
    yield
    registry.clear()
