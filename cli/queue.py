"""``helmr queue``: list, get."""

from __future__ import annotations

import click

from cli.options import Group, ask, flags
from cli.output import age, json_value, record, table
from cli.references import QUEUE
from helmr.models import Queue

#: Rows of each table that ``get`` prints; --json has them all.
_ROWS = 20


@click.group(cls=Group)
def queue() -> None:
    """Show queues: their limits, the slots in use, and the runs that wait for one."""


@queue.command("list")
def list_() -> None:
    """List the queues that are declared, and those that have runs."""
    found = ask(lambda client: client.queues.list())
    if flags().json:
        json_value(found)
        return
    rows = [(each.name, limit(each), each.in_use, each.waiting, age(each.oldest_waiting_at)) for each in found]
    table(("QUEUE", "LIMIT", "IN USE", "WAITING", "OLDEST"), rows)


@queue.command()
@click.argument("name", type=QUEUE)
def get(name: str) -> None:
    """Show a queue: who has its slots, and who waits, by concurrency key."""
    shown = ask(lambda client: client.queues.get(name))
    if flags().json:
        json_value(shown)
        return
    record(
        {
            "name": shown.name,
            "scope": f"{shown.project}/{shown.environment}",
            "limit": limit(shown) if shown.declared else "not declared by the current deployment",
            "in use": shown.in_use,
            "waiting": shown.waiting,
            "oldest": age(shown.oldest_waiting_at) or None,
        }
    )
    if shown.keys:
        click.echo()
        loads = [(each.concurrency_key or "(none)", each.in_use, each.waiting) for each in shown.keys[:_ROWS]]
        table(("KEY", "IN USE", "WAITING"), loads)
    if shown.holders:
        click.echo()
        holders = [
            (each.run_id, each.concurrency_key, each.status, age(each.since), each.worker)
            for each in shown.holders[:_ROWS]
        ]
        table(("RUN", "KEY", "STATUS", "SINCE", "WORKER"), holders)


def limit(shown: Queue) -> str:
    """The limits in a few words."""
    if shown.concurrency_per_key is None:
        return "none" if shown.concurrency is None else f"{shown.concurrency} per key"
    each = f"{shown.concurrency_per_key} per key"
    return each if shown.concurrency is None else f"{shown.concurrency}, {each}"
