"""Two hosts with a link of 1 Gb/s between them: network namespaces of this machine, one core each, Open MPI over TCP. How
much of its unlimited speed a run keeps, for K = 2 and R = 2, f32 and bf16 on the wire; and what replicas gain where every stage's
gradients may be one update older than the pipeline makes them, so that no forward waits for an all-reduce. Called by
scripts/bench-hosts.sh, which makes the namespaces and takes them away.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
import typing

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import NOISY, PROGRAM, ROOT, bench, machine, run, settings, spread, table, write

# The link, and what TCP leaves of it: 1448 bytes of every 1514; the script's tbf has this rate.
BITS = 1e9
BYTES = BITS / 8 * 1448 / 1514

# Four ranks on two cores: their compute is slept. Milliseconds of forward and backward of a microbatch; a stage has 4 MiB of gradients.
SLEPT = "30,60"


class Case(typing.NamedTuple):
    """A grid with f32 or bf16 on the wire."""

    grid: str
    wire: str
    microbatches: int
    reduce_delay: int = 0

    @property
    def slept(self):
        return self.grid == "2x2"

    def name(self):
        return f"{self.grid}{' slept' if self.slept else ''}{', reduce_delay' if self.reduce_delay else ''}"


CASES = [
    Case("2x1", "f32", 2),
    Case("2x1", "bf16", 2),
    Case("1x2", "f32", 1),
    Case("1x2", "f32", 1, 1),
    Case("1x2", "bf16", 1),
    Case("2x2", "f32", 2),
    Case("2x2", "f32", 2, 1),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="small model, one round: whether it works")
    parser.add_argument("--json", default=os.path.join("runs", "bench-hosts.json"))
    parser.add_argument("--launcher", required=True, help="starts mpirun on the first host")
    parser.add_argument("--link", required=True, help="on | off: limits the link, or frees it")
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.json = args.json.replace(".json", "-short.json")
    return args


class Hosts:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder

    def limit(self, on):
        subprocess.run([self.args.link, "on" if on else "off"], check=True)

    def measure(self, case, limited):
        self.limit(limited)
        sets = {"model.tie": "none", "microbatches": case.microbatches, "wire": case.wire, "slack": 2}
        # The launcher takes mpirun's own options.
        more = ["--steps", 10 if self.args.short else 14]
        if case.slept:
            sets.update({"model.layers": 2, "batch": 2 * case.microbatches})
            more += ["--emulated-compute", SLEPT]
        elif self.args.short:
            sets.update({"model.layers": 2, "model.d_model": 64, "model.d_ff": 128, "data.sequence": 64})
        sets["grid.reduce_delay"] = case.reduce_delay
        config = "configs/emulated.toml" if case.slept else "configs/scaling.toml"
        return bench(config, case.grid, os.path.join(self.folder, "run"), sets, more, (self.args.launcher,))

    def final_loss(self, wire):
        """Held-out loss of the quickstart's grid; both run on this machine, without the hosts."""
        steps = 20 if self.args.short else 400
        out = os.path.join(self.folder, f"loss-{wire}")
        sets = {"wire": wire, "steps": steps, "sync_steps": 50, "eval.every": steps}
        run(["mpirun", "-n", 4, "--oversubscribe", PROGRAM, "train", "configs/quickstart.toml", "--out", out, *settings(sets)])
        with open(os.path.join(out, "metrics.jsonl")) as file:
            return [line["eval_loss"] for line in map(json.loads, file) if "eval_loss" in line][-1]


def bound(case, free):
    """The share of its speed that the arithmetic of the bytes leaves, and the transfer a step in seconds. K = 2: activations
    down and gradients up at the same time, hidden under the compute unless they take longer than it. R = 2: one bucket after
    the other, none before the last microbatch's backward has made it (in time by its size); with a delay of its own the next
    forward hides what is left."""
    value = 2 if case.wire == "bf16" else 4
    step, stage = free["step_s"], free["stages"][-1]
    if case.grid == "2x1":
        each_way = free["tokens"] * free["d_model"] * value / BYTES
        return min(1.0, step / max(step, each_way)), each_way
    backward, forward, sizes = stage["backward_ms"] / 1e3, stage["forward_ms"] / 1e3, stage["bucket_values"]
    made = moved = 0.0
    for size in sizes:
        made += backward * size / sum(sizes)
        # Half of it is sent to be summed, half as sums: as many bytes each way as it has.
        moved = max(made, moved) + size * value / BYTES
    left = max(0.0, moved - backward - (forward if case.reduce_delay else 0.0))
    return step / (step + left), sum(sizes) * value / BYTES


def main():
    args = arguments()
    rounds = 1 if args.short else args.rounds
    found = {case: {"free": [], "limited": []} for case in CASES}
    last = {}
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(args, folder)
        for _ in range(rounds):
            for case in CASES:
                for limited in (False, True):
                    result = hosts.measure(case, limited)
                    found[case]["limited" if limited else "free"].append(result["tokens_per_s"])
                    if not limited:
                        with open(os.path.join(folder, "run", "config.toml"), "rb") as file:
                            config = tomllib.load(file)
                        tokens = config["batch"] * config["data"]["sequence"]
                        last[case] = {**result, "tokens": tokens, "d_model": config["model"]["d_model"]}
                    where = "1 Gb/s" if limited else "free"
                    print(f"{case.name()} {case.wire} {where}: {result['tokens_per_s']:,.0f} tokens/s", flush=True)
        losses = {wire: hosts.final_loss(wire) for wire in ("f32", "bf16")}
    rows, result = [], {"machine": machine(), "date": str(datetime.date.today()), "losses": losses}
    for case, rates in found.items():
        ratio = statistics.median(a / b for a, b in zip(rates["limited"], rates["free"]))
        noisy = any(spread(values) > NOISY for values in rates.values())
        allowed, transfer = bound(case, last[case])
        shown = "too noisy to say" if noisy else f"{ratio:.2f}"
        rows.append((case.name(), case.wire, f"{statistics.median(rates['free']):,.0f}", f"{statistics.median(rates['limited']):,.0f}",
                     f"{transfer * 1e3:.0f}", f"{last[case]['step_s'] * 1e3:.0f}", shown, f"{allowed:.2f}"))
        result[f"{case.name()} {case.wire}"] = {**rates, "bound": allowed}
    print(f"\n{machine()}, two hosts of one core, link 1 Gb/s, Open MPI over TCP, {result['date']}\n")
    if args.short:
        print("the short form: these figures say that everything runs\n")
    print(table(["grid", "wire", "tokens/s free", "at 1 Gb/s", "transfer, ms a step", "step, ms", "kept", "bound"], rows))
    print(f"\nheld-out loss of the quickstart's model on 2x2: {losses['f32']:.4f} with f32 on the wire, {losses['bf16']:.4f} with bf16")
    write(os.path.join(ROOT, args.json), result)
    print(f"{args.json} has every number")


if __name__ == "__main__":
    main()
