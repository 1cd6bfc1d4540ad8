"""Places for artifacts, as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.s3_place import S3Place, place_of
from helmr.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://agents", S3Place(bucket="agents")),
        ("s3://agents/", S3Place(bucket="agents")),
        ("s3://agents/a/b/", S3Place(bucket="agents", prefix="a/b")),
        (
            "s3://agents/x?endpoint=http://127.0.0.1:9000&region=eu-central-1",
            S3Place(bucket="agents", prefix="x", endpoint="http://127.0.0.1:9000", region="eu-central-1"),
        ),
    ],
)
def test_urls_name_places(text: str, place: S3Place) -> None:
    assert place_of(text) == place


def test_the_parts_of_a_place_are_below_it() -> None:
    assert place_of("s3://agents").below("versions") == S3Place(bucket="agents", prefix="versions")  # type: ignore[union-attr]
    assert str(S3Place(bucket="agents", prefix="a").below("versions")) == "s3://agents/a/versions"
    assert str(S3Place.parse("s3://agents?endpoint=https://minio")) == "s3://agents at https://minio"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://", "its bucket"),
        ("s3:///x", "its bucket"),
        ("s3://a b", "its bucket"),
        ("s3://agents?endpoint=minio:9000", "its endpoint"),
        ("s3://agents?zone=x", "zone"),
        ("gs://agents", "gs://agents"),
    ],
)
def test_what_is_no_place_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="is no place for artifacts") as caught:
        place_of(text)
    assert reason in caught.value.message
    assert "s3://BUCKET/PREFIX" in (caught.value.hint or "")


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="must not have credentials") as caught:
        place_of("s3://key:secret@agents/x")
    assert "secret@" not in caught.value.message


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    assert place_of(str(tmp_path / "new")) == tmp_path / "new"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="it is no folder"):
        place_of(str(tmp_path / "file"))
