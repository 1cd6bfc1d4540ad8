"""The S3 service that tests of artifacts share, and the environment that leads to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from bus.s3_place import S3Place
from tests.conftest import SHARED


class S3Service(msgspec.Struct, frozen=True, kw_only=True):
    """Where it is, and the credentials it takes."""

    endpoint: str
    bucket: str
    key: str
    secret: str

    def place(self, prefix: str = "", *, bucket: str | None = None, endpoint: str | None = None) -> S3Place:
        """A place in it."""
        return S3Place(
            bucket=bucket or self.bucket, prefix=prefix, endpoint=endpoint or self.endpoint, region="us-east-1"
        )

    def allow(self, patch: pytest.MonkeyPatch) -> None:
        """Put the credentials into the environment."""
        patch.setenv("AWS_ACCESS_KEY_ID", self.key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", self.secret)


@contextmanager
def serving() -> Iterator[S3Service]:
    """A service that ends with the block."""
    command = [sys.executable, "-m", "tests.integration.s3_process", SHARED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield msgspec.convert(json.loads(process.stdout.readline()), S3Service)
        finally:
            process.kill()
