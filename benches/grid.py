"""Grids that are larger than the machine: stages sleep instead of computing (10 ms forward, 20 ms backward a microbatch),
while schedule, messages (1 MiB of activations), reductions (4 MiB of gradients a layer) and bookkeeping are real. Every
figure stands beside what `ouroboros schedule` predicts. Called by scripts/bench-grid.sh.
"""

import argparse
import datetime
import os
import re
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import NOISY, PROGRAM, ROOT, bench, machine, run, spread, table, write

FORWARD, BACKWARD = 10, 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the rows that a target belongs to")
    parser.add_argument("--short", action="store_true", help="a few small grids: whether it works")
    parser.add_argument("--json", default=os.path.join("runs", "bench-grid.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.json = args.json.replace(".json", "-short.json")
    return args


def predicted(grid, m, schedule, slack, tie):
    """The ideal speed-up that `ouroboros schedule` prints for one replica."""
    stages = grid.split("x")[0]
    text = run([PROGRAM, "schedule", "--grid", f"{stages}x1", "-m", m, "--schedule", schedule, "--slack", slack, "--tie", tie,
                "--steps", 0, "--times", f"{FORWARD}:{BACKWARD}:0"])
    return float(re.search(r"ideal speed-up +([0-9.]+)", text).group(1))


def measured(folder, grid, m, schedule="decoupled", slack=2, tie="none", layers=None):
    stages, replicas = map(int, grid.split("x"))
    # Two rows of 512 tokens of 256 values: 1 MiB.
    sets = {"model.layers": layers or stages, "microbatches": m, "batch": 2 * m * replicas, "schedule": schedule,
            "slack": slack, "model.tie": tie}
    steps = [] if schedule == "decoupled" else ["--steps", 8]
    more = ["--emulated-compute", f"{FORWARD},{BACKWARD}", *steps]
    return bench("configs/emulated.toml", grid, os.path.join(folder, "run"), sets, more)


def row(folder, grid, m, schedule="decoupled", slack=2, tie="none", layers=None, rounds=1):
    """Median utilisation of some rounds, the speed-up that it is, the predicted one."""
    results = [measured(folder, grid, m, schedule, slack, tie, layers) for _ in range(rounds)]
    shares = [result["utilisation"] for result in results]
    ideal = predicted(grid, m, schedule, slack, tie)
    stages = int(grid.split("x")[0])
    share = statistics.median(shares)
    name = schedule if tie == "none" else f"{tie}, {schedule}"
    off = statistics.median(result["predicted_step_s"] / result["step_s"] for result in results)
    found = {"grid": grid, "m": m, "slack": slack, "schedule": name, "layers": layers or stages, "utilisation": share,
             "speed_up": share * stages, "predicted": ideal, "step_prediction": off, "rounds": shares,
             "noisy": rounds > 1 and spread(shares) > NOISY}
    print(f"{grid} m={m} {name}: utilisation {share:.3f}, speed-up {share * stages:.2f}, predicted {ideal:.2f}", flush=True)
    return found


def cells(found):
    note = " (too noisy to say)" if found["noisy"] else ""
    return (found["grid"], found["m"], found["slack"], found["schedule"], f"{found['utilisation']:.3f}{note}",
            f"{found['speed_up']:.2f}", f"{found['predicted']:.2f}")


def main():
    args = arguments()
    if not os.path.exists(PROGRAM):
        sys.exit(f"{PROGRAM} is missing; run cargo build --release")
    stages, replicas = ([2, 3], [1, 2]) if args.short else ([2, 3, 4, 5, 8, 11], [1, 2, 4])
    rounds = 1 if args.short else args.rounds
    wanted = [] if args.short else ["4x1", "8x1", "4x4", "8x4", "11x4"]
    with tempfile.TemporaryDirectory() as folder:
        wide = [row(folder, f"{k}x{r}", 8, rounds=rounds if f"{k}x{r}" in wanted else 1) for k in stages for r in replicas]
        # The paper's setting: one microbatch a step, the least slack.
        paper = [row(folder, f"{k}x1", 1, slack=1, rounds=rounds if k == 4 else 1) for k in stages]
        paper += [row(folder, f"{k}x1", 1, slack=1, tie=tie) for tie in ("head", "fresh") for k in stages if k > 2]
        others = ["1f1b", "gpipe", "sequential"]
        draining = [(m, kind, k) for m in (1, 8) for kind in others for k in stages]
        if args.short:
            draining = draining[-2:]
        synchronous = [row(folder, f"{k}x1", m, kind, slack=1) for m, kind, k in draining]
        deep = [] if args.short else [row(folder, "4x1", 8, layers=64)]
    today = datetime.date.today()
    print(f"\n{machine()}, {today}: emulated compute {FORWARD} + {BACKWARD} ms, 1 MiB of activations, 4 MiB of gradients a layer")
    head = ["grid", "m", "slack", "schedule", "utilisation", "speed-up", "predicted"]
    for title, rows in [("decoupled", wide), ("one microbatch a step, as in the paper", paper),
                        ("schedules that drain after every step", synchronous), ("64 layers on 4 stages", deep)]:
        if rows:
            print(f"\n{title}\n\n" + table(head, map(cells, rows)))
    if args.short:
        print("\nthe short form: these figures say that everything runs")
    else:
        targets = [(f"utilisation {found['grid']}", cells(found)[4], "0.95") for found in wide if found["grid"] in wanted]
        four = next(found for found in paper if found["grid"] == "4x1" and found["schedule"] == "decoupled")
        targets.append(("speed-up at K = 4, m = 1", f"{four['speed_up']:.2f}", "3.80"))
        off = [found["step_prediction"] for found in wide + paper + synchronous + deep]
        targets.append(("predicted over measured step time, lowest and highest", f"{min(off):.3f}, {max(off):.3f}", "0.95 to 1.05"))
        print("\n" + table(["", "measured", "wanted"], targets))
    write(os.path.join(ROOT, args.json), {"machine": machine(), "date": str(today), "decoupled": wide, "paper": paper,
                                          "synchronous": synchronous, "deep": deep})
    print(f"\n{args.json} has every number")


if __name__ == "__main__":
    main()
