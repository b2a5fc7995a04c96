"""What saving costs, and how fast it is: a decoupled run that saves its whole state every 100 steps, and the disk's own
sequential speed, measured on the same folder. Called by scripts/bench-save.sh.
"""

import argparse
import datetime
import json
import mmap
import os
import re
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import common
from common import PROGRAM, ROOT, machine, run, settings, table, write

# Steps after a save that may still be slower for it: the pipeline drains, fills again, and the copy is being written.
WINDOW = 20
CHUNK = 8 << 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3, help="that are measured")
    parser.add_argument("--every", type=int, default=100, help="steps between them")
    parser.add_argument("--folder", default=os.path.join(ROOT, "runs"), help="on the disk that is measured")
    parser.add_argument("--short", action="store_true", help="small model, few steps: whether it works")
    parser.add_argument("--json", default=os.path.join("runs", "bench-save.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.saves, args.every = 2, 30
        args.json = args.json.replace(".json", "-short.json")
    return args


def disk(folder, size, direct):
    """Seconds in which `size` bytes are written in large pieces, one after the other, and are on the disk: through the
    cache or past it; none where the file system has no such way.
    """
    values = mmap.mmap(-1, size)  # As a state, it comes out of memory and not out of a cache; begins with a page.
    values.write(os.urandom(size))
    path = os.path.join(folder, "sequential")
    begun = time.monotonic()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0))
        with memoryview(values) as view:
            for start in range(0, size, CHUNK):
                assert os.write(file, view[start : start + CHUNK]) == min(CHUNK, size - start), "a short write"
    except OSError:
        if direct:
            return None
        raise
    os.fsync(file)
    os.close(file)
    seconds = time.monotonic() - begun
    os.remove(path)
    return seconds


def train(args, out):
    """The run: seconds of its steps, and of every save its MiB, its copy and its writing."""
    small = {"model.layers": 2, "model.d_model": 128} if args.short else {"model.layers": 16, "model.d_model": 512}
    sets = {**small, "model.heads": 4, "model.d_ff": 4 * small["model.d_model"], "data.sequence": 64, "batch": 8,
            "microbatches": 2, "steps": args.every * args.saves + WINDOW + 10, "checkpoint.every": args.every,
            "checkpoint.keep_last": 2}
    command = ["mpirun", "-n", 2, PROGRAM, "train", "configs/scaling.toml", "--grid", "2x1", "--out", out]
    text = run([*command, *settings(sets)])
    saves = [tuple(map(float, found)) for found in
             re.findall(r"saved ([0-9.]+) MiB: ([0-9.]+) s to copy, ([0-9.]+) s to write", text)]
    with open(os.path.join(out, "metrics.jsonl")) as file:
        seconds = [line["step_s"] for line in map(json.loads, file) if "loss" in line]
    parameters = int(re.search(r"([0-9]+) parameters", text).group(1))
    return parameters, seconds, saves


def cost(args, seconds):
    """The median of what a save adds, seconds, and the median step without any."""
    windows = [range(args.every * n, args.every * n + WINDOW) for n in range(1, args.saves + 1)]
    plain = statistics.median(s for step, s in enumerate(seconds) if step > common.WARM and not any(step in w for w in windows))
    # The step before a sync point ends with the drain.
    added = [sum(seconds[w.start - 1 : w.stop]) - (WINDOW + 1) * plain for w in windows]
    return statistics.median(added), plain


def main():
    args = arguments()
    common.TIME_LIMIT = 3600
    if not os.path.exists(PROGRAM):
        sys.exit(f"{PROGRAM} is missing; run cargo build --release")
    os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        parameters, seconds, saves = train(args, os.path.join(folder, "run"))
        size = int(saves[0][0] * (1 << 20))
        size -= size % 4096
        disks = {direct: [disk(folder, size, direct) for _ in range(5)] for direct in (False, True)}
        disks = {direct: times for direct, times in disks.items() if None not in times}
    added, plain = cost(args, seconds)
    share = added / (args.every * plain)
    speeds = {direct: [size / (1 << 20) / took for took in disks[direct]] for direct in disks}
    own = max(statistics.median(speeds[direct]) for direct in speeds)
    rates = [mib / (copy + writing) for mib, copy, writing in saves[: args.saves]]
    last = saves[-1][0] / sum(saves[-1][1:])
    print(f"{machine()}, {datetime.date.today()}: {parameters:,} parameters, grid 2x1, a state every {args.every} steps\n")
    print(table(("", "measured", "wanted"), [
        ("a state, MiB", f"{saves[0][0]:.0f}", "-"),
        ("median step, s", f"{plain:.3f}", "-"),
        ("training stands for the copy, s", f"{statistics.median(copy for _, copy, _ in saves):.3f}", "-"),
        ("a save makes the run longer by, s", f"{added:.2f}", "-"),
        (f"of the throughput, saved every {args.every} steps", f"{100 * share:.2f} %", "3 % at most"),
        ("copied and on the disk, beside the training, MiB/s", f"{statistics.median(rates):.0f}", "-"),
        *((f"the disk's own sequential speed, {how} the cache, MiB/s",
           f"{statistics.median(speeds[direct]):.0f} ({min(speeds[direct]):.0f} to {max(speeds[direct]):.0f})", "-")
          for direct, how in ((False, "through"), (True, "past")) if direct in speeds),
        ("of the faster of the two", f"{statistics.median(rates) / own:.2f}", "0.70"),
        ("the last state, nothing beside it, of the faster", f"{last / own:.2f}", "-"),
    ]))
    write(args.json, {"machine": machine(), "date": str(datetime.date.today()), "parameters": parameters, "seconds": seconds,
                      "saves": saves, "cached_s": disks[False], "direct_s": disks.get(True), "share": share, "added_s": added, "step_s": plain})
    print(f"\n{args.json} has every number")


if __name__ == "__main__":
    main()
