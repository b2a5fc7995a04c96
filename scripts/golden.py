"""Golden numbers: short runs whose losses and final states must not change by accident. See golden.sh."""

import argparse
import functools
import glob
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = os.path.join(ROOT, "tests", "golden", "table.json")
BASE = os.path.join(ROOT, "tests", "golden", "base.toml")
PROGRAM = os.path.join("target", "release", "ouroboros")
LIMIT = 60
# Of a stored loss, relative.
TOLERANCE = 1e-6
# The same of a run with bases of eigenvectors, on another processor.
TOLERANCE_OF_BASES = 1e-4
STOPPED = 75
# Keys of the base that a row with `defaults` leaves out, and a program that does not know them, which is as if they were off.
CURES = ("predict", "lead")

XL = ["model.arch=transformer-xl", "model.mem_len=16"]
WORDS = ["data.tokenizer=words", "data.min_count=2"]
BF16 = "precision=bf16"
# What rounding leaves must stay small on every processor: so no side longer than the rank of a gradient, whose first basis would be any of
# many, and an eps that makes no whole steps of next to nothing.
SOAP = ["optimizer.kind=soap", "optimizer.soap_limit=32", "optimizer.eps=0.1"]


class Row:
    """One run: its grid, the runner of the stored table, and the keys that it changes.

    `defaults` leaves the cures for delay at what they are where nothing is said.
    `resume` stops the run between two sync points, at the earliest step that all places can, and resumes it on that grid.
    """

    def __init__(self, name, grid, runner, sets, resume=None, defaults=False):
        self.name, self.grid, self.runner, self.sets, self.resume = name, grid, runner, sets, resume
        self.defaults = defaults

    def ranks(self, grid):
        stages, replicas = (int(n) for n in grid.split("x"))
        return (stages - ("grid.placement=ring" in self.sets)) * replicas


ROWS = [
    Row("sequential", "2x1", "oracle", ["schedule=sequential", "microbatches=2"]),
    Row("1f1b", "3x1", "threads", ["schedule=1f1b", "microbatches=4"]),
    Row("gpipe, replicas, eval", "2x2", "mpirun", ["schedule=gpipe", "microbatches=2", "eval.every=3", "eval.tokens=300"]),
    Row("decoupled, m = 1", "4x1", "mpirun", []),
    Row("decoupled, m = 3, slack 2", "4x1", "threads", ["microbatches=3", "slack=2"]),
    Row("delays by hand", "3x1", "oracle", ["microbatches=2", "grid.delays=[3, 2, 1]"]),
    Row("aligned line, mean of the parts", "3x1", "mpirun", ["model.tie=aligned", "model.tie_gradient=mean"]),
    Row("aligned ring", "4x1", "mpirun", ["model.tie=aligned", "grid.placement=ring"]),
    Row("aligned, replicas", "2x2", "mpirun", ["model.tie=aligned", "bucket_kib=8"]),
    Row("fresh line", "4x1", "threads", ["model.tie=fresh"]),
    Row("fresh ring", "3x1", "oracle", ["model.tie=fresh", "grid.placement=ring"]),
    Row("head line", "4x1", "mpirun", ["model.tie=head", "optimizer.predict=update", "sync_at=[5]"]),
    Row("head ring, bf16", "4x2", "threads", ["model.tie=head", "grid.placement=ring", "optimizer.predict=update", BF16]),
    Row("sgd", "2x2", "threads", ["optimizer.kind=sgd", "optimizer.lr=0.1", "optimizer.clip=0.3"]),
    Row("muon", "4x2", "threads", ["optimizer.kind=muon", "optimizer.predict=update", "optimizer.lead=delay"]),
    Row("muon, memory", "3x1", "mpirun", XL + ["optimizer.kind=muon"]),
    Row("soap", "4x1", "mpirun", SOAP + ["optimizer.predict=update", "optimizer.lead=one"]),
    Row("soap, smaller sides, memory", "2x2", "threads", XL + SOAP + ["optimizer.soap_sides=smaller"]),
    Row("constant, no decay", "2x1", "oracle", ["optimizer.schedule=constant", "optimizer.weight_decay=0.0"]),
    Row("inverse square root", "1x1", "threads", ["optimizer.schedule=inverse-sqrt", "optimizer.betas=[0.8, 0.99]"]),
    Row("wire bf16", "2x2", "mpirun", ["wire=bf16", "microbatches=2", "optimizer.schedule=linear"]),
    Row("bf16", "3x1", "threads", [BF16, "model.tie=aligned"]),
    Row("recompute, dropout", "2x1", "threads", ["recompute=true", "model.dropout=0.2", "microbatches=2"]),
    Row("recompute by blocks, memory", "2x1", "threads", XL + ["recompute=blocks", "model.dropout=0.1"]),
    Row("memory, eval, saves", "2x2", "mpirun", XL + ["eval.every=4", "eval.batch=4", "checkpoint.every=3", "model.tie=aligned"]),
    Row("memory, pre-LN", "3x1", "oracle", XL + ["model.norm=pre", "model.clamp_len=9", "model.same_length=true",
                                                 "model.attention_dropout=0.1", "model.mem_len=24"]),
    Row("memory, bf16", "2x1", "mpirun", XL + [BF16, "recompute=true"]),
    Row("words in clusters", "2x1", "threads", WORDS + ["model.cutoffs=[20, 60]", "model.div_val=2", "model.tie=aligned"]),
    Row("characters, warm-up, sync points", "3x2", "oracle",
        ["data.tokenizer=characters", "sync_steps=2", "sync_at=[5]", "eval.every=4", "microbatches=2"]),
    Row("predict, lead of one", "4x1", "mpirun", ["optimizer.predict=update", "optimizer.lead=one", "model.tie=aligned"]),
    Row("predict half, lead of the delay, bf16", "3x2", "threads",
        ["optimizer.predict=update", "optimizer.predict_scale=0.5", "optimizer.lead=delay", BF16]),
    Row("1f1b, by default", "3x1", "threads", ["schedule=1f1b", "microbatches=4"], defaults=True),
    Row("one stage, by default", "1x2", "mpirun", ["model.tie=aligned"], defaults=True),
    Row("resumed, by default", "4x1", "threads", ["steps=12", "model.tie=aligned"], "4x1", defaults=True),
    Row("resumed, predict", "4x1", "oracle", ["steps=12", "optimizer.predict=update", "optimizer.schedule=linear"], "4x1"),
    Row("resumed", "3x1", "mpirun", ["steps=12"], "3x1"),
    Row("resumed, fresh, other grid", "3x1", "threads", ["steps=12", "model.tie=fresh"], "2x2"),
    Row("resumed, aligned", "4x1", "threads", ["steps=12", "model.tie=aligned"], "4x1"),
    Row("resumed, head", "4x1", "mpirun", ["steps=12", "model.tie=head"], "4x1"),
    Row("resumed, ring, bf16", "3x1", "mpirun", ["steps=12", "model.tie=aligned", "grid.placement=ring", BF16], "3x1"),
    Row("resumed, soap", "3x1", "threads", SOAP + ["steps=12", "optimizer.soap_every=3"], "3x1"),
    Row("resumed, memory, sgd", "2x1", "oracle", XL + ["steps=12", "optimizer.kind=sgd", "optimizer.lr=0.1"], "2x1"),
]


def fail(text):
    sys.exit(f"golden: {text}")


def train(program, row, grid, runner, out, resume=False, expected=0):
    """Runs a row into `out`; ends this script with the last lines if the run does not end as expected."""
    base = BASE if not row.defaults and knows_cures(program) else without_cures(out)
    command = [program, "train", base, "--grid", grid, "--out", out]
    command += [word for key in row.sets for word in ("--set", key)]
    command += ["--resume"] if resume else []
    if runner == "oracle":
        command.append("--emulate")  # The name that older commits know too.
    if runner == "mpirun":
        command = ["mpirun", "-n", str(row.ranks(grid)), "--oversubscribe"] + command
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as late:
        tail = (late.stdout or b"").decode(errors="replace").splitlines()[-20:]
        fail("\n".join([f"{row.name} ({runner}): no end after {LIMIT} s; its last lines:"] + tail))
    if done.returncode != expected:
        tail = done.stdout.splitlines()[-20:]
        fail("\n".join([f"{row.name} ({runner}): exit code {done.returncode}, expected {expected}:"] + tail))


def numbers(out):
    """Everything in metrics.jsonl but times."""
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [{k: v for k, v in line.items() if k not in ("step_s", "tokens_per_s", "time")} for line in lines]


def tensors(path):
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, values."""
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    for name, info in json.loads(data[8:8 + length]).items():
        begin, end = info["data_offsets"]
        yield name, data[8 + length + begin:8 + length + end]


def digest(out):
    """Of the newest state: every tensor by its kind (weights, first, ...) and name, whatever file it stands in."""
    steps = glob.glob(os.path.join(out, "checkpoints", "step-*"))
    newest = max(steps, key=lambda path: int(path.rsplit("-", 1)[1]))
    found = []
    for path in glob.glob(os.path.join(newest, "*.safetensors")):
        words = os.path.basename(path).split(".")[1:-1]
        kind = words[-1] if words else "weights"
        found += [(kind, name, hashlib.sha256(values).hexdigest()) for name, values in tensors(path)]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:32]


def result(out):
    return {"numbers": numbers(out), "digest": digest(out)}


def run(programs, row, runner):
    """What a row gives. Of two programs the first stops a row that is resumed, and the second resumes it."""
    first, second = programs
    with tempfile.TemporaryDirectory(prefix="ouroboros-golden-") as folder:
        out = os.path.join(folder, "run")
        if row.resume is None:
            train(second, row, row.grid, runner, out)
            return result(out)
        # A file STOP that is there from the beginning stops a run where it can first be stopped, always the same step.
        os.makedirs(out)
        open(os.path.join(out, "STOP"), "w").close()
        train(first, row, row.grid, runner, out, expected=STOPPED)
        train(second, row, row.resume, runner, out, resume=True)
        return result(out)


def processor():
    """The kind of processor and the libtorch that digests belong to."""
    with open("/proc/cpuinfo") as file:
        lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(info.get("flags", "").split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    kind = [info.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    version = subprocess.run([os.path.join(ROOT, PROGRAM), "doctor"], cwd=ROOT, text=True, capture_output=True).stdout
    torch = next((line.split()[1] for line in version.splitlines() if line.startswith("libtorch")), "?")
    return " ".join(kind + wide) + f", libtorch {torch}"


def losses(numbers):
    return [line[key] for line in numbers for key in ("loss", "eval_loss") if key in line]


def write(rows):
    program = os.path.join(ROOT, PROGRAM)
    lines = []
    for row in rows:
        found = run((program, program), row, row.runner)
        lines.append(json.dumps({"name": row.name, "losses": losses(found["numbers"]), "digest": found["digest"]}))
        print(f"{row.name}: {found['digest']}", flush=True)
    with open(TABLE, "w") as file:
        rows = ",\n".join(lines)
        file.write(f'{{"processor": {json.dumps(processor())}, "rows": [\n{rows}\n]}}\n')


def check(rows):
    """Against the stored table. True if all rows agree."""
    program = os.path.join(ROOT, PROGRAM)
    with open(TABLE) as file:
        stored = json.load(file)
    table = {line["name"]: line for line in stored["rows"]}
    here = processor()
    same = here == stored["processor"]
    if not same:
        print(f"golden: digests belong to {stored['processor']}; this is {here}: losses are compared, digests are not, "
              "nor anything that is bf16")
    good = True
    for row in rows:
        if row.name not in table:
            fail(f"{row.name} is not in the table; make it with scripts/golden.sh --write")
        narrow = BF16 in row.sets or "wire=bf16" in row.sets
        if narrow and not same:
            continue
        found, wanted = run((program, program), row, row.runner), table[row.name]
        pairs = list(zip(losses(found["numbers"]), wanted["losses"]))
        far = max(abs(a - b) / abs(b) for a, b in pairs)
        tolerance = TOLERANCE_OF_BASES if "optimizer.kind=soap" in row.sets and not same else TOLERANCE
        if len(pairs) != len(wanted["losses"]) or not far <= tolerance:
            good = False
            print(f"golden: {row.name}: losses differ by up to {far:.1e} of theirs:\n  found  {losses(found['numbers'])}"
                  f"\n  stored {wanted['losses']}")
        elif same and found["digest"] != wanted["digest"]:
            good = False
            print(f"golden: {row.name}: the losses agree, the final state does not: {found['digest']}, stored "
                  f"{wanted['digest']}")
        else:
            print(f"{row.name}: equal to {far:.1e}", flush=True)
    return good


def built(commit):
    """The program of a commit, in a work tree of its own under target/golden/."""
    name = subprocess.run(["git", "rev-parse", "--short", f"{commit}^{{commit}}"], cwd=ROOT, text=True, capture_output=True)
    if name.returncode != 0:
        fail(f"{commit} is no commit of this repository")
    tree = os.path.join(ROOT, "target", "golden", name.stdout.strip())
    program = os.path.join(tree, PROGRAM)
    if not os.path.exists(program):
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(["git", "worktree", "add", "--force", "--detach", tree, commit], cwd=ROOT, check=True,
                       capture_output=True)
        os.symlink(os.path.realpath(os.path.join(ROOT, ".libtorch")), os.path.join(tree, ".libtorch"))
        print(f"golden: building {name.stdout.strip()}", flush=True)
        environment = {**os.environ, "CARGO_TARGET_DIR": os.path.join(tree, "target")}
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=tree, env=environment, check=True)
    return program


def refused(program, base, sets):
    """What a program says of a run of no steps."""
    sets = [word for key in sets + ["steps=0"] for word in ("--set", key)]
    done = subprocess.run([program, "train", base, *sets], cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    return done.stderr


@functools.cache
def knows_cures(program):
    return "unknown key" not in refused(program, BASE, [])


def without_cures(out):
    """The base without the keys of the cures, beside a run's folder."""
    with open(BASE) as whole, open(out + ".toml", "w") as file:
        file.writelines(line for line in whole if not line.startswith(CURES))
    return out + ".toml"


def knows(program, row):
    """Whether a program knows the keys of a row and their words: a run of no steps is refused for that alone."""
    with tempfile.TemporaryDirectory(prefix="ouroboros-golden-") as folder:
        said = refused(program, without_cures(os.path.join(folder, "base")), row.sets)
    return "unknown key" not in said and "unknown variant" not in said


def compare(rows, commit):
    """Two programs on every runner. True if they give the same bits."""
    old, new = built(commit), os.path.join(ROOT, PROGRAM)
    good = True
    unknown = [row for row in rows if not knows(old, row)]
    for row in unknown:
        rows.remove(row)
        print(f"{row.name}: not compared, {commit} does not know its keys or words")
    for row in rows:
        pairs = {"old": (old, old), "new": (new, new)}
        if row.resume:
            pairs["old, resumed by new"] = (old, new)
            if row.defaults:
                del pairs["new"]  # A new run may begin with other defaults; one that goes on may not.
        for runner in ("oracle", "threads", "mpirun"):
            found = {name: run(programs, row, runner) for name, programs in pairs.items()}
            different = [name for name in found if found[name] != found["old"]]
            good &= not different
            print(f"{row.name} ({runner}): {'DIFFERENT: ' + ' and '.join(different) if different else 'equal'}", flush=True)
            for name in different:
                lines = zip(found["old"]["numbers"], found[name]["numbers"])
                first = next(((a, b) for a, b in lines if a != b), ("the final state", found[name]["digest"]))
                print(f"  first difference: {first[0]}\n  {name}: {first[1]}")
    return good


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compare", metavar="COMMIT")
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    if os.geteuid() == 0:
        # Open MPI refuses to start as root unless told twice.
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    rows = [row for row in ROWS if any(word in row.name for word in args.only)]
    if not rows:
        fail(f"no row's name contains {' or '.join(args.only)}")
    if args.write:
        write(rows)
        return
    good = compare(rows, args.compare) if args.compare else check(rows)
    print(f"golden: {len(rows)} rows, {'all equal' if good else 'NOT all equal'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
