"""Tags: what sessions, tokens and workspaces are found again by, and how many of what length each may have."""

from __future__ import annotations

from collections.abc import Collection

from helmr.errors import TooLarge

#: DESIGN: limits.
MAX_TAGS, MAX_TAG_LENGTH = 10, 128


def check_tags(tags: Collection[str], *, of: str | None = None, hint: str | None = None) -> None:
    """Refuse too many tags, or too long ones; ``of`` says whose they are, e.g. ``a token``.

    Raises:
        TooLarge: with the limits.
    """
    if len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG_LENGTH for tag in tags):
        owner = f"{of} has " if of else ""
        raise TooLarge(f"{owner}at most {MAX_TAGS} tags of {MAX_TAG_LENGTH} characters", hint=hint)
