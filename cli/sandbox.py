"""``helmr sandbox``: what the tasks of the current deployment run in."""

from __future__ import annotations

from typing import Any

import click

from cli.options import Group, flags
from cli.output import json_value, record, size, table
from cli.references import SANDBOX
from cli.task import entries, find


@click.group(cls=Group)
def sandbox() -> None:
    """List and show the sandboxes of the current deployment."""


@sandbox.command("list")
def list_() -> None:
    """List the sandboxes of the current deployment."""
    found = entries("sandboxes")
    if flags().json:
        json_value(found)
        return
    rows = [
        (each["name"], _image(each), f"{each['cpu']:g}", size(each["memory"]), _network(each), each["mount_path"])
        for each in found
    ]
    table(("SANDBOX", "IMAGE", "CPU", "MEMORY", "NETWORK", "WORKSPACE"), rows)


@sandbox.command()
@click.argument("name", type=SANDBOX)
def get(name: str) -> None:
    """Show a sandbox of the current deployment."""
    shown = find(entries("sandboxes"), "name", name, "sandbox")
    if flags().json:
        json_value(shown)
        return
    record(
        {
            "name": shown["name"],
            "image": shown["image"]["base"],
            "steps": "\n".join(" ".join(map(str, step)) for step in shown["image"]["steps"]) or None,
            "cpu": f"{shown['cpu']:g}",
            "memory": size(shown["memory"]),
            "pids": shown["pids"],
            "disk": size(shown["disk"]),
            "network": _network(shown),
            "workspace": shown["mount_path"],
            "preload": "\n".join(shown.get("preload", ())) or None,
            "fingerprint": shown["fingerprint"],
        }
    )


def _image(entry: dict[str, Any]) -> str:
    steps = len(entry["image"]["steps"])
    return f"{entry['image']['base']}" + (f" + {steps} step{'s' if steps > 1 else ''}" if steps else "")


def _network(entry: dict[str, Any]) -> str:
    network = entry["network"]
    return network if isinstance(network, str) else ", ".join(network)
