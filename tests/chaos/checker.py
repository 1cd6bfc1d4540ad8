"""What must hold of everything that happened, as pure functions over the evidence; each says what does not.

A violation names the rule, what it is about (a run, mostly), and the facts in the order they happened, so that whoever reads it
knows where to look in the log. :func:`check` applies every rule.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec

from bus.log import QUEUE, RUN, SESSION, TOKEN, WORKSPACE
from helmr import chunks, subjects
from helmr.chunks import LogChunk
from helmr.errors import Conflict
from helmr.events import TERMINAL, Grant, QueueEvent, RunEvent, RunSpec, RunState, TokenEvent
from helmr.models import StreamRecord
from helmr.reducers import run as rules
from helmr.reducers import run_fold
from helmr.reducers.queue import Limits
from tests.chaos.evidence import Evidence, Mark, Start, Stored
from tests.chaos.lines import expected
from tests.chaos.part_process import WRITER

#: Seconds in which a timer may still fire after the event that cancelled it: the server had taken it up already.
_TIMER_RACE = 1.0


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that was broken: which, by what, and how that shows."""

    rule: str
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.about}: {self.text}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a run and the message it was stored as."""

    message: Stored
    event: RunEvent

    @property
    def writer(self) -> str | None:
        """The lease it was appended under, as the writer says."""
        return self.message.headers.get(WRITER)


class Case:
    """The evidence, sorted by what it is about."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    @cached_property
    def runs(self) -> dict[str, list[Entry]]:
        """The events of every run, in the order they were stored."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for message in self.evidence.runs:
            if message.subject.startswith("helmr.ev.") and subjects.parse_event(message.subject).entity == "run":
                event = RUN.decode(message.data)
                found[event.run_id].append(Entry(message=message, event=event))
        return dict(found)

    @cached_property
    def queues(self) -> list[tuple[int, str, QueueEvent]]:
        """The events of queues: where they stand in the log, which queue, and what."""
        return [
            (message.seq, subjects.parse_event(message.subject).id, QUEUE.decode(message.data))
            for message in self.evidence.runs
            if message.subject.startswith("helmr.ev.") and subjects.parse_event(message.subject).entity == "queue"
        ]

    @cached_property
    def completions(self) -> dict[str, list[TokenEvent]]:
        """The completions of every token, in the order they were stored."""
        found: dict[str, list[TokenEvent]] = defaultdict(list)
        for message in self.evidence.runs:
            if message.subject.startswith("helmr.ev.") and subjects.parse_event(message.subject).entity == "token":
                event = TOKEN.decode(message.data)
                if event.kind == "completed":
                    found[event.token_id].append(event)
        return dict(found)

    @cached_property
    def starts(self) -> dict[str, Start]:
        """The acknowledged starts, by run."""
        return {start.run_id: start for start in self.evidence.starts}

    @cached_property
    def marks(self) -> dict[str, list[Mark]]:
        """The marks of every run."""
        found: dict[str, list[Mark]] = defaultdict(list)
        for mark in self.evidence.marks:
            found[mark.run].append(mark)
        return dict(found)

    def spec(self, run_id: str) -> RunSpec:
        """What a run was started with."""
        return msgspec.convert(self.runs[run_id][0].event.data["spec"], RunSpec)


Found = Iterator[Violation]
Rule = Callable[[Case], Found]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    """Enlist a rule."""
    RULES.append(check)
    return check


def check(evidence: Evidence) -> list[Violation]:
    """Everything that is wrong."""
    case = Case(evidence)
    return [violation for each in RULES for violation in each(case)]


def _violation(broken: Rule, about: str, text: str) -> Violation:
    return Violation(rule=broken.__name__.replace("_", " "), about=about, text=text)


@rule
def every_acknowledged_start_ends(case: Case) -> Found:
    """After a quiet period whatever was started has ended, and a start that was acknowledged is in the log."""
    for run_id in case.starts:
        if run_id not in case.runs:
            yield _violation(every_acknowledged_start_ends, run_id, "acknowledged, and not in the log")
    for run_id, entries in case.runs.items():
        if not entries[-1].event.state.terminal:
            yield _violation(every_acknowledged_start_ends, run_id, f"has not ended: {_story(entries)}")


@rule
def a_history_is_what_the_reducer_allows(case: Case) -> Found:
    """Cursors count from 1 without a gap, each state is the fold of the events so far, nothing follows an end."""
    for run_id, entries in case.runs.items():
        state: RunState | None = None
        for number, entry in enumerate(entries, 1):
            event = entry.event
            try:
                state = run_fold.apply(state, event.kind, event.data, event.at, run_id=run_id)
            except Conflict as error:
                yield _violation(a_history_is_what_the_reducer_allows, run_id, f"{error.message}: {_story(entries)}")
                break
            if event.cursor != number or state != event.state:
                text = f"event {number} ({event.kind}) was appended to another past: {_story(entries)}"
                yield _violation(a_history_is_what_the_reducer_allows, run_id, text)
                break


@rule
def one_end_and_nothing_after_it(case: Case) -> Found:
    """Exactly one terminal event, the last."""
    for run_id, entries in case.runs.items():
        ends = [number for number, entry in enumerate(entries, 1) if entry.event.kind in TERMINAL]
        if ends and ends != [len(entries)]:
            yield _violation(one_end_and_nothing_after_it, run_id, _story(entries))


@rule
def attempts_rise_by_retry_alone(case: Case) -> Found:
    """The attempt never falls, and rises only with the lease after a scheduled retry; each lease is one more dispatch of it.

    After five leases in a row that were lost there is no other.
    """
    for run_id, entries in case.runs.items():
        attempt, dispatch, losses, retried = 0, 0, 0, True
        running = False
        for event in (entry.event for entry in entries):
            match event.kind:
                case "retry_scheduled":
                    retried, dispatch, losses = True, 0, 0
                case "waiting":
                    losses = 0
                case "lease_lost":
                    losses += not event.data.get("orderly")
                case "leased":
                    losses += running  # it goes on in its process, taken over from a worker that was lost
                    attempt, dispatch, retried = attempt + retried, dispatch + 1, False
                    told = event.data["attempt"], event.data["dispatch_attempt"]
                    if told != (attempt, dispatch) or losses >= rules.MAX_DISPATCH_ATTEMPTS:
                        text = f"leased as {told} after {losses} losses, not as {attempt, dispatch}: {_story(entries)}"
                        yield _violation(attempts_rise_by_retry_alone, run_id, text)
                        break
            running = event.state.status == "running"


@rule
def only_the_holder_writes(case: Case) -> Found:
    """At most one live lease, and whatever is appended under a lease is appended while it holds.

    A lease may follow another one at once if it goes on with what that one executes, as a successor of its worker.
    """
    for run_id, entries in case.runs.items():
        holder: str | None = None
        for entry in entries:
            event = entry.event
            if entry.writer is not None and entry.writer != holder:
                text = f"{event.kind} (event {event.cursor}) by {entry.writer}, while {holder or 'nobody'} held it"
                yield _violation(only_the_holder_writes, run_id, f"{text}: {_story(entries)}")
            if event.kind == "leased":
                if holder is not None and not _goes_on(event, holder):
                    text = f"leased to {event.data['worker']} while {holder} held it: {_story(entries)}"
                    yield _violation(only_the_holder_writes, run_id, text)
                holder = f"{event.data['worker']}@{event.cursor}"
            elif event.kind in {"lease_lost", "retry_scheduled", "waiting", *TERMINAL}:
                holder = None


def _goes_on(event: RunEvent, holder: str) -> bool:
    worker, _, cursor = holder.partition("@")
    return bool(worker != event.data["worker"] and 0 < event.data.get("execution", 0) <= int(cursor))


@rule
def it_ends_as_its_task_does(case: Case) -> Found:
    """Unless somebody cancelled it, or its time to live ran out first, a run ends as its task says; success has its output."""
    for run_id, start in case.starts.items():
        entries = case.runs.get(run_id, [])
        if not entries or not entries[-1].event.state.terminal:
            continue
        last = entries[-1].event
        outcome = last.data["failure"]["code"] if last.kind == "failed" else last.kind
        if outcome not in start.outcomes | _excused(case, run_id, start):
            text = f"{start.kind} ended with {outcome} ({last.message}): {_story(entries)}"
            yield _violation(it_ends_as_its_task_does, run_id, text)
        if last.kind == "succeeded" and (last.data["output"] or {}).get("n") != start.n:
            yield _violation(
                it_ends_as_its_task_does, run_id, f"output {last.data['output']} is not that of n={start.n}"
            )


def _excused(case: Case, run_id: str, start: Start) -> set[str]:
    kinds = Counter(entry.event.kind for entry in case.runs[run_id])
    excuses = {"cancelled"} if run_id in case.evidence.cancels else set()
    excuses |= start.midway if kinds["cancel_requested"] else set()
    excuses |= {"expired"} if start.ttl is not None and not kinds["leased"] else set()
    taken_over = sum(
        1 for entry in case.runs[run_id] if entry.event.kind == "leased" and "execution" in entry.event.data
    )
    losses = kinds["lease_lost"] + taken_over
    excuses |= {"dispatch_exhausted"} if losses >= rules.MAX_DISPATCH_ATTEMPTS - 1 else set()
    return excuses


@rule
def the_same_start_is_one_run(case: Case) -> Found:
    """Starts with one external id, repeated or at the same time, lead to one session, and to one run until input comes."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    fresh: Counter[str] = Counter()
    for start in case.evidence.starts:
        if start.external_id is not None:
            turn = case.spec(start.run_id).turn if start.run_id in case.runs else 0
            found[start.external_id].add((start.session_id, start.run_id if turn == 0 else "a later turn"))
            fresh[start.external_id] += not start.reused
    for external_id, pairs in found.items():
        if len({session for session, _ in pairs}) > 1 or len({run for _, run in pairs} - {"a later turn"}) > 1:
            yield _violation(the_same_start_is_one_run, external_id, f"led to several: {sorted(pairs)}")
        if fresh[external_id] > 1:
            yield _violation(the_same_start_is_one_run, external_id, f"was new {fresh[external_id]} times")


@rule
def executions_do_not_overlap(case: Case) -> Found:
    """No two executions of a run in one workspace at a time: whoever takes a run over ends what was left of it there first."""
    for run_id, marks in case.marks.items():
        spans: dict[tuple[str, str], list[float]] = defaultdict(list)
        for mark in marks:
            if mark.what != "daemon":
                spans[mark.where, mark.key].append(mark.mono)
        ordered = sorted((where, min(times), max(times), key) for (where, key), times in spans.items())
        for (here, _, end, first), (there, begin, _, second) in pairwise(ordered):
            if here == there and begin < end:
                text = f"{second} began {end - begin:.2f} s before {first} ended: {_story(case.runs[run_id])}"
                yield _violation(executions_do_not_overlap, run_id, text)


@rule
def nothing_lives_after_its_end(case: Case) -> Found:
    """Once the holder of the lease has said how a run ended, no process of it is alive there, daemons included."""
    for run_id, marks in case.marks.items():
        end = case.runs[run_id][-1]
        if end.event.kind in TERMINAL and end.writer is not None:
            here = max(
                (mark for mark in marks if mark.what == "start"), key=lambda mark: mark.mono, default=marks[0]
            ).where
            late = [mark for mark in marks if mark.where == here and mark.at > end.event.at.timestamp()]
            if late:
                after = late[-1].at - end.event.at.timestamp()
                text = f"{late[-1].what} by process {late[-1].pid}, {after:.2f} s after {end.event.kind}"
                yield _violation(nothing_lives_after_its_end, run_id, text)


@rule
def a_recorded_step_is_not_taken_again(case: Case) -> Found:
    """Once it is in the log what a step returned, that step is not executed any more; not where it was recorded, at least."""
    for run_id, marks in case.marks.items():
        recorded = next(
            (e.event for e in case.runs[run_id] if e.event.kind == "step" and e.event.data["name"] == "effect"), None
        )
        taken = [mark for mark in marks if mark.what == "step"]
        if recorded is None or not taken:
            continue
        late = [mark for mark in taken if mark.at > recorded.at.timestamp() and mark.where == taken[0].where]
        if late:
            after = late[0].at - recorded.at.timestamp()
            text = f"taken {after:.2f} s after event {recorded.cursor}: {_story(case.runs[run_id])}"
            yield _violation(a_recorded_step_is_not_taken_again, run_id, text)


@rule
def success_was_executed(case: Case) -> Found:
    """A run that succeeded was executed from the beginning to the end at least once."""
    for run_id, entries in case.runs.items():
        if entries[-1].event.kind != "succeeded":
            continue
        whats = {(mark.key, mark.what) for mark in case.marks.get(run_id, [])}
        if not any((key, "end") in whats for key, what in whats if what == "start"):
            yield _violation(success_was_executed, run_id, f"never from start to end: {_story(entries)}")


@rule
def limits_hold(case: Case) -> Found:
    """At no point of the log more runs are running, or have a slot, than their queue allows, in all and per concurrency key."""
    running: dict[str, dict[str, str | None]] = defaultdict(dict)
    for about, event in _in_order(case):
        queue, state = (about, None) if isinstance(event, QueueEvent) else (event.state.queue or "", event.state)
        if queue not in case.evidence.limits:
            continue
        if isinstance(event, QueueEvent):
            used = {run_id: grant.key for run_id, grant in event.state.holders.items()}
        else:
            used = running[queue]
            used.pop(about, None)
            if state is not None and state.status == "running":
                used[about] = state.concurrency_key
        for text in _exceeded(case.evidence.limits[queue], used):
            yield _violation(limits_hold, f"queue {queue}", f"{text} after {event.kind} of {about}: {sorted(used)}")


def _exceeded(limits: Limits, used: dict[str, str | None]) -> Iterator[str]:
    counts = Counter(used.values())
    if limits.total is not None and counts.total() > limits.total:
        yield f"{counts.total()} at once, {limits.total} may"
    for key, count in counts.items():
        limit = limits.of(key)
        if limit is not None and count > limit:
            yield f"{count} of key {key} at once, {limit} may"


@rule
def a_slot_is_granted(case: Case) -> Found:
    """A run of a limited queue runs only while the queue says that it has a slot, given for the very time it was held."""
    granted: dict[str, dict[str, Grant]] = defaultdict(dict)
    for about, event in _in_order(case):
        if isinstance(event, QueueEvent):
            granted[about] = event.state.holders
        elif event.kind == "leased" and event.state.queue in case.evidence.limits:
            grant = granted[event.state.queue].get(about)
            if grant is None or grant.held != event.state.slot:
                text = f"leased on the slot of its event {event.state.slot}, granted is {grant}"
                yield _violation(a_slot_is_granted, about, f"{text}: {_story(case.runs[about])}")


def _in_order(case: Case) -> list[tuple[str, RunEvent | QueueEvent]]:
    """The events of runs and queues, as the log has them."""
    found: list[tuple[int, str, RunEvent | QueueEvent]] = [*case.queues]
    found += [(entry.message.seq, run_id, entry.event) for run_id, events in case.runs.items() for entry in events]
    return [(about, event) for _, about, event in sorted(found, key=lambda each: each[0])]


@rule
def a_leased_run_has_no_time_to_live(case: Case) -> Found:
    """The timer of a time to live goes with the first lease, or with the end; it neither stays nor fires later.

    But when a session was started by two at the same time, the second may arm it just after the first one's run was leased.
    """
    settled = {run_id: _settled(entries) for run_id, entries in case.runs.items()}
    for message in case.evidence.runs:
        if not message.subject.startswith(("helmr.due.", "helmr.timer.")) or not message.subject.endswith(".ttl"):
            continue
        run_id = message.subject.split(".")[-2]
        entry = settled.get(run_id)
        if entry is None or (run_id in case.starts and case.starts[run_id].external_id is not None):
            continue
        pending = message.subject.startswith("helmr.timer.")
        late = message.at - entry.message.at
        if pending or late > timedelta(seconds=_TIMER_RACE):
            text = "its timer is still there" if pending else f"its timer fired {late.total_seconds():.1f} s later"
            yield _violation(a_leased_run_has_no_time_to_live, run_id, f"{text} than {entry.event.kind}")


def _settled(entries: list[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry.event.kind in {"leased", *TERMINAL}), None)


class _Written:
    """What is stored of one dispatch of an attempt: bytes by stream and offset, and why it ends early, if it does."""

    def __init__(self) -> None:
        self.chunks: dict[str, dict[int, bytes]] = defaultdict(dict)
        self.tombstones: set[str] = set()
        self.faults: list[str] = []

    def add(self, chunk: LogChunk) -> None:
        """Take one chunk into account."""
        if chunk.tombstone is not None:
            self.tombstones.add(chunk.tombstone)
        elif chunk.data and self.chunks[chunk.stream].setdefault(chunk.offset, chunk.data) != chunk.data:
            self.faults.append(f"{chunk.stream}: two different chunks at offset {chunk.offset}")

    def joined(self, stream: str) -> bytes:
        """The bytes of a stream, up to the first gap."""
        found = b""
        for offset, data in sorted(self.chunks[stream].items()):
            if offset != len(found):
                self.faults.append(f"{stream}: {offset - len(found)} bytes are missing at {len(found)}")
                break
            found += data
        return found


def _written(case: Case) -> dict[tuple[str, int, int], _Written]:
    found: dict[tuple[str, int, int], _Written] = defaultdict(_Written)
    for message in case.evidence.logs:
        place = subjects.parse_log(message.subject)
        if place.owner == "run":
            chunk = chunks.parse(message.subject, message.headers, message.data, seq=message.seq)
            found[place.id, chunk.attempt, chunk.dispatch].add(chunk)
    return found


@rule
def logs_are_whole(case: Case) -> Found:
    """Of each execution: what the task wrote, from its first byte on, to its end or to a tombstone that says why.

    The log of an execution that a successor of its worker went on with is that of several dispatches, one after the other.
    """
    written = _written(case)
    for run_id, entries in case.runs.items():
        for attempt, dispatches, totals in _dispatches(entries):
            logs = [written.get((run_id, attempt, dispatch)) or _Written() for dispatch in dispatches]
            width = case.starts[run_id].width if run_id in case.starts else None
            for fault in _faults(logs, (run_id, attempt), totals, width):
                about = f"{run_id}, attempt {attempt}, dispatch {', '.join(map(str, dispatches))}"
                yield _violation(logs_are_whole, about, fault)


def _dispatches(entries: list[Entry]) -> Iterator[tuple[int, tuple[int, ...], dict[str, Any] | None]]:
    """Each lease that ended other than by waiting, after those that it went on from, and the bytes its holder said it stored.

    None if it said nothing.
    """
    chain: tuple[int, ...] = ()
    attempt, held, waited = 0, False, False
    for event in (entry.event for entry in entries):
        if event.kind == "leased":
            goes_on = "execution" in event.data and not waited
            chain = (*(chain if goes_on else ()), event.data["dispatch_attempt"])
            attempt, held, waited = event.data["attempt"], True, False
        elif event.kind == "waiting":
            held, waited = False, True
        elif held and event.kind in {"lease_lost", "retry_scheduled", *TERMINAL}:
            yield attempt, chain, event.data.get("logs")
            held = False


def _faults(
    logs: list[_Written], about: tuple[str, int], totals: dict[str, Any] | None, width: int | None
) -> Iterator[str]:
    stored = {stream: [log.joined(stream) for log in logs] for stream in ("stdout", "stderr", "log")}
    for log in logs:
        yield from log.faults
    stdout = b"".join(stored["stdout"])
    if width is not None and stdout != expected(*about, len(stdout), width):
        yield f"stdout is not what the task wrote: {stdout[:200]!r}"
    if totals is None:
        if not logs[-1].tombstones:
            yield "it ends early, and no tombstone says why"
        return
    for stream, parts in stored.items():
        if len(parts[-1]) != totals[stream] and not totals["truncated"]:
            yield f"{stream}: {len(parts[-1])} bytes are stored, {totals[stream]} were written"


@rule
def records_are_whole(case: Case) -> Found:
    """Sequences count from 1 without a gap; each record of a run is there once, in order, however often it was executed."""
    ends: Counter[str] = Counter()
    reached: dict[str, int] = defaultdict(lambda: -1)
    for message in case.evidence.records:
        if not message.subject.startswith("helmr.io.") or subjects.parse_io(message.subject).direction != "out":
            continue
        record = msgspec.json.decode(message.data, type=StreamRecord)
        ends[message.subject] += 1
        if record.sequence != ends[message.subject]:
            yield _violation(
                records_are_whole, message.subject, f"{record.sequence} follows {ends[message.subject] - 1}"
            )
        run_id, number = str(record.run_id), record.data["number"]
        if number != reached[run_id] + 1:
            yield _violation(records_are_whole, run_id, f"record {number} follows {reached[run_id]}")
        reached[run_id] = number


@rule
def a_token_has_one_answer(case: Case) -> Found:
    """A token is completed once, with what the client was told; every run that waits for it gets just that, and does get it."""
    for token, completions in case.completions.items():
        if len(completions) > 1:
            yield _violation(a_token_has_one_answer, token, f"completed {len(completions)} times")
    for answer in case.evidence.answers:
        if answer.data not in _answers(case, answer.token):
            text = f"{answer.data} was acknowledged; it is completed with {_answers(case, answer.token)}"
            yield _violation(a_token_has_one_answer, answer.token, text)
    for run_id, entries in case.runs.items():
        start = case.starts.get(run_id)
        if start is not None and start.kind == "waits-for-token" and entries[-1].event.kind == "succeeded":
            yield from _heard(case, run_id, entries)


def _answers(case: Case, token: str) -> list[Any]:
    return [event.data["data"] for event in case.completions.get(token, ())]


def _heard(case: Case, run_id: str, entries: list[Entry]) -> Found:
    token = case.spec(run_id).payload["token"]
    heard = entries[-1].event.data["output"]["answer"]
    if heard is not None and heard not in _answers(case, token):
        text = f"heard {heard} of {token}, which is completed with {_answers(case, token)}"
        yield _violation(a_token_has_one_answer, run_id, text)
    timeouts = [entry.event.at for entry in entries if entry.event.kind == "wait_timed_out"]
    for event in case.completions.get(token, ()):
        if heard is None and timeouts and timeouts[-1] - event.at > timedelta(seconds=_TIMER_RACE):
            text = f"{token} was completed, and it was not woken: {_story(entries)}"
            yield _violation(a_token_has_one_answer, run_id, text)


@rule
def other_entities_follow_their_rules(case: Case) -> Found:
    """The states of sessions, workspaces, queues and tokens are the fold of their events as well."""
    states: dict[str, Any] = {}
    kinds: dict[str, Any] = {"session": SESSION, "workspace": WORKSPACE, "queue": QUEUE, "token": TOKEN}
    for message in case.evidence.runs:
        if not message.subject.startswith("helmr.ev."):
            continue
        place = subjects.parse_event(message.subject)
        if place.entity not in kinds:
            continue
        event = kinds[place.entity].decode(message.data)
        try:
            states[place.id] = kinds[place.entity].fold(states.get(place.id), event, event.at, place.id)
        except Conflict as error:
            yield _violation(other_entities_follow_their_rules, place.id, error.message)
            continue
        if states[place.id] != event.state:
            text = f"event {event.cursor} ({event.kind}) was appended to another past"
            yield _violation(other_entities_follow_their_rules, place.id, text)


@rule
def the_history_is_the_fold(case: Case) -> Found:
    """DuckDB has what a fresh fold of the log has."""
    for difference in case.evidence.differences:
        yield _violation(the_history_is_the_fold, "history", difference)


@rule
def nothing_is_left(case: Case) -> Found:
    """No process, container, consumer or temporary folder outlives what it was for."""
    for leak in case.evidence.leaks:
        yield _violation(nothing_is_left, "left", leak)


@rule
def parts_end_when_told(case: Case) -> Found:
    """A part ends when it is stopped or killed, and not by itself."""
    for crash in case.evidence.crashes:
        yield _violation(parts_end_when_told, "part", crash)


def _story(entries: list[Entry]) -> str:
    """The events of a run on one line."""
    return " · ".join(_told(entry) for entry in entries)


def _told(entry: Entry) -> str:
    event = entry.event
    who = f" {event.data['worker']}" if event.kind in {"leased", "lease_lost"} else ""
    lane = f" {event.data['lane']}" if event.kind == "queued" else ""
    return f"{event.cursor} {event.kind}{who}{lane} {event.at:%M:%S.%f}"[:-3]
