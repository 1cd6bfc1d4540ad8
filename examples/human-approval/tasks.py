"""A change that a person has to approve: proposed on an output stream, decided on an input stream, carried out once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helmr import TaskContext, WaitTimeout, logger, metadata, step, streams, task


@dataclass
class Change:
    """A line that is to be added to a file of the workspace."""

    ticket: str
    file: str
    line: str
    patience: str = "7d"


@dataclass
class Decision:
    """What somebody says to a proposal."""

    approved: bool
    by: str
    note: str = ""


proposals = streams.output("proposals")
decisions = streams.input("decisions", schema=Decision)


@task("human-approval", max_duration="5m", park_after="30s")
def human_approval(payload: Change, ctx: TaskContext) -> dict[str, str]:
    """Propose a change, wait for a decision about this ticket, and act on it."""
    proposal = step("propose", propose, ctx.workspace.path, payload)
    proposals.append(proposal, correlation_id=payload.ticket)
    metadata.set("phase", "waiting for a decision")
    try:
        decision = decisions.wait(payload.patience, correlation_id=payload.ticket)
    except WaitTimeout:
        return {"ticket": payload.ticket, "outcome": "nobody decided"}
    logger.info("decided", approved=decision.approved, by=decision.by)
    if not decision.approved:
        return {"ticket": payload.ticket, "outcome": f"rejected by {decision.by}: {decision.note}"}
    step("apply", apply, ctx.workspace.path, payload)
    metadata.set("phase", "done")
    return {"ticket": payload.ticket, "outcome": f"approved by {decision.by}"}


def propose(workspace: str, change: Change) -> dict[str, str]:
    """What the file is now, and what it would be."""
    path = Path(workspace, change.file)
    before = path.read_text() if path.exists() else ""
    return {"ticket": change.ticket, "file": change.file, "before": before, "after": f"{before}{change.line}\n"}


def apply(workspace: str, change: Change) -> None:
    """Add the line. Not a thing to do twice: so it is a step."""
    with Path(workspace, change.file).open("a") as file:
        file.write(f"{change.line}\n")
