"""``helmr session input`` and ``helmr session output``: the records of a session's streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.options import Group, ask, flags
from cli.output import json_line, json_value, line, moment, table, to_json
from cli.payload import payload_of
from cli.references import SESSION
from helmr.models import StreamRecord

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient
    from helmr.client.streams import Input, Output


@click.group("input", cls=Group)
def input_() -> None:
    """Send records to a session's runs, and list what was sent."""


@click.group(cls=Group)
def output() -> None:
    """Read the records that a session's runs append."""


@input_.command()
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.argument("stream")
@click.option("--data", "pairs", multiple=True, metavar="KEY=VALUE", help="A field; JSON where it can be; a.b=1 nests.")
@click.option("--data-json", metavar="JSON", help="The whole record.")
@click.option("--data-file", metavar="FILE", help="The whole record as JSON from a file; - reads stdin.")
@click.option("--correlation-id", metavar="ID", help="For the wait that names it.")
@click.option("--idempotency-key", metavar="KEY", help="The same record, sent again with it, is stored once.")
def send(
    session_id: str,
    stream: str,
    *,
    pairs: tuple[str, ...],
    data_json: str | None,
    data_file: str | None,
    **options: Any,
) -> None:
    """Send one record to STREAM of SESSION; prints its id and number.

    A run that waits for it goes on: helmr session input send @last approval --data approved=true
    """
    data = payload_of(pairs, data_json, data_file, name="data")
    sent = ask(lambda client: client.sessions.open(session_id).input(stream).send(data, **options))
    if flags().json:
        json_value(sent)
    else:
        line(f"{sent.id} {sent.sequence}")


@input_.command("list")
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.argument("stream")
@click.option("--correlation-id", metavar="ID", help="Only records that carry it.")
@click.option("--after", type=click.IntRange(0), default=0, help="Only records numbered beyond this.")
@click.option("--limit", type=click.IntRange(1), default=500, show_default=True, help="How many at most.")
def list_input(session_id: str, stream: str, **options: Any) -> None:
    """List the records that were sent to STREAM, oldest first."""
    _show(ask(lambda client: client.sessions.open(session_id).input(stream).list(**options)))


@output.command("list")
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.argument("stream")
@click.option("--follow", is_flag=True, help="Go on, with a JSON line for each record as it comes, until interrupted.")
@click.option("--correlation-id", metavar="ID", help="Only records that carry it.")
@click.option("--after", type=click.IntRange(0), default=0, help="Only records numbered beyond this.")
@click.option("--limit", type=click.IntRange(1), help="No more than this many; default: 500, with --follow no limit.")
def list_output(
    session_id: str, stream: str, *, follow: bool, correlation_id: str | None, after: int, limit: int | None
) -> None:
    """List the records that runs appended to STREAM, oldest first."""
    options: dict[str, Any] = {"correlation_id": correlation_id, "after": after}
    if follow:
        ask(lambda client: _follow(client, session_id, stream, limit, options))
        return
    _show(ask(lambda client: client.sessions.open(session_id).output(stream).list(limit=limit or 500, **options)))


async def _follow(client: AsyncClient, session: str, stream: str, limit: int | None, options: dict[str, Any]) -> None:
    source: Input | Output = client.sessions.open(session).output(stream)
    left = -1 if limit is None else limit
    async for record in source.follow(**options):
        json_line(record)
        left -= 1
        if left == 0:
            return


def _show(found: list[StreamRecord]) -> None:
    if flags().json:
        json_value(found)
        return
    rows = [(each.sequence, each.correlation_id, moment(each.at), each.run_id, to_json(each.data)) for each in found]
    table(("NUMBER", "CORRELATION", "AT", "RUN", "DATA"), rows)
