"""``helmr access``: what lets the outside world do one thing over HTTP; create, get, list, revoke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cli.options import DURATION, Choice, Group, ask, flags
from cli.output import age, json_value, line, moment, note, show, table
from cli.references import ACCESS, SESSION, TOKEN
from helmr.access import Access, NewAccess

_Command = Callable[..., Any]
_STATUSES = ["active", "used_up", "revoked", "expired"]


@click.group(cls=Group)
def access() -> None:
    """Make, list and revoke secrets that let somebody append to one stream, read one stream, or complete one token, over HTTP.

    Where `helmr server --http` listens, and nowhere else: docs/reference/http.md.
    """


@access.group(cls=Group)
def create() -> None:
    """Make an access token; prints its id, and on stderr its secret, which is shown this once."""


def _limits(command: _Command) -> _Command:
    """The options that all of them have."""
    options = (
        click.option(
            "--uses", type=click.IntRange(1, 100), metavar="N", help="How often; default: any number of times."
        ),
        click.option(
            "--expires",
            "expires_in",
            type=DURATION,
            default="1h",
            show_default=True,
            metavar="D",
            help="How long it can be used, at most 365d.",
        ),
        click.option("--note", metavar="TEXT", help="What it is for, or who has it."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@create.command("input")
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.argument("stream")
@click.option("--correlation-id", metavar="ID", help="Every record that is appended carries it.")
@_limits
def create_input(session_id: str, stream: str, **options: Any) -> None:
    """For appending to the input stream STREAM of SESSION.

    \b
    Make it, and use it:
      helmr access create input @last approval --uses 1
      curl -d '{"approved": true}' -H 'Authorization: Bearer SECRET' URL/v1/sessions/SESSION/input/STREAM
    """
    _made(ask(lambda client: client.access.for_input(session_id, stream, **options)))


@create.command("output")
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.argument("stream")
@click.option("--correlation-id", metavar="ID", help="Only records that carry it.")
@_limits
def create_output(session_id: str, stream: str, **options: Any) -> None:
    """For reading and following the output stream STREAM of SESSION.

    \b
    Make it, and use it:
      helmr access create output @last report --expires 1d
      curl -N -H 'Accept: text/event-stream' -H 'Authorization: Bearer SECRET' URL/v1/sessions/SESSION/output/STREAM
    """
    _made(ask(lambda client: client.access.for_output(session_id, stream, **options)))


@create.command("token")
@click.argument("token_id", metavar="TOKEN", type=TOKEN)
@_limits
def create_token(token_id: str, **options: Any) -> None:
    """For completing TOKEN. Unlike the token's own secret it can be revoked, and have a shorter life.

    \b
    Use it:
      curl -d '{"ok": true}' -H 'Authorization: Bearer SECRET' URL/v1/tokens/TOKEN/complete
    """
    _made(ask(lambda client: client.access.for_token(token_id, **options)))


@access.command()
@click.argument("access_id", metavar="ACCESS", type=ACCESS)
def get(access_id: str) -> None:
    """Show an access token, without its secret."""
    _show(ask(lambda client: client.access.get(access_id)))


@access.command("list")
@click.option("--session", metavar="SESSION", type=SESSION, help="Only those for its streams.")
@click.option("--status", type=Choice(_STATUSES), help="Only these.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(**filters: Any) -> None:
    """List access tokens, newest first; those with the status active can still be used."""
    found = ask(lambda client: client.access.list(**filters))
    if flags().json:
        json_value(found)
        return
    rows = [
        (
            each.id,
            each.status,
            _allows(each),
            _uses(each),
            f"{each.expires_at:%Y-%m-%d %H:%M}",
            each.note,
            age(each.created_at),
        )
        for each in found
    ]
    table(("ACCESS", "STATUS", "ALLOWS", "USED", "EXPIRES", "NOTE", "CREATED"), rows)


@access.command()
@click.argument("access_id", metavar="ACCESS", type=ACCESS)
@click.option("--reason", metavar="TEXT", help="Kept with it.")
def revoke(access_id: str, reason: str | None) -> None:
    """End an access token now; whoever follows a stream with it hears no more."""
    _show(ask(lambda client: client.access.revoke(access_id, reason=reason)))


def _made(made: NewAccess) -> None:
    if flags().json:
        json_value(made)
        return
    line(made.access.id)
    note(f"secret: {made.secret}")


def _allows(shown: Access) -> str:
    where = shown.token_id or f"{shown.stream} of {shown.session_id}"
    return f"{shown.action} {where}"


def _uses(shown: Access) -> str | None:
    return None if shown.uses is None else f"{shown.used}/{shown.uses}"


def _show(shown: Access) -> None:
    show(
        shown,
        {
            "id": shown.id,
            "status": shown.status,
            "reason": shown.reason,
            "allows": _allows(shown),
            "correlation id": shown.correlation_id,
            "used": _uses(shown),
            "note": shown.note,
            "scope": f"{shown.project}/{shown.environment}",
            "created": moment(shown.created_at),
            "expires": f"{shown.expires_at:%Y-%m-%d %H:%M:%S} UTC",
            "finished": moment(shown.finished_at),
        },
    )
