"""``helmr token``: create, get, list, complete, cancel."""

from __future__ import annotations

from typing import Any

import click

from cli.options import DURATION, Choice, Group, ask, flags
from cli.output import age, compact, json_value, line, moment, note, show, table, to_json
from cli.payload import metadata_of, payload_of
from cli.references import RUN, SESSION, TOKEN
from helmr.models import Token

_STATUSES = ["pending", "completed", "cancelled", "expired"]


@click.group(cls=Group)
def token() -> None:
    """Create, show, list, complete and cancel tokens: what runs wait for that somebody outside completes."""


@token.command()
@click.option(
    "--timeout", type=DURATION, default="7d", show_default=True, metavar="D", help="How long it can be completed."
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Can be given several times.")
@click.option("--metadata-json", metavar="JSON", help="For whoever completes it: an object.")
def create(timeout: float, tags: tuple[str, ...], metadata_json: str | None) -> None:
    """Make a token that no run made; prints its id, and on stderr the secret that completes it over HTTP.

    The secret is shown this once. A task waits for the token with tokens.get(id).wait().
    """
    metadata = metadata_of(metadata_json, example='{"for": "ada"}')
    made = ask(lambda client: client.tokens.create(timeout=timeout, tags=tags, metadata=metadata))
    if flags().json:
        json_value(made)
        return
    line(made.token.id)
    note(f"secret: {made.secret}")


@token.command()
@click.argument("token_id", metavar="TOKEN", type=TOKEN)
def get(token_id: str) -> None:
    """Show a token."""
    _show(ask(lambda client: client.tokens.get(token_id)))


@token.command("list")
@click.option("--status", type=Choice(_STATUSES), help="Only these.")
@click.option("--tag", metavar="TAG", help="Only those that have it.")
@click.option("--run", metavar="RUN", type=RUN, help="Only those that this run made.")
@click.option("--session", metavar="SESSION", type=SESSION, help="Only those that runs of this session made.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(**filters: Any) -> None:
    """List tokens, newest first, without the data they were completed with."""
    found = ask(lambda client: client.tokens.list(**filters))
    if flags().json:
        json_value(found)
        return
    rows = [
        (
            each.id,
            each.status,
            each.run_id,
            ", ".join(each.tags),
            f"{each.expires_at:%Y-%m-%d %H:%M}",
            age(each.created_at),
        )
        for each in found
    ]
    table(("TOKEN", "STATUS", "RUN", "TAGS", "EXPIRES", "CREATED"), rows)


@token.command()
@click.argument("token_id", metavar="TOKEN", type=TOKEN)
@click.option("--data", "pairs", multiple=True, metavar="KEY=VALUE", help="A field; JSON where it can be; a.b=1 nests.")
@click.option("--data-json", metavar="JSON", help="The whole data.")
@click.option("--data-file", metavar="FILE", help="The whole data as JSON from a file; - reads stdin.")
def complete(token_id: str, pairs: tuple[str, ...], data_json: str | None, data_file: str | None) -> None:
    """Complete a token; a run that waits for it goes on. The same data again changes nothing, other data is a conflict."""
    data: Any = payload_of(pairs, data_json, data_file, name="data")
    _show(ask(lambda client: client.tokens.complete(token_id, data)))


@token.command()
@click.argument("token_id", metavar="TOKEN", type=TOKEN)
@click.option("--reason", metavar="TEXT", help="Kept with the token, and told to a run that waits for it.")
def cancel(token_id: str, reason: str | None) -> None:
    """Cancel a token."""
    _show(ask(lambda client: client.tokens.cancel(token_id, reason=reason)))


def _show(shown: Token) -> None:
    show(
        shown,
        {
            "id": shown.id,
            "status": shown.status,
            "reason": shown.reason,
            "scope": f"{shown.project}/{shown.environment}",
            "run": shown.run_id,
            "session": shown.session_id,
            "tags": ", ".join(shown.tags) or None,
            "metadata": compact(shown.metadata),
            "data": to_json(shown.data) if shown.status == "completed" else None,
            "created": moment(shown.created_at),
            "expires": f"{shown.expires_at:%Y-%m-%d %H:%M:%S} UTC",
            "finished": moment(shown.finished_at),
        },
    )
