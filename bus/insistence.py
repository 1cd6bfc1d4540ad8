"""Asks again while a server that is just coming up, or overloaded, leaves what a part needs to begin without an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import nats.errors
import nats.js.errors

from helmr.errors import Unavailable

log = logging.getLogger(__name__)

#: Seconds for which it is asked again. Whoever supervises a part would only start it again, to begin from the beginning.
PATIENCE = 30.0
_PAUSE = 0.25


async def insist(ask: Callable[[], Awaitable[None]], *, patience: float = PATIENCE) -> None:
    """Do ``ask``, which may be done twice, again while the server does not answer, or cannot do it, for ``patience`` seconds.

    Raises:
        Unavailable: it has not worked in that time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    said = False
    while True:
        try:
            return await ask()
        except (Unavailable, nats.errors.Error, nats.js.errors.Error, TimeoutError, ConnectionError) as error:
            if loop.time() > deadline:
                raise _given_up(error, patience) from error
            log.log(logging.DEBUG if said else logging.WARNING, "NATS: %s; asking again for %.0f s", error, patience)
            said = True
            await asyncio.sleep(_PAUSE)


def _given_up(error: BaseException, patience: float) -> Unavailable:
    hint = "see that its disk has room and that it is not overloaded, then start this again"
    return Unavailable(f"NATS has not done what is needed to begin, for {patience:.0f} s: {error}", hint=hint)
