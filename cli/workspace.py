"""``helmr workspace``: list, get, change, start, stop; versions, and the files in them; restore and fork; programs in it."""

from __future__ import annotations

from typing import Any

import click

from cli.options import Group, ask, flags
from cli.output import age, compact, json_value, line, moment, note, show, size, table, working
from cli.payload import metadata_of
from cli.references import SANDBOX, TASK, WORKSPACE
from cli.workspace_cp import cp
from cli.workspace_exec import exec_, shell
from cli.workspace_files import files, version_option
from cli.workspace_pty import pty
from helmr.errors import Conflict, UsageError
from helmr.models import Workspace

_METADATA = '{"owner": "ada"}'


@click.group(cls=Group)
def workspace() -> None:
    """Make, list, change, stop workspaces; copy files, run programs in them; look into versions, go back to one, fork one."""


@workspace.command("list")
@click.option("--tag", metavar="TAG", help="With this tag only.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(tag: str | None, limit: int) -> None:
    """List workspaces, newest first."""
    found = ask(lambda client: client.workspaces.list(tag=tag, limit=limit))
    if flags().json:
        json_value(found)
        return
    rows = [
        (each.id, each.sandbox, each.state, each.worker, age(each.created_at), age(each.updated_at)) for each in found
    ]
    table(("WORKSPACE", "SANDBOX", "STATE", "WORKER", "CREATED", "CHANGED"), rows)


@workspace.command()
@click.option("--task", type=TASK, help="Make it from the sandbox of this task.")
@click.option("--sandbox", type=SANDBOX, help="Make it from this sandbox.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Can be given several times.")
@click.option("--metadata-json", metavar="JSON", help="What else to say of it: an object.")
def create(*, metadata_json: str | None, **given: Any) -> None:
    """Make a new, empty workspace, and print its id.

    \b
    Examples:
        helmr workspace create --task fix --tag customer-7 --metadata-json '{"owner": "ada"}'
        helmr workspace cp . $(helmr workspace create --sandbox reviewer):
    """
    metadata = metadata_of(metadata_json, example=_METADATA)
    _made(ask(lambda client: client.workspaces.create(metadata=metadata, **given)))


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def get(workspace_id: str) -> None:
    """Show a workspace."""
    _show(ask(lambda client: client.workspaces.get(workspace_id)))


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.option("--tag", "tag", multiple=True, metavar="TAG", help="Add it. Can be given several times.")
@click.option("--untag", "untag", multiple=True, metavar="TAG", help="Remove it. Can be given several times.")
@click.option("--metadata-json", metavar="JSON", help="Entries to set, as an object; null removes one; others stay.")
@click.option("--task", type=TASK, help="Have it go on in the sandbox of this task, as it is deployed now.")
@click.option("--sandbox", type=SANDBOX, help="Have it go on in this sandbox, as it is deployed now.")
def update(workspace_id: str, *, metadata_json: str | None, **given: Any) -> None:
    """Change tags and metadata of a workspace, or the sandbox it goes on in.

    A workspace keeps the sandbox it was made from, and a task that needs another one (more memory, say, or another network)
    cannot use it. With --sandbox or --task its files go on in that of the current deployment: the container is stopped, and
    the next one is made from it. Refused while a run or an exec is in it.

    \b
    Examples:
        helmr workspace update @last --tag customer-7 --metadata-json '{"owner": "ada"}'
        helmr workspace update @last --untag customer-7 --metadata-json '{"owner": null}'
        helmr workspace update @last --task review
    """
    metadata = metadata_of(metadata_json, example=_METADATA)
    if not metadata and not any(given.values()):
        raise UsageError("say what to change", hint="--tag, --untag, --metadata-json, --task or --sandbox")
    with working(f"updating {workspace_id}"):
        updated = ask(lambda client: client.workspaces.update(workspace_id, metadata=metadata, **given))
    _show(updated)


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def materialize(workspace_id: str) -> None:
    """Bring a workspace to life without a run, and print the worker that has it: the next run or exec in it starts at once.

    Its container stops again when it has been idle for five minutes. One that is live is left as it is.

    \b
    Examples:
        helmr workspace materialize @last
    """
    with working(f"starting {workspace_id}"):
        live = ask(lambda client: client.workspaces.materialize(workspace_id))
    if flags().json:
        json_value(live)
    elif live.worker is not None:
        line(live.worker)
    else:
        raise Conflict(f"{live.id} has been stopped meanwhile")


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def stop(workspace_id: str) -> None:
    """End the container of a workspace; its files stay. Refused while a run or an exec is in it."""
    with working(f"stopping {workspace_id}"):
        stopped = ask(lambda client: client.workspaces.stop(workspace_id))
    if flags().json:
        json_value(stopped)
    else:
        note(f"{stopped.id} is {stopped.state}; its files stay")


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def versions(workspace_id: str) -> None:
    """List the versions of a workspace, newest first: what its files were at the end of each run that changed them."""
    found = ask(lambda client: client.workspaces.versions(workspace_id))
    if flags().json:
        json_value(found)
        return
    rows = [
        (str(each.number), each.id, age(each.created_at), str(each.files), size(each.bytes), each.run_id or each.reason)
        for each in found
    ]
    table(("NUMBER", "VERSION", "MADE", "FILES", "SIZE", "BY"), rows)


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@version_option(required=True)
def restore(workspace_id: str, version: str) -> None:
    """Have a workspace go on from one of its versions.

    Its container is stopped, and what its files are by then is a version, too: nothing is lost. Refused while a run executes.

    \b
        helmr workspace restore @last --version 3
    """
    with working(f"restoring {workspace_id}"):
        restored = ask(lambda client: client.workspaces.restore(workspace_id, version))
    if flags().json:
        json_value(restored)
    else:
        note(f"{restored.id} goes on from version {restored.version}")


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@version_option()
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Instead of its tags. Can be given several times.")
@click.option("--metadata-json", metavar="JSON", help="Instead of its metadata: an object.")
def fork(workspace_id: str, version: str | None, tags: tuple[str, ...], metadata_json: str | None) -> None:
    """Make a new workspace that begins as a version of this one, and print its id.

    It has the tags and the metadata that this one has now, unless others are given.

    \b
    Examples:
        helmr session start fix --workspace $(helmr workspace fork @last)
        helmr workspace fork @last --version 3 --tag experiment --metadata-json '{"owner": "ada"}'
    """
    metadata = metadata_of(metadata_json, example=_METADATA)
    made = ask(
        lambda client: client.workspaces.fork(workspace_id, version=version, tags=tags or None, metadata=metadata)
    )
    _made(made)


@workspace.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
def delete(workspace_id: str) -> None:
    """Delete a workspace: its container, its files, and in time its versions. There is no way back.

    Refused while a run or an exec is in it. Forks stay. Files on a host without a worker stay until they are removed by hand.
    """
    with working(f"deleting {workspace_id}"):
        deleted = ask(lambda client: client.workspaces.delete(workspace_id))
    if flags().json:
        json_value(deleted)
    else:
        note(f"{deleted.id} is deleted")


@workspace.command()
@click.option("--remove", is_flag=True, help="Remove it; without this it is only counted.")
def collect(remove: bool) -> None:
    """Count what the store of versions holds and no version has needed for an hour, in all projects; --remove removes it.

    That is what deleted workspaces leave, and captures that were interrupted.
    """
    with working("reading the log and the store"):
        found = ask(lambda client: client.workspaces.collect(remove=remove))
    if flags().json:
        json_value(found)
        return
    note(
        f"{found.blobs} blobs, {size(found.bytes)}, {'removed' if found.removed else 'would be removed'}; {found.kept} kept"
    )


def _made(made: Workspace) -> None:
    if flags().json:
        json_value(made)
    else:
        line(made.id)


def _show(shown: Workspace) -> None:
    show(
        shown,
        {
            "id": shown.id,
            "state": shown.state,
            "sandbox": shown.sandbox,
            "scope": f"{shown.project}/{shown.environment}",
            "mounted at": shown.mount_path,
            "worker": shown.worker,
            "host": shown.host,
            "version": shown.version,
            "deployment": shown.deployment_id,
            "tags": ", ".join(shown.tags) or None,
            "metadata": compact(shown.metadata) if shown.metadata else None,
            "created": moment(shown.created_at),
            "changed": moment(shown.updated_at),
        },
    )


workspace.add_command(files)
workspace.add_command(exec_)
workspace.add_command(shell)
workspace.add_command(pty)
workspace.add_command(cp)
