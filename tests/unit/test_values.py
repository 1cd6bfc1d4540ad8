"""Large values that were sent in parts: one piece again, within the documented limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.artifacts import DirectoryArtifacts, digest_of
from bus.values import Values
from helmr.errors import TooLarge, UsageError
from helmr.events import MAX_VALUE, MESSAGE_PART

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(tmp_path: Path) -> DirectoryArtifacts:
    return DirectoryArtifacts(tmp_path)


async def _put(store: DirectoryArtifacts, part: bytes) -> str:
    await store.put_bytes(digest_of(part), part)
    return digest_of(part)


async def test_parts_are_joined_in_their_order_and_nothing_is_stored_by_that(store: DirectoryArtifacts) -> None:
    parts = [await _put(store, part) for part in (b"[1,", b"2,", b"3]")]
    assert await Values(store).join(parts) == b"[1,2,3]"
    assert {each.digest async for each in store.all()} == set(parts)


async def test_a_part_that_is_not_there_is_told(store: DirectoryArtifacts) -> None:
    with pytest.raises(UsageError, match="not there"):
        await Values(store).join([digest_of(b"?")])


async def test_a_value_may_have_the_limit_and_no_byte_more(store: DirectoryArtifacts) -> None:
    most, one = await _put(store, b"x" * MAX_VALUE), await _put(store, b"x")
    assert len(await Values(store).join([most])) == MAX_VALUE
    with pytest.raises(TooLarge, match="16 MiB"):
        await Values(store).join([most, one])
    with pytest.raises(TooLarge, match="16 MiB"):
        await Values(store).join([one] * (MAX_VALUE // MESSAGE_PART + 1))


async def test_parts_beyond_the_limit_are_not_even_read(store: DirectoryArtifacts) -> None:
    most, one = await _put(store, b"x" * MAX_VALUE), await _put(store, b"x")
    with pytest.raises(TooLarge):
        await Values(store).join([most, one, digest_of(b"?")])
