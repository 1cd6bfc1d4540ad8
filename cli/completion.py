"""``helmr completion``: what the shell needs to complete commands, options and ids."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from cli.options import Choice, Command
from cli.output import line
from helmr.errors import UsageError

SHELLS = ["bash", "zsh", "fish"]


@click.command(cls=Command)
@click.argument("shell", required=False, type=Choice(SHELLS))
def completion(shell: str | None) -> None:
    """Print the completion script for SHELL (default: that of $SHELL).

    bash: eval "$(helmr completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: helmr completion fish >
    ~/.config/fish/completions/helmr.fish
    """
    from cli.main import helmr

    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in SHELLS else None
    if kind is None:
        raise UsageError(
            f"no completion for the shell {name!r}", hint=f"say which: helmr completion {'|'.join(SHELLS)}"
        )
    line(kind(helmr, {}, "helmr", "_HELMR_COMPLETE").source())
