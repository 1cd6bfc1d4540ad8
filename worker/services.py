"""What an execution needs from its worker, in one place."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bus.deployments import Deployments
from bus.log import Log
from helmr.errors import EngineUnavailable
from worker.hot import HotRuns
from worker.machines import Machines


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """The log, the deployments, the live machines, the processes of waiting runs, and whom to tell when the engine is gone."""

    log: Log
    deployments: Deployments
    machines: Machines
    hot: HotRuns
    engine_lost: Callable[[EngineUnavailable], None]
