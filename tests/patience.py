"""Waiting in tests for what another process does: nothing tells us when."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], *, timeout: float = 15.0) -> None:
    """Return as soon as ``condition`` holds; fail when it does not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {timeout:g} s"
        time.sleep(0.02)
