"""``helmr deployment``: list, get, promote."""

from __future__ import annotations

import click

from cli.options import Group, ask, flags
from cli.output import age, json_value, moment, note, record, size, table
from cli.references import DEPLOYMENT
from helmr.models import Deployment


@click.group(cls=Group)
def deployment() -> None:
    """List, show and promote deployments."""


@deployment.command("list")
def list_() -> None:
    """List deployments, newest first."""
    found = ask(lambda client: client.deployments.list())
    if flags().json:
        json_value(found)
        return
    rows = [
        (each.version, "current" if each.current else "", each.id, size(each.archive_bytes), age(each.created_at))
        for each in found
    ]
    table(("VERSION", "", "DEPLOYMENT", "SIZE", "CREATED"), rows)


@deployment.command()
@click.argument("version", required=False, type=DEPLOYMENT)
def get(version: str | None) -> None:
    """Show a deployment; without VERSION the current one."""
    _show(ask(lambda client: client.deployments.get(version)))


@deployment.command()
@click.argument("version", type=DEPLOYMENT)
def promote(version: str) -> None:
    """Make VERSION the current deployment; an older one is a rollback. Runs stay on the version they began with."""
    made = ask(lambda client: client.deployments.promote(version))
    if flags().json:
        json_value(made)
    else:
        note(f"{made.project}/{made.environment}: {made.version} is current")


def _show(shown: Deployment) -> None:
    if flags().json:
        json_value(shown)
        return
    index = shown.index
    record(
        {
            "version": shown.version,
            "id": shown.id,
            "current": "yes" if shown.current else "no",
            "scope": f"{shown.project}/{shown.environment}",
            "created": moment(shown.created_at),
            "archive": f"{size(shown.archive_bytes)}, sha-256 {shown.archive}",
            "content": shown.content_hash,
            "tasks": _names(index, "tasks", "id"),
            "sandboxes": _names(index, "sandboxes", "name"),
            "queues": _names(index, "queues", "name"),
            "streams": _names(index, "streams", "name"),
        }
    )


def _names(index: dict[str, list[dict[str, str]]], part: str, key: str) -> str | None:
    return ", ".join(each[key] for each in index.get(part, ())) or None
