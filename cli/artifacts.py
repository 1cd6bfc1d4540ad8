"""The option ``--artifacts`` of server and worker, and the look at the place it names before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.output import note
from helmr.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from bus.s3_place import Place, S3Place

#: Seconds that a service gets to answer before a part starts without it.
_PATIENCE = 5.0

F = TypeVar("F", bound=Callable[..., Any])


class PlaceType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A folder, or a place in S3."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | S3Place:  # noqa: ARG002
        """The place."""
        from bus.s3_place import place_of

        return place_of(str(value))


def artifacts_option(command: F) -> F:
    """Add ``--artifacts``."""
    return click.option(
        "--artifacts",
        type=PlaceType(),
        metavar="PLACE",
        envvar="HELMR_ARTIFACTS",
        help="Keep archives and versions there: a folder that server and workers share, or s3://BUCKET/PREFIX (needs"
        " helmr[s3]); default: in NATS. The same for all of them.",
    )(command)


async def look_at(place: Place) -> None:
    """Look whether a place can be used; one that does not answer right now is told of, and may come back.

    Raises:
        ConfigError, NotAllowed: it cannot be used.
    """
    from bus.s3_place import S3Place

    if not isinstance(place, S3Place):
        return
    from bus.s3_artifacts import S3Artifacts

    try:
        await S3Artifacts(place, retries=_PATIENCE).check()
    except Unavailable as error:
        note(f"artifacts: {error.message}; going on, and asking again when something is to be stored")
