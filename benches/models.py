"""The models of today, in alternating rounds of one run: a Llama beside `transformers`, a large vocabulary beside a small
one, generation after a long text and after a short one, import and export beside a copy. Called by scripts/bench-models.sh.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import NOISY, PROGRAM, ROOT, bench, machine, rate, run, settings, spread, table, write
from peers import text

PYTHON = os.path.join(ROOT, ".venv-hf", "bin", "python")
PEER = os.path.join(ROOT, "benches", "peers", "llama.py")
MIB = 1 << 20

LLAMA = {"model.arch": "llama", "model.layers": 8, "model.d_model": 256, "model.heads": 4, "model.kv_heads": 2,
         "model.d_ff": 688, "model.tie": "none", "data.order": "streams", "optimizer.schedule": "constant",
         "optimizer.warmup": 0}
SHORT = {"model.layers": 2, "model.d_model": 64, "model.d_ff": 128, "data.sequence": 64}
VOCABULARIES = (8192, 50257)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=["training", "memory", "generation", "folders"])
    parser.add_argument("--short", action="store_true", help="small models, one round: whether it works, not how fast")
    parser.add_argument("--json", default=os.path.join("runs", "bench-models.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.rounds, args.steps, args.json = 1, 8, args.json.replace(".json", "-short.json")
    return args


def median(values):
    return statistics.median(values)


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.found, self.lines = args, folder, {}, []
        path = self.at("text")
        text(path, 2_000_000)
        self.sets = {**LLAMA, **(SHORT if args.short else {}), "data.path": path}

    def at(self, *names):
        return os.path.join(self.folder, *names)

    def add(self, label, found, target, **more):
        """A line of the table: the median of the rounds' ratios, and what is wanted."""
        noisy = len(found) > 1 and spread(found) > NOISY
        shown = f"{median(found):.2f}" + (" (too noisy to say)" if noisy else "")
        self.lines.append((label, shown, target))
        self.found[label] = {"rounds": found, "noisy": noisy, "target": target, **more}

    def training(self):
        """Ours on one core and on two, and `transformers` on one, from the same weights over the same batches."""
        out = self.at("init")
        run([PROGRAM, "init", "configs/scaling.toml", "--out", out, *settings({**self.sets, "microbatches": 1})])
        run([PROGRAM, "export", out, "--to", self.at("llama")])
        weights = os.path.join(out, "checkpoints", "step-0")

        def ours(grid, microbatches):
            steps = self.args.steps + (4 if grid == "2x1" else 0)
            sets = {**self.sets, "microbatches": microbatches}
            result = bench("configs/scaling.toml", grid, self.at("ours"), sets, ["--steps", steps])
            tokens = round(result["tokens_per_s"] * result["step_s"])
            places = [place["F_s"] + place["B_s"] if "F_s" in place else 0 for place in result["devices"]]
            return {"rate": rate(tokens, result["seconds"]), "losses": result["losses"], "places": places}

        def theirs(_, microbatches):
            command = [PYTHON, PEER, self.at("llama"), weights, "--microbatches", microbatches, "--steps", self.args.steps]
            result = json.loads(run(command).splitlines()[-1])
            return {"rate": rate(result["tokens"], result["seconds"]), "losses": result["losses"]}

        ways = {"1x1": ours, "2x1": ours, "transformers": theirs}
        tried = (2,) if self.args.short else (1, 2)
        best = {}
        for name, way in ways.items():
            rates = {m: way(name, m)["rate"] for m in tried}
            best[name] = max(rates, key=rates.get)
            print(f"{name}: " + ", ".join(f"m = {m} {value:,.0f}" for m, value in rates.items()), flush=True)

        rounds = []
        for number in range(self.args.rounds):
            results = {name: way(name, best[name]) for name, way in ways.items()}
            first = results["transformers"]["losses"]
            for name, found in results.items():
                far = max(abs(a / b - 1) for a, b in zip(found["losses"], first[:1] if name == "2x1" else first))
                if not far <= 2e-3:
                    sys.exit(f"{name}: losses {found['losses']}, not {first}: this is another training")
            rounds.append({name: found["rate"] for name, found in results.items()})
            print(f"round {number + 1}: " + ", ".join(f"{n} {r:,.0f}" for n, r in rounds[-1].items()), flush=True)

        ratio = lambda over, under: [found[over] / found[under] for found in rounds]
        more = {"rates": rounds, "microbatches": best}
        self.add("Llama, ours 1x1 over transformers (eager, sdpa), tokens/s", ratio("1x1", "transformers"), "1.10", **more)
        allowed = self.allowed()
        self.add(f"the same, 2x1 over 1x1, of the {allowed:.2f} that the balanced cut allows",
                 [value / allowed for value in ratio("2x1", "1x1")], "0.97", **more)

    def allowed(self):
        """The cost of the whole model over that of the larger of its two stages, multiply-adds a token as `src/model/` counts
        them."""
        model = {key.split(".")[1]: value for key, value in self.sets.items() if key.startswith("model.")}
        d, f, layers = model["d_model"], model["d_ff"], model["layers"]
        g = d * model["kv_heads"] // model["heads"]
        block = 2 * d * d + 2 * d * g + 3 * d * f + self.sets.get("data.sequence", 256) * d
        stages = (layers / 2 * block + 2 * d, layers / 2 * block + 256 * d)
        return sum(stages) / max(stages)

    def memory(self):
        """The peak of the last stage, beyond what its tables and their optimizer state take: five values for each of theirs
        (the weight, its gradient, the one of the microbatch under way, and AdamW's two)."""
        def beyond(vocabulary):
            sets = {**self.sets, "model.vocabulary": vocabulary, "microbatches": 4}
            result = bench("configs/scaling.toml", "2x1", self.at("vocabulary"), sets, ["--steps", 8])
            peak = result["devices"][-1]["peak_bytes"]
            tables = 5 * 4 * vocabulary * self.sets["model.d_model"]
            return peak, peak - tables

        ratios = []
        for number in range(min(self.args.rounds, 3)):
            (small, rest), (large, larger) = (beyond(vocabulary) for vocabulary in VOCABULARIES)
            ratios.append(larger / rest)
            print(f"round {number + 1}: V = {VOCABULARIES[0]} {small / MIB:.0f} MiB, {rest / MIB:.0f} beyond the tables; "
                  f"V = {VOCABULARIES[1]} {large / MIB:.0f} MiB, {larger / MIB:.0f} beyond them", flush=True)
        self.add("peak memory of the last stage beyond its tables, V = 50,257 over V = 8,192", ratios, "1.05 at most")

    def generation(self):
        """Tokens/s with a text of 1,000 tokens before, over those with one of 100."""
        sets = {**self.sets, "data.sequence": 64 if self.args.short else 256}
        run([PROGRAM, "init", "configs/scaling.toml", "--out", self.at("grown"), *settings(sets)])
        words = open(self.at("text")).read(1000)

        def seconds(length, tokens):
            began = time.perf_counter()
            run([PROGRAM, "generate", self.at("grown"), "--prompt", words[:length], "--tokens", tokens, "--temperature", "0"])
            return time.perf_counter() - began

        ratios, rates = [], []
        few, many = 20, 220
        for number in range(self.args.rounds):
            # The start, and the reading of the prompt, are in both.
            short, long = (seconds(length, many) - seconds(length, few) for length in (100, 1000))
            rates.append({"100": (many - few) / short, "1000": (many - few) / long})
            ratios.append(short / long)
            print(f"round {number + 1}: {rates[-1]['100']:.0f} tokens/s after 100, {rates[-1]['1000']:.0f} after 1000", flush=True)
        self.add("generate: tokens/s after 1,000 tokens over after 100", ratios, "0.8", rates=rates)

    def folders(self):
        """Import and export of a folder over a plain copy of its files, each until it is on the disk."""
        shape = {"model.layers": 4, "model.d_model": 1024, "model.heads": 16, "model.kv_heads": 4, "model.d_ff": 2816,
                 "model.vocabulary": 1024 if self.args.short else 131072}
        run([PROGRAM, "init", "configs/scaling.toml", "--out", self.at("large"), *settings({**self.sets, **shape})])
        found = {}
        for dtype in ("f32", "bf16"):
            folder = self.at(f"{dtype}-folder")
            run([PROGRAM, "export", self.at("large"), "--to", folder, "--dtype", dtype])
            size = os.path.getsize(os.path.join(folder, "model.safetensors"))
            found[dtype] = {"import": [], "export": []}
            for number in range(self.args.rounds):
                new, back, copy = self.at("new"), self.at("back"), self.at("copy")
                for path in (new, back, copy):
                    shutil.rmtree(path, ignore_errors=True)
                os.sync()
                copied = timed(["sh", "-c", f"cp -r {folder} {copy} && sync {copy}/*"])
                into = timed([PROGRAM, "import", folder, "--out", new])
                # What an import has written past the cache: all three read from memory.
                subprocess.run(["sh", "-c", f"cat {new}/checkpoints/step-0/* >/dev/null"], check=True)
                out = timed([PROGRAM, "export", new, "--to", back])
                found[dtype]["import"].append(copied / into)
                found[dtype]["export"].append(copied / out)
                print(f"round {number + 1}: {size / MIB:.0f} MiB of {dtype}: copied in {copied:.2f} s, imported in {into:.2f}, "
                      f"exported in {out:.2f}", flush=True)
        for dtype, of in found.items():
            for way, ratios in of.items():
                self.add(f"{way} of a folder of {dtype}, over a plain copy of it", ratios, "0.5")


def timed(command):
    began = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=240)
    return time.perf_counter() - began


def main():
    args = arguments()
    for need, advice in [(PROGRAM, "cargo build --release"), (PYTHON, "scripts/hugging-face.sh")]:
        if not os.path.exists(need):
            sys.exit(f"{need} is missing; run {advice}")
    with tempfile.TemporaryDirectory(dir=os.path.join(ROOT, "target")) as folder:
        it = Bench(args, folder)
        for part in args.only or ["training", "memory", "generation", "folders"]:
            print(f"-- {part}", flush=True)
            getattr(it, part)()
    today = datetime.date.today()
    if args.short:
        print("\nthe short form: toy models, one round; these figures say that everything runs, not how fast")
    print(f"\n{machine()}, one thread a rank, {args.rounds} rounds, {today}\n")
    print(table(["measured in this run (medians of the rounds' ratios)", "", "wanted"], it.lines))
    write(os.path.join(ROOT, args.json), {"machine": machine(), "date": str(today), **it.found})
    print(f"\n{args.json} has every number")


if __name__ == "__main__":
    main()
