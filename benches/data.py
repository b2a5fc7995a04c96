"""Data, in alternating rounds of one run: tokenising beside the Python package `tokenizers`, one core and two; the peak memory
of preparing much and little; the time to the first step with a long prepared file and a short one; what reading batches
costs. Called by scripts/bench-data.sh.
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
from common import NOISY, PROGRAM, ROOT, bench, machine, run, settings, spread, table, write

PYTHON = os.path.join(ROOT, ".venv-hf", "bin", "python")
PEER = os.path.join(ROOT, "benches", "peers", "tokenise.py")
END = "<|endoftext|>"
MB = 1_000_000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["tokenising", "memory", "start", "reading"])
    parser.add_argument("--short", action="store_true", help="small texts, one round: whether it works, not how fast")
    parser.add_argument("--json", default=os.path.join("runs", "bench-data.json"))
    args = parser.parse_args()
    if args.short:  # Must not be taken for a measurement.
        args.rounds, args.json = 1, args.json.replace(".json", "-short.json")
    return args


def documents(path, size):
    """JSON lines of documents of a fixed random language of 60,000 words by Zipf's law, the same for ever."""
    draw = random.Random(1)
    letters = "eeeeetttaaaooiinnsshhrrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 11))) for _ in range(60_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    with open(path, "w") as file:
        while written < size:
            drawn = draw.choices(words, weights, k=draw.randint(60, 1200))
            sentences = []
            while drawn:
                count = draw.randint(4, 20)
                sentences.append(" ".join(drawn[:count]).capitalize() + draw.choice([". ", ", ", "! ", ".\n\n", " 1984. "]))
                drawn = drawn[count:]
            line = json.dumps({"text": "".join(sentences)}) + "\n"
            written += len(line)
            file.write(line)


def timed(command):
    """Seconds and peak memory in bytes of a program that ends well."""
    begun = time.perf_counter()
    child = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode != 0:
        sys.exit(f"exit code {child.returncode}: {' '.join(map(str, command))}\n{output.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.found, self.lines = args, folder, {}, []
        self.scale = 0.02 if args.short else 1.0
        self.text = self.at("text.jsonl")
        documents(self.text, 40 * MB * self.scale)
        self.tokenizer = self.at("tokenizer.json")
        size = 2000 if args.short else 32_000
        run([PROGRAM, "data", "tokenizer", "train", self.text, "--size", size, "--out", self.tokenizer])

    def at(self, *names):
        return os.path.join(self.folder, *names)

    def add(self, label, found, target, digits=2, **more):
        """A line of the table: the median of the rounds, and what is wanted."""
        noisy = len(found) > 1 and spread(found) > NOISY
        shown = f"{statistics.median(found):.{digits}f}" + (" (too noisy to say)" if noisy else "")
        self.lines.append((label, shown, target))
        self.found[label] = {"rounds": found, "noisy": noisy, "target": target, **more}

    def prepare(self, what, out, *more):
        out = self.at(out)
        if os.path.exists(out):
            os.remove(out)
        return timed([PROGRAM, "data", "prepare", what, "--held-out", "0", "--out", out, *more])

    def tokenising(self):
        one, two, theirs = [], [], []
        for _ in range(self.args.rounds):
            theirs.append(timed([PYTHON, PEER, self.tokenizer, self.text, END, self.at("theirs.bin")])[0])
            one.append(self.prepare(self.text, "one", "--tokenizer", self.tokenizer, "--threads", 1)[0])
            two.append(self.prepare(self.text, "two", "--tokenizer", self.tokenizer, "--threads", 2)[0])
        with open(self.at("theirs.bin"), "rb") as file, open(self.at("one"), "rb") as ours:
            tokens = file.read()
            ours.seek(64)
            if ours.read(len(tokens)) != tokens:
                sys.exit("bench-data: the tokens are not those of the Python package")
        size = os.path.getsize(self.text) / MB
        rates = {name: [size / s for s in seconds] for name, seconds in (("one", one), ("two", two), ("theirs", theirs))}
        self.add("tokenising, one core, over the Python package", [t / o for t, o in zip(theirs, one)], "0.95", rates=rates)
        self.add("two cores over one", [o / t for o, t in zip(one, two)], "1.8")
        shown = ", ".join(f"{name} {statistics.median(rate):.1f}" for name, rate in rates.items())
        print(f"MB/s of JSON lines, the same {len(tokens) // 2:,} tokens, medians: {shown}")

    def memory(self):
        """Peaks, less what the program has without any text."""
        small, large = (100 * MB * self.scale, 1000 * MB * self.scale)
        peaks = []
        for size in (small, large):
            path = self.at("much.jsonl")
            with open(self.text, "rb") as file, open(path, "wb") as to:
                block, written = file.read(), 0
                while written < size:
                    written += to.write(block[: int(size - written) + 1].rpartition(b"\n")[0] + b"\n")
            peaks.append(self.prepare(path, "much", "--tokenizer", self.tokenizer)[1])
            os.remove(path)
        shown = f"{peaks[1] / MB:.0f} MB over {peaks[0] / MB:.0f} MB"
        self.add("peak memory of preparing 1 GB over 100 MB", [peaks[1] / peaks[0]], "1.1 at most", peaks=peaks)
        print(f"peak memory: {shown}")

    def start(self):
        """From the start of the program to the end of its first step."""
        paths = []
        for name, size in (("short", MB * self.scale), ("long", 1000 * MB * self.scale)):
            with open(self.at("zeros"), "wb") as file:
                file.truncate(int(size))
            self.prepare(self.at("zeros"), name)
            paths.append(self.at(name))
        sets = {"model.layers": 2, "model.d_model": 32, "model.heads": 2, "model.d_ff": 64, "data.sequence": 64, "batch": 4,
                "steps": 1, "eval": "none", "data.held_out": 0.01}
        sets.pop("eval")
        found = []
        for _ in range(self.args.rounds):
            of = []
            for path in paths:
                pairs = settings({**sets, "microbatches": 1, "data.path": path})
                of.append(timed([PROGRAM, "train", "configs/scaling.toml", "--grid", "1x1", "--out", self.at("run"), *pairs])[0])
            found.append(of[1] - of[0])
        self.add("first step with 1 G tokens, later than with 1 M, s", found, "0.3 at most", digits=3)
        # A difference about 0 has no spread to speak of.
        label, shown, target = self.lines[-1]
        self.lines[-1] = (label, shown.replace(" (too noisy to say)", ""), target)

    def reading(self):
        """Loading is among the copies of a benchmark; of a grid of one there are no others."""
        weights = {"weight": 1}
        sources = []
        for name in ("a", "b"):
            self.prepare(self.text, name, "--tokenizer", self.tokenizer)
            sources.append(f'{{path = "{self.at(name)}", weight = {weights["weight"]}}}')
        sets = {"data.source": "[" + ", ".join(sources) + "]", "data.held_out": 0.01, "data.sequence": 256, "batch": 8,
                "microbatches": 1, "model.d_model": 256, "model.layers": 8, "model.heads": 4, "model.d_ff": 1024}
        if self.args.short:
            sets.update({"model.layers": 2, "model.d_model": 64, "model.d_ff": 128})
        result = bench("configs/scaling.toml", "1x1", self.at("reading"), sets, ["--steps", 10])
        copies = dict(result["devices"][0]["shares"])["copies"]
        self.add("reading batches of a mixture, % of a step, d 256, 8 x 256", [100 * copies], "0.5 at most", digits=3)


def main():
    args = arguments()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        made = Bench(args, folder)
        for name in args.only or ["tokenising", "memory", "start", "reading"]:
            getattr(made, name)()
    print(f"\n{machine()}, {datetime.date.today()}, medians of {args.rounds} rounds\n")
    print(table(["", "measured", "wanted"], made.lines))
    write(args.json, {"machine": machine(), "date": str(datetime.date.today()), "found": made.found})


main()
