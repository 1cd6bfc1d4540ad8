"""What an execution needs from its worker, in one place."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bus.deployments import Deployments
from bus.log import Log
from bus.values import Values
from helmr.errors import EngineUnavailable
from worker.hot import HotRuns
from worker.machines import Machines


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """The log, deployments, machines, processes of waiting runs, large values, and whom to tell when the engine is gone."""

    log: Log
    deployments: Deployments
    machines: Machines
    hot: HotRuns
    values: Values
    engine_lost: Callable[[EngineUnavailable], None]
