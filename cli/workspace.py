"""``helmr workspace``: list, get, stop."""

from __future__ import annotations

import click

from cli.options import Group, ask, flags
from cli.output import age, json_value, moment, note, record, table, working
from cli.references import WORKSPACE
from helmr.models import Workspace


@click.group(cls=Group)
def workspace() -> None:
    """List, show and stop workspaces."""


@workspace.command("list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(limit: int) -> None:
    """List workspaces, newest first."""
    found = ask(lambda client: client.workspaces.list(limit=limit))
    if flags().json:
        json_value(found)
        return
    rows = [
        (each.id, each.sandbox, each.state, each.worker, age(each.created_at), age(each.updated_at)) for each in found
    ]
    table(("WORKSPACE", "SANDBOX", "STATE", "WORKER", "CREATED", "CHANGED"), rows)


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def get(workspace_id: str) -> None:
    """Show a workspace."""
    _show(ask(lambda client: client.workspaces.get(workspace_id)))


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def stop(workspace_id: str) -> None:
    """End the container of a workspace; its files stay. Refused while a run executes in it."""
    with working(f"stopping {workspace_id}"):
        stopped = ask(lambda client: client.workspaces.stop(workspace_id))
    if flags().json:
        json_value(stopped)
    else:
        note(f"{stopped.id} is {stopped.state}; its files stay")


def _show(shown: Workspace) -> None:
    if flags().json:
        json_value(shown)
        return
    record(
        {
            "id": shown.id,
            "state": shown.state,
            "sandbox": shown.sandbox,
            "scope": f"{shown.project}/{shown.environment}",
            "mounted at": shown.mount_path,
            "worker": shown.worker,
            "host": shown.host,
            "version": shown.version,
            "created": moment(shown.created_at),
            "changed": moment(shown.updated_at),
        }
    )
