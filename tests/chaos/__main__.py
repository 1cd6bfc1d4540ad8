"""``scripts/chaos``: run the test-bed with a seed, and say what it found."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import bed, faults
from tests.chaos.part_process import MUTATION, MUTATIONS

#: Mean seconds between two starts that two processors can cope with.
_EVERY = {"process": 0.2, "docker": 1.5}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Run a Helmr of real processes under load while a plan made from the seed kills, stops and cuts them off; "
        "then check everything that happened. Ends with 1 if a rule was broken.",
        epilog="example: scripts/chaos --seed 7 --seconds 120 --faults kill,pause",
    )
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it is loaded and broken; default: 60")
    parser.add_argument("--engine", choices=["process", "docker"], default="process")
    parser.add_argument("--every", type=float, help="mean seconds between two starts; default: 0.2, with docker 1.5")
    parser.add_argument("--faults", default=",".join(faults.KINDS), help="which kinds; default: %(default)s; none: ''")
    parser.add_argument(
        "--fault",
        dest="plan",
        action="append",
        type=faults.parse,
        metavar="'AT KIND TARGET [SECONDS]'",
        help="this fault, and others given like it, instead of a plan from the seed, e.g. '3 pause worker-1 9'",
    )
    parser.add_argument(
        "--mutation", choices=sorted(MUTATIONS), help="take a protection away from all parts, to see that it is missed"
    )
    parser.add_argument("--repeat", type=int, default=1, help="so many seeds, one after another, each one higher")
    parser.add_argument(
        "--keep", action="store_true", help="keep the folder, with everything that happened, in any case"
    )
    parser.add_argument("--quiet", action="store_true", help="say only what came of it")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code."""
    given = _options()
    kinds = tuple(kind for kind in given.faults.split(",") if kind)
    if unknown := set(kinds) - set(faults.KINDS):
        print(f"error: no faults {', '.join(sorted(unknown))}; there are {', '.join(faults.KINDS)}", file=sys.stderr)
        return 2
    first = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    failed = 0
    if given.mutation:
        os.environ[MUTATION] = given.mutation
    for seed in range(first, first + given.repeat):
        options = bed.Options(
            seed=seed,
            seconds=given.seconds,
            engine=given.engine,
            every=given.every or _EVERY[given.engine],
            kinds=kinds,
            plan=None if given.plan is None else tuple(given.plan),
        )
        failed += _one(options, given)
    return 1 if failed else 0


def _one(options: bed.Options, given: argparse.Namespace) -> bool:
    """One seed; whether it broke a rule."""
    folder = Path(tempfile.mkdtemp(prefix="helmr-chaos-"))
    print(f"seed {options.seed} ({options.seconds:g} s, {options.engine} engine), in {folder}", flush=True)
    begin = time.monotonic()

    def say(text: str) -> None:
        if not given.quiet:
            print(f"  {time.monotonic() - begin:7.2f} {text}", flush=True)

    report = asyncio.run(bed.run(options, folder, say))
    print("  " + ", ".join(f"{name} {value}" for name, value in report.figures.items()))
    for violation in report.violations:
        print(f"  VIOLATION {violation}")
    print(f"seed {options.seed}: {len(report.violations)} violations, {time.monotonic() - begin:.0f} s", flush=True)
    if report.violations or given.keep:
        for name in ("runs", "logs", "records"):
            (folder / f"{name}.txt").write_text("\n".join(bed.stored_json(getattr(report.evidence, name))))
        print(f"  kept: {folder} (logs/ of the parts, runs.txt, logs.txt and records.txt of the log)")
    else:
        shutil.rmtree(folder)
    return bool(report.violations)


if __name__ == "__main__":
    sys.exit(main())
