"""What Prometheus is told about one worker."""

from __future__ import annotations

from bus.metrics import Metric, Reading
from worker.worker import Worker

SLOTS = Metric("helmr_worker_slots", "gauge", "Runs this worker can execute at a time")
SLOTS_USED = Metric("helmr_worker_slots_used", "gauge", "Slots that are taken")
EXECUTING = Metric("helmr_worker_runs_executing", "gauge", "Runs it executes", ("project", "environment", "task"))
DISPATCHES = Metric(
    "helmr_worker_dispatches_total", "counter", "Dispatch messages it has settled, by what came of them", ("result",)
)
WORKER = (SLOTS, SLOTS_USED, EXECUTING, DISPATCHES)


class WorkerMetrics:
    """Reads the values off a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def read(self) -> Reading:
        """All values, as of now."""
        worker = self._worker
        return [
            (SLOTS, {(): worker.slots.total}),
            (SLOTS_USED, {(): worker.slots.active}),
            (EXECUTING, dict(worker.executions.count())),
            (DISPATCHES, {(result,): count for result, count in worker.dispatches.results.items()}),
        ]
