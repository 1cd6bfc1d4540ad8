"""Where artifacts are kept, as people write it: ``s3://BUCKET/PREFIX?endpoint=URL&region=NAME``, or the path of a folder.

Apart from the store itself, because commands read it without the library that talks to S3.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, urlsplit

import msgspec

from helmr.errors import ConfigError

_SCHEME = "s3://"
_EXAMPLE = "s3://BUCKET/PREFIX, or s3://BUCKET/PREFIX?endpoint=http://127.0.0.1:9000&region=eu-central-1"
#: What S3 allows, and what its imitations allow beyond that.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_SETTINGS = {"endpoint", "region"}


class S3Place(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket, or what is below a prefix in it; credentials are no part of it."""

    bucket: str
    prefix: str = ""
    #: URL of a service other than Amazon's.
    endpoint: str | None = None
    region: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The place that an URL names.

        Raises:
            ConfigError: it is not of this form, or has credentials in it.
        """
        parts = urlsplit(text)
        if "@" in parts.netloc:
            hint = (
                "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: everybody can read a command line"
            )
            raise ConfigError("a place for artifacts must not have credentials in its URL", hint=hint)
        settings = dict(parse_qsl(parts.query, keep_blank_values=True))
        wrong = "its bucket" if not _BUCKET.fullmatch(parts.netloc) else next(iter(settings.keys() - _SETTINGS), None)
        endpoint = settings.get("endpoint")
        if endpoint is not None and urlsplit(endpoint).scheme not in {"http", "https"}:
            wrong = "its endpoint, which is no http:// or https:// URL"
        if wrong or parts.fragment:
            raise ConfigError(f"{text!r} is no place for artifacts: {wrong or parts.fragment}", hint=f"use {_EXAMPLE}")
        return cls(
            bucket=parts.netloc, prefix=parts.path.strip("/"), endpoint=endpoint, region=settings.get("region") or None
        )

    def below(self, name: str) -> Self:
        """The part of it that is called ``name``."""
        return msgspec.structs.replace(self, prefix=f"{self.prefix}/{name}".strip("/"))

    def __str__(self) -> str:
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"{_SCHEME}{self.bucket}/{self.prefix}".rstrip("/") + at


#: None is the default, NATS.
Place = Path | S3Place | None


def place_of(text: str) -> Path | S3Place:
    """A place as ``--artifacts`` names it.

    Raises:
        ConfigError: it is neither a folder nor a place in S3.
    """
    if text.startswith(_SCHEME):
        return S3Place.parse(text)
    if "://" in text:
        raise ConfigError(f"{text!r} is no place for artifacts", hint=f"use a folder, or {_EXAMPLE}")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"artifacts cannot be kept in {text}: it is no folder", hint=f"use a folder, or {_EXAMPLE}")
    return path
