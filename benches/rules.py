"""What an update costs by each rule: the step of configs/scaling.toml on 2x1 with 8,192 tokens an update, as each rule makes it, beside AdamW's in
alternating rounds. Called by scripts/bench-rules.sh.
"""

import argparse
import datetime
import os
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import NOISY, ROOT, bench, machine, spread, table, write

RULES = {
    "AdamW": {"optimizer.kind": "adamw"},
    "Muon": {"optimizer.kind": "muon"},
    "SOAP, smaller sides": {"optimizer.kind": "soap", "optimizer.soap_sides": "smaller"},
    "SOAP": {"optimizer.kind": "soap"},
    "SOAP, soap_every = 2": {"optimizer.kind": "soap", "optimizer.soap_every": 2},
    "SOAP, soap_every = 1": {"optimizer.kind": "soap", "optimizer.soap_every": 1},
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--short", action="store_true", help="small model, one round: whether it works")
    parser.add_argument("--json", default=os.path.join("runs", "bench-rules.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.json = args.json.replace(".json", "-short.json")
        args.rounds, args.steps = 1, 8
    return args


def measure(args, rule, folder):
    """Seconds of a step, and of the slower stage's update."""
    sets = {"batch": 32, "model.tie": "none", **RULES[rule]}
    if args.short:
        sets.update({"model.layers": 2, "model.d_model": 64, "model.d_ff": 128, "data.sequence": 64})
    result = bench("configs/scaling.toml", "2x1", os.path.join(folder, "run"), sets, ["--steps", args.steps])
    return result["step_s"], max(stage["update_ms"] for stage in result["stages"]) / 1e3


def main():
    args = arguments()
    found = {rule: [] for rule in RULES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for rule in RULES:
                found[rule].append(measure(args, rule, folder))
                print(f"{rule}: {found[rule][-1][0] * 1e3:,.0f} ms a step", flush=True)

    adamw = [step for step, _ in found["AdamW"]]
    rows = []
    for rule, times in found.items():
        steps = [step for step, _ in times]
        ratios = [step / of_adamw for step, of_adamw in zip(steps, adamw)]
        noisy = spread(ratios) > NOISY
        rows.append((rule, f"{statistics.median(steps) * 1e3:.0f}", f"{statistics.median(u for _, u in times) * 1e3:.0f}",
                     "too noisy to say" if noisy else f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"))

    date = str(datetime.date.today())
    print(f"\n{machine()}, 2x1, 8 layers of width 256, 32 rows of 256 tokens an update, {date}\n")
    if args.short:
        print("the short form: these figures say that everything runs\n")
    print(table(["rule", "step, ms", "update, ms", "over AdamW", "range"], rows))
    write(os.path.join(ROOT, args.json), {"machine": machine(), "date": date, **{rule: times for rule, times in found.items()}})
    print(f"\n{args.json} has every number")


if __name__ == "__main__":
    main()
