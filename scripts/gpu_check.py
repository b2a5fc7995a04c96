"""The rows of scripts/gpu-check.sh, in the order of what they are worth: each is printed when it is known."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu"))
import checks
import speed
from command import CLOCK, PROGRAM, Skipped, end_all, run

# Seconds that a check may take; one of speed, more.
LIMIT, LIMIT_OF_SPEED = 100, 150


def rows(args):
    """Name, check, its limit."""
    yield from ((name, check, LIMIT) for name, check in checks.FIRST)
    if args.processor:
        yield "PyTorch's side of the comparison", speed.peer_works, LIMIT
    if not args.quick:
        yield from ((*speed.row(million, args.compile), LIMIT_OF_SPEED) for million in speed.FIRST)
        yield from ((name, check, LIMIT_OF_SPEED) for name, check in speed.REST)
    yield from ((name, check, LIMIT) for name, check in checks.REST)
    if not args.quick:
        yield from ((*speed.row(million, args.compile), LIMIT_OF_SPEED) for million in speed.LAST)


def wanted(args):
    anywhere, part = (*checks.ANYWHERE, speed.peer_works), 0
    for name, check, limit in rows(args):
        asked = not args.only or any(part in name for part in args.only)
        if asked and (not args.processor or check in anywhere or "oracle" in name):
            part = part % args.part[1] + 1
            if part == args.part[0]:
                yield name.replace("NCCL", "MPI") if args.processor else name, check, limit


def part(text):
    """`I/N` as numbers."""
    which, of = (int(number) for number in text.split("/"))
    if not 1 <= which <= of:
        raise ValueError
    return which, of


def why_not():
    """Why nothing can be checked here, if so."""
    text = run([PROGRAM, "doctor"])
    print(text, flush=True)
    lines = [line for line in text.splitlines() if line.startswith("GPU")]
    return next((line[4:].strip() for line in lines if line.startswith("GPU  ") or "; 0 devices" in line), None)


def made(check, seconds, reason):
    """How a check ends: its state, what is said about it, its figures."""
    CLOCK.start(seconds)
    try:
        if reason:
            raise Skipped(reason)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            found = check(work)
        return ("passed", *(found if isinstance(found, tuple) else (found, {})))
    except Skipped as skipped:
        return "skipped", str(skipped), {}
    except (Exception, SystemExit) as error:  # Whatever it is, the other checks are worth having.
        return "FAILED", f"{type(error).__name__}: {error}", {}


class Table:
    """What is known so far, in a file too."""

    def __init__(self, path):
        self.path, self.rows = path, []
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

    def add(self, name, state, text, figures, seconds):
        self.rows.append({"check": name, "state": state, "text": text, "figures": figures, "seconds": round(seconds, 1)})
        print(f"{state:8} {name}: {text} ({seconds:.0f} s)", flush=True)
        with open(self.path, "w") as file:
            json.dump(self.rows, file, indent=1)

    def count(self, state):
        return sum(row["state"] == state for row in self.rows)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the measurements of speed")
    parser.add_argument("--processor", action="store_true", help="the checks that need no GPU, on the processor: whether they work")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="checks whose name holds this; may be repeated")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="every N-th check from the I-th: N programs at once")
    parser.add_argument("--minutes", type=float, default=60, help="in all; checks that do not fit any more are skipped [60]")
    parser.add_argument("--compile", action="store_true", help="also PyTorch with torch.compile, which takes minutes")
    parser.add_argument("--json", help="what was found, in figures too [runs/gpu-check.json, of a part runs/gpu-check-I-of-N.json]")
    args = parser.parse_args()
    of = "-{}-of-{}".format(*args.part) if args.part[1] > 1 else ""
    args.json = args.json or os.path.join("runs", f"gpu-check{of}.json")
    return args


def main():
    args, begun = arguments(), time.monotonic()
    # A batch system's end is one of ours: the table is told.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = Table(args.json)
    try:
        reason = why_not()
        if args.processor:
            reason, checks.CUDA["device"] = None, "cpu"
        for name, check, limit in wanted(args):
            left, from_here = args.minutes * 60 - (time.monotonic() - begun), time.monotonic()
            late = None if left > 5 else f"the {args.minutes:g} minutes are over"
            found = made(check, min(limit, left), reason or late)
            table.add(name, *found, time.monotonic() - from_here)
    except KeyboardInterrupt:
        end_all()
        sys.exit(130)
    finally:
        print(f"\ngpu-check: {table.count('passed')} passed, {table.count('FAILED')} failed, {table.count('skipped')} skipped; "
              f"figures in {args.json}", flush=True)
    sys.exit(1 if table.count("FAILED") else 0)


if __name__ == "__main__":
    main()
