"""Ours beside plain PyTorch, DDP and torch.distributed.pipelining: the same model, batches and optimizer, in alternating
rounds of one run. Called by scripts/bench-peers.sh.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import NOISY, PROGRAM, ROOT, bench, machine, mpi_environment, rate, run, settings, spread, table, write

PYTHON = os.path.join(ROOT, ".venv", "bin", "python")
PEER = os.path.join(ROOT, "benches", "peers", "train.py")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, nargs="+", help="those that are tried; by default two for each program")
    parser.add_argument("--as-before", action="store_true", help="the best microbatches of the last run's JSON")
    parser.add_argument("--only", nargs="+", help="some of the programs, as in the table")
    parser.add_argument("--short", action="store_true", help="small model, one round: whether it works, not how fast")
    parser.add_argument("--json", default=os.path.join("runs", "bench-peers.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.json = args.json.replace(".json", "-short.json")
    return args


def text(path, size):
    """Words of a fixed random vocabulary, the same for ever."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(500)]
    out, length = [], 0
    while length < size:
        out.append(words[min(int(draw.expovariate(0.02)), 499)])
        length += len(out[-1]) + 1
    with open(path, "w") as file:
        file.write(" ".join(out))


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        path = os.path.join(folder, "text")
        text(path, 2_000_000)
        # All programs read the text as streams, and the learning rate is constant.
        self.sets = {"data.path": path, "data.order": "streams", "model.tie": "none", "optimizer.schedule": "constant",
                     "optimizer.warmup": 0}
        if args.short:
            self.sets.update({"model.layers": 2, "model.d_model": 64, "model.d_ff": 128, "data.sequence": 64})
        out = os.path.join(folder, "init")
        run([PROGRAM, "init", "configs/scaling.toml", "--out", out, *settings({**self.sets, "microbatches": 1})])
        self.weights = os.path.join(out, "checkpoints", "step-0")

    def ours(self, grid, microbatches, xl=False):
        sets = {**self.sets, "microbatches": microbatches}
        if xl and not self.args.short:
            sets.pop("data.order")
        config = "configs/scaling-xl.toml" if xl else "configs/scaling.toml"
        steps = self.args.steps + (4 if grid == "2x1" else 0)
        result = bench(config, grid, os.path.join(self.folder, "ours"), sets, ["--steps", steps])
        places = result["devices"]
        memory = max(place["peak_bytes"] / place["predicted_bytes"] for place in places)
        tokens = round(result["tokens_per_s"] * result["step_s"])
        return {"rate": rate(tokens, result["seconds"]), "losses": result["losses"], "memory": memory,
                "predicted": result["predicted_step_s"] / result["step_s"]}

    def peer(self, kind, microbatches):
        command = [PYTHON, PEER, kind, self.weights, "--microbatches", microbatches, "--steps", self.args.steps]
        result = json.loads(run(command).splitlines()[-1])
        return {"rate": rate(result["tokens"], result["seconds"]), "losses": result["losses"]}

    def pair(self, microbatches):
        """The products of two replicas on two cores; every step takes as long as the slower one's."""
        command = [PYTHON, PEER, "products", self.weights, "--microbatches", str(microbatches), "--steps",
                   str(self.args.steps), "--ranks", "2"]
        cores = sorted(os.sched_getaffinity(0))[:2]
        both = [subprocess.Popen(["taskset", "-c", str(core), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
                for core in cores]
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in both]
        return {"rate": rate(found[0]["tokens"], [max(pair) for pair in zip(*(one["seconds"] for one in found))])}

    def measure(self, name, microbatches):
        if name == "products twice":
            return self.pair(microbatches)
        if name.startswith("xl "):
            return self.ours(name[3:], microbatches, xl=True)
        return self.ours(name, microbatches) if "x" in name else self.peer(name, microbatches)

    def start(self):
        """Seconds from the launch of a 2x2 run to the end of its first step."""
        command = ["mpirun", "-n", "4", "--oversubscribe", PROGRAM, "train", "configs/quickstart.toml", "--out",
                   os.path.join(self.folder, "start"), *settings({"steps": 2, "eval.tokens": 1024})]
        began = time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, env=mpi_environment(), stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("step ") and "loss" in line:
                    took = time.monotonic() - began
                    process.stdout.read()
                    return took
        sys.exit("a 2x2 run of configs/quickstart.toml made no step")


def same_losses(first, results):
    """All must start from the same loss, and those without delay must go on alike, to the end."""
    for name, result in results.items():
        if name.startswith("xl ") or name.startswith("products"):
            continue
        pairs = list(zip(result["losses"], first))
        delayed = name == "2x1"
        if len(result["losses"]) < len(first) or None in result["losses"]:
            sys.exit(f"{name}: tells the losses {result['losses']}, not {len(first)} of them")
        for step, (found, expected) in enumerate(pairs[:1] if delayed else pairs):
            # Pipelines clip by stage; the first loss is before any update.
            bound = 1e-5 if step == 0 else (0.05 if name in ("gpipe", "1f1b") else 2e-3)
            if not abs(found / expected - 1) <= bound:  # nor not-a-number
                sys.exit(f"{name}: loss {found} at step {step}, not {expected}: this is another training")


# Microbatches that are tried, of which the faster ones are measured. Those that share the batch out have fewer rows to cut;
# pipelines that drain need more pieces.
TRIED = {"1x1": (1, 4), "2x1": (1, 2, 4), "1x2": (1, 2), "eager": (1, 4), "ddp": (1, 2), "gpipe": (4, 8), "1f1b": (4, 8),
         "xl 1x1": (1, 2, 4), "xl 2x1": (1, 2, 4), "products": (1, 2, 4), "products twice": (1, 2)}

TARGETS = [
    ("ours 1x1 over PyTorch eager", "1x1", ["eager"], 1.00),
    ("ours 2x1 decoupled over ours 1x1", "2x1", ["1x1"], 1.90),
    ("ours 2x1 over the better of GPipe and 1F1B", "2x1", ["gpipe", "1f1b"], 1.25),
    ("ours 1x2 over ours 1x1", "1x2", ["1x1"], 1.90),
    ("ours 1x2 over DDP", "1x2", ["ddp"], 1.20),
    ("XL 2x1 over XL 1x1", "xl 2x1", ["xl 1x1"], 1.88),
]


def main():
    args = arguments()
    for need, advice in [(PROGRAM, "cargo build --release"), (PYTHON, "scripts/setup.sh without LIBTORCH")]:
        if not os.path.exists(need):
            sys.exit(f"{need} is missing; run {advice}")
    if subprocess.run([PYTHON, "-c", "import numpy, torch.distributed.pipelining"], capture_output=True).returncode != 0:
        sys.exit(f"the peers need torch and numpy in .venv: {PYTHON} -m pip install torch==2.11.0 numpy")
    if args.short:
        args.rounds, args.steps, args.microbatches = 1, 8, [2]
    names = ["1x1", "2x1", "1x2", "eager", "ddp", "gpipe", "1f1b", "xl 1x1", "xl 2x1", "products", "products twice"]
    names = [name for name in names if not args.only or name in args.only]
    with tempfile.TemporaryDirectory() as folder:
        it = Bench(args, folder)
        best = {}
        if args.as_before:
            with open(os.path.join(ROOT, args.json)) as file:
                best = json.load(file)["microbatches"]
        for name in (name for name in names if name not in best):
            tried = args.microbatches or TRIED[name]
            best[name] = tried[0]
            if len(tried) > 1:
                # Each twice, in turn: a busy moment must not choose.
                twice = [{m: it.measure(name, m)["rate"] for m in tried} for _ in range(1 if args.short else 2)]
                rates = {m: max(rates[m] for rates in twice) for m in tried}
                best[name] = max(rates, key=rates.get)
                print(f"{name}: " + ", ".join(f"m = {m} {rate:,.0f}" for m, rate in rates.items()), flush=True)
        rounds = []
        for number in range(args.rounds):
            results = {name: it.measure(name, best[name]) for name in names}
            if "eager" in results:
                same_losses(results["eager"]["losses"], results)
            rounds.append(results)
            print(f"round {number + 1}: " + ", ".join(f"{n} {r['rate']:,.0f}" for n, r in results.items()), flush=True)
        starts = [it.start() for _ in range(1 if args.only else args.rounds)]
    show(args, names, best, rounds, starts)


def show(args, names, best, rounds, starts):
    rates = {name: [results[name]["rate"] for results in rounds] for name in names}
    noisy = {name for name in names if spread(rates[name]) > NOISY}
    today = datetime.date.today()
    print(f"\n{machine()}, one thread a rank, {args.rounds} rounds, {today}: tokens/s of the median step, all from the same first loss\n")
    rows = [(n, best[n], f"{statistics.median(rates[n]):,.0f}", f"{min(rates[n]):,.0f} to {max(rates[n]):,.0f}")
            for n in names]
    print(table(["", "m", "median", "range"], rows))
    lines, result = [], {"machine": machine(), "date": str(today), "rates": rates, "microbatches": best}
    for label, over, under, target in TARGETS:
        if not {over, *under} <= set(names):
            continue
        # Within a round the machine is the same; the better peer is the one of the higher median.
        other = max(under, key=lambda name: statistics.median(rates[name]))
        ratios = [a / b for a, b in zip(rates[over], rates[other])]
        ratio = statistics.median(ratios)
        doubt = sorted(noisy & {over, other})
        verdict = f"too noisy to say ({', '.join(doubt)} varied by over {NOISY:.0%})" if doubt else f"{ratio:.2f}"
        lines.append((label, verdict, f"{target:.2f}"))
        result[label] = {"ratios": ratios, "noisy": doubt, "target": target}
    # What two replicas can do at most: the products on both cores, and not a moment lost.
    for under, of in [("products", "the products on one core"), ("1x1", "ours 1x1"), ("ddp", "DDP")]:
        if {"products twice", under} <= set(names):
            limit = statistics.median(a / b for a, b in zip(rates["products twice"], rates[under]))
            result[f"limit over {under}"] = limit
            lines.append((f"limit: two replicas of the products and nothing else, over {of}", f"{limit:.2f}", "-"))
    ours = [name for name in names if "x" in name]
    off = [results[name]["predicted"] for results in rounds for name in ours]
    memory = max(results[name]["memory"] for results in rounds for name in ours)
    predicted = [f"{statistics.median(results[n]['predicted'] for results in rounds):.3f}" for n in ours]
    lines.append(("predicted over measured step time, " + ", ".join(ours), ", ".join(predicted), "0.95 to 1.05"))
    lines.append(("start of a 2x2 run, launch to first step, s", f"{statistics.median(starts):.2f}", "2 at most"))
    lines.append(("resident memory of a place over the prediction, highest", f"{memory:.2f}", "1.10 at most"))
    result.update({"predicted": off, "starts": starts, "memory": memory})
    if args.short:
        print("\nthe short form: a toy model, one round; these figures say that everything runs, not how fast")
    print("\n" + table(["measured in this run (medians of the rounds' ratios)", "", "wanted"], lines))
    write(os.path.join(ROOT, args.json), result)
    print(f"\n{args.json} has every number")


if __name__ == "__main__":
    main()
