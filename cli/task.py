"""``helmr task``: what the current deployment offers."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import click

from cli.options import Group, ask, flags
from cli.output import json_value, record, table, to_json
from cli.references import TASK
from helmr.durations import format_seconds
from helmr.errors import NotFound


@click.group(cls=Group)
def task() -> None:
    """List and show the tasks of the current deployment."""


@task.command("list")
def list_() -> None:
    """List the tasks of the current deployment."""
    found = entries("tasks")
    if flags().json:
        json_value(found)
        return
    rows = [
        (
            each["id"],
            each["sandbox"],
            format_seconds(each["max_duration"]),
            f"{each['file']}:{each['line']}",
            each["doc"],
        )
        for each in found
    ]
    table(("TASK", "SANDBOX", "MAX", "DEFINED", "WHAT IT DOES"), rows)


@task.command()
@click.argument("task_id", metavar="TASK", type=TASK)
def get(task_id: str) -> None:
    """Show a task of the current deployment."""
    shown = find(entries("tasks"), "id", task_id, "task")
    if flags().json:
        json_value(shown)
        return
    retry = shown["retry"]
    record(
        {
            "id": shown["id"],
            "does": shown["doc"] or None,
            "defined": f"{shown['file']}:{shown['line']} ({shown['module']}.{shown['name']})",
            "sandbox": shown["sandbox"],
            "max duration": format_seconds(shown["max_duration"]),
            "ttl": format_seconds(shown["ttl"]) if shown["ttl"] is not None else None,
            "retry": f"{retry['max_attempts']} attempts" if retry else None,
            "queue": shown["queue"],
            "secrets": ", ".join(each["name"] for each in shown["secrets"]) or None,
            "worker lost": shown["on_worker_lost"],
            "payload": _schema(shown["payload_schema"]),
            "output": _schema(shown["output_schema"]),
        }
    )


def _schema(schema: dict[str, Any] | None) -> str:
    return "anything" if schema is None else to_json(schema, indent=True)


def entries(part: str) -> list[dict[str, Any]]:
    """A part of the current deployment's index: ``tasks`` or ``sandboxes``."""
    current = ask(lambda client: client.deployments.get())
    found: list[dict[str, Any]] = current.index[part]
    return found


def find(found: list[dict[str, Any]], key: str, name: str, what: str) -> dict[str, Any]:
    """The entry of this name.

    Raises:
        NotFound: there is none; with the closest one as hint.
    """
    for each in found:
        if each[key] == name:
            return each
    close = get_close_matches(name, [each[key] for each in found], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"list them with `helmr {what} list`"
    raise NotFound(f"the current deployment has no {what} {name!r}", hint=hint)
