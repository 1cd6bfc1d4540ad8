"""``helmr secret``: set, list, get, delete, rotate. No command prints a value."""

from __future__ import annotations

import sys

import click

from cli.options import Group, ask, flags
from cli.output import age, json_value, moment, note, show, table, working
from cli.references import SECRET
from helmr.errors import UsageError

#: What :mod:`worker.masking` leaves alone, and the command line must not import.
_MIN_MASKED = 4


@click.group(cls=Group)
def secret() -> None:
    """Store secrets for tasks; show, delete and re-encrypt them. Values go in and never come out."""


@secret.command("set")
@click.argument("name", type=SECRET)
@click.option("--exact", is_flag=True, help="Keep a newline at the end; by default one is removed.")
def set_(name: str, exact: bool) -> None:
    """Store the value on standard input under NAME, in the place of the one before.

    On a terminal it is asked for, and not shown. Tasks that declare Secret("NAME") get it from their next start on:

    \b
        helmr secret set OPENAI_API_KEY < key.txt
    """
    value = _read(name, exact=exact)
    stored = ask(lambda client: client.secrets.set(name, value))
    if len(value) < _MIN_MASKED:
        note(f"this value is too short to be masked in logs: that takes {_MIN_MASKED} characters")
    if flags().json:
        json_value(stored)
    else:
        note(f"{stored.name} is stored, version {stored.version}")


@secret.command("list")
def list_() -> None:
    """List the secrets of this environment, without their values."""
    found = ask(lambda client: client.secrets.list())
    if flags().json:
        json_value(found)
        return
    rows = [(each.name, each.version, age(each.created_at), age(each.updated_at), each.updated_by) for each in found]
    table(("SECRET", "VERSION", "CREATED", "CHANGED", "BY"), rows)


@secret.command()
@click.argument("name", type=SECRET)
def get(name: str) -> None:
    """Show what is known about a secret, which is not its value."""
    shown = ask(lambda client: client.secrets.get(name))
    show(
        shown,
        {
            "name": shown.name,
            "scope": f"{shown.project}/{shown.environment}",
            "version": shown.version,
            "key": shown.key_id,
            "created": moment(shown.created_at),
            "changed": moment(shown.updated_at),
            "by": shown.updated_by,
        },
    )


@secret.command()
@click.argument("name", type=SECRET)
def delete(name: str) -> None:
    """Remove a secret. Runs that execute keep the value; tasks that declare it are refused from now on."""
    gone = ask(lambda client: client.secrets.delete(name))
    if flags().json:
        json_value(gone)
    else:
        note(f"{gone.name} is deleted")


@secret.command()
def rotate() -> None:
    """Encrypt every secret, of all environments, with a new key, then forget the old one.

    Safe to repeat when it was interrupted. Where the server was given its keys (HELMR_SECRET_KEY, --secret-key-file), put
    the new key before the old one, restart it, run this, and take the old key away.
    """
    with working("encrypting secrets"):
        done = ask(lambda client: client.secrets.rotate())
    if flags().json:
        json_value(done)
    else:
        note(f"{done.reencrypted} secrets encrypted anew; the key is {done.key_id}")


def _read(name: str, *, exact: bool) -> str:
    if sys.stdin.isatty():
        return str(click.prompt(f"Value of {name}", hide_input=True, err=True))
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError("the value is not UTF-8 text", hint="encode it, e.g. with `base64`") from error
    return text if exact else text.removesuffix("\n").removesuffix("\r")
