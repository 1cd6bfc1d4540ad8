"""The options that every command takes, before or after its name, and what they lead to: settings and a client."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient
    from helmr.config import Settings

T = TypeVar("T")


@dataclass
class Flags:
    """What the options said; None and False where nothing was said."""

    url: str | None = None
    project: str | None = None
    env: str | None = None
    home: str | None = None
    api_key: str | None = None
    json: bool = False
    debug: bool = False
    verbose: bool = False

    def settings(self, start: Path | None = None) -> Settings:
        """The settings for the folder ``start`` (default: the current one).

        Raises:
            ConfigError: a file, variable or option is wrong.
        """
        from helmr.config import load

        return load(start, url=self.url, api_key=self.api_key, project=self.project, env=self.env, home=self.home)

    def client(self, start: Path | None = None, *, anywhere: bool = False) -> AsyncClient:
        """A client for the project of the folder ``start``, outside of any for the one that ``helmr dev`` runs here.

        With ``anywhere`` no project is needed.
        """
        from cli import dev_state
        from helmr.client.aio import AsyncClient

        settings = self.settings(start)
        project, env = settings.project, settings.env
        if project is None and settings.url is None and (dev := dev_state.read(settings.home)):
            project, env = dev.project, self.env or os.environ.get("HELMR_ENV") or dev.env
        if project is None and anywhere:
            project = "any"
        return AsyncClient(settings.url, api_key=settings.api_key, project=project, env=env, home=settings.home)

    @property
    def log_level(self) -> int:
        """How much the parts of Helmr say on stderr."""
        return logging.DEBUG if self.debug else logging.INFO if self.verbose else logging.WARNING


def flags() -> Flags:
    """The options of the command that is running."""
    return click.get_current_context().ensure_object(Flags)


def ask(use: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """What ``use`` returns when it is given a connected client."""
    import asyncio  # 25 ms, which `helmr --help` does not need

    given = flags()

    async def asking() -> T:
        async with given.client() as client:
            return await use(client)

    return asyncio.run(asking())


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if param.name is not None and value not in (None, False):
        setattr(ctx.ensure_object(Flags), param.name, value)


_GLOBAL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--url", {"metavar": "URL", "help": "NATS server, e.g. nats://127.0.0.1:4222; default: the local server."}),
    ("--project", {"metavar": "NAME", "help": "Project; default: that of helmr.toml."}),
    ("--env", {"metavar": "NAME", "help": "Environment; default: that of helmr.toml, or dev."}),
    ("--home", {"metavar": "DIR", "help": "Where the local server keeps its data."}),
    ("--api-key", {"metavar": "KEY", "help": "Credentials; HELMR_API_KEY keeps them out of the process list."}),
    ("--json", {"is_flag": True, "help": "JSON on stdout: one array for a list, JSON lines for a stream."}),
    ("--debug", {"is_flag": True, "help": "Show tracebacks, and everything the libraries log."}),
    ("--verbose", {"is_flag": True, "help": "Say more on stderr."}),
)


def _global_options(taken: set[str]) -> Iterator[click.Option]:
    for name, settings in _GLOBAL:
        if name not in taken:
            yield click.Option([name], expose_value=False, callback=_remember, **settings)


class Command(click.Command):
    """A command that takes the global options, too, except where it has an option of that name itself."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the global options."""
        own = super().get_params(ctx)
        taken = {name for param in own for name in param.opts}
        return [*own, *_global_options(taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options; the global ones are explained once, by ``helmr --help``."""
        own = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([record for param in own if (record := param.get_help_record(ctx))])
        formatter.write_paragraph()
        formatter.write_text("Global options (see helmr --help): " + " ".join(name for name, _ in _GLOBAL))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with logging set up as the options say."""
        given = ctx.ensure_object(Flags)
        level = given.log_level
        # Whoever asks for JSON is a program, and puts its own time before what it shows of our stderr.
        time = "" if given.json else "%(asctime)s "
        logging.basicConfig(level=level, format=f"{time}%(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("urllib3").setLevel(max(level, logging.INFO))
        return super().invoke(ctx)


class Group(click.Group):
    """A noun with its verbs; suggests the verb that was meant."""

    command_class = Command

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The group's own parameters and the global options."""
        return [*super().get_params(ctx), *_global_options(set())]

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs in the order they are defined in."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The global options at the root, the verbs everywhere."""
        if ctx.parent is None:
            super().format_options(ctx, formatter)
        else:
            self.format_commands(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of this name.

        Raises:
            click.UsageError: there is none; suggests what may have been meant.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown("command", args[0], self.list_commands(ctx), ctx)
        return super().resolve_command(ctx, args)


def unknown(what: str, given: str, known: Sequence[str], ctx: click.Context | None = None) -> click.UsageError:
    """The error for a word that is none of the ``known`` ones, with the closest of them."""
    close = get_close_matches(given, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    error = click.UsageError(f"no such {what}: {given!r}", ctx)
    error.hint = hint  # type: ignore[attr-defined]
    return error


class Choice(click.Choice[str]):
    """One of several words; suggests the one that was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word itself."""
        if value not in self.choices:
            raise unknown((param.name if param else None) or "value", str(value), list(self.choices), ctx)
        return str(value)


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A duration as people write it, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ARG002
        """Seconds."""
        from helmr.durations import seconds

        return seconds(value, what=f"--{param.name.replace('_', '-')}" if param and param.name else "duration")


DURATION = DurationType()


@contextmanager
def interrupted(message: str | None) -> Iterator[None]:
    """Say ``message``, if any, on stderr when Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        if message:
            click.echo(f"\n{message}", err=True)
        raise
