"""Kills runs under mpirun at random moments, each time resumes them, and compares the end with an undisturbed run.

A kill is SIGKILL to a random rank or to mpirun itself, at a random moment of the run, or at a chosen moment of a save:
before the first file, between files, before the manifest, just before or just after the last rename (seen in the run's folder). What
was saved before must still be there afterwards, and nothing may hang.
"""

import argparse
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "target", "release", "ouroboros")
# Nothing that is killed or finished may live longer than this.
LIMIT = 60.0
STEPS = 400
CONFIG = """
name = "torture"
steps = %d
batch = 8
microbatches = 2
stall_seconds = 30
[model]
layers = 4
d_model = 64
heads = 2
d_ff = 128
dropout = 0.1
[data]
synthetic = 20000
sequence = 32
[checkpoint]
every = 20
keep_last = 2
[grid]
stages = 2
replicas = 2
""" % STEPS
MOMENTS = ["any time", "before a save", "between files", "before the rename", "after the rename"]


def environment():
    if os.geteuid() == 0:
        return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return dict(os.environ)


def start(config, out, log):
    command = ["mpirun", "-n", "4", "--oversubscribe", PROGRAM, "train", config, "--out", out, "--resume"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def ranks(launcher):
    """The process ids of an mpirun's ranks."""
    try:
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def complete(out):
    """The steps of the complete states."""
    found = glob.glob(os.path.join(out, "checkpoints", "step-*", "manifest.json"))
    names = [os.path.basename(os.path.dirname(path)) for path in found]
    return {int(name[5:]) for name in names if name[5:].isdigit()}


def seen(moment, out, before):
    """Whether the moment of a save has come."""
    under_way = glob.glob(os.path.join(out, "checkpoints", "step-*.tmp"))
    files = [name for folder in under_way for name in os.listdir(folder)] if under_way else []
    if moment == "before a save":
        return bool(under_way) and not files
    if moment == "between files":
        return 0 < len([name for name in files if name.endswith(".safetensors")]) < 6
    if moment == "before the rename":
        return "manifest.json" in files
    return bool(complete(out) - before)


def kill(draw, launcher, out, log):
    """Waits for a moment and kills; what was killed, or none if the run was over before."""
    moment, before = draw.choice(MOMENTS), complete(out)
    began, delay = time.monotonic(), draw.uniform(0.3, 3.0)
    while launcher.poll() is None and time.monotonic() - began < LIMIT:
        try:
            if time.monotonic() - began > delay and (moment == "any time" or seen(moment, out, before)):
                break
        except OSError:
            pass  # A folder that was being renamed.
        if moment == "any time":
            time.sleep(0.005)
    pids = ranks(launcher)
    if launcher.poll() is not None or len(pids) < 4:
        return None
    victim = draw.choice([launcher.pid, *pids, *pids])
    what = "mpirun" if victim == launcher.pid else f"rank {pids.index(victim)}"
    saved = complete(out)
    os.kill(victim, signal.SIGKILL)
    ended = time.monotonic()
    while launcher.poll() is None or any(alive(pid) for pid in pids):
        if time.monotonic() - ended > LIMIT:
            for pid in [launcher.pid, *pids]:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            fail(f"HANG: {what} was killed at {moment}, and the others lived on for {LIMIT:.0f} s", log)
        time.sleep(0.01)
    # Two are kept; a state that was there may only have been replaced by newer ones.
    lost = [step for step in saved if step not in complete(out)]
    if saved and (not complete(out) or (lost and max(complete(out)) < max(saved))):
        fail(f"LOST: the states {lost} after {what} was killed at {moment}", log)
    return f"{what}, {moment}", time.monotonic() - ended


def fail(text, log):
    log.flush()
    with open(log.name) as file:
        print("".join(file.readlines()[-30:]))
    sys.exit(text)


def last(out):
    """The weights and the state of the optimizer at the end, and the losses."""
    folder = os.path.join(out, "checkpoints", f"step-{STEPS}")
    files = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                files[name] = file.read()
    with open(os.path.join(out, "metrics.jsonl")) as file:
        losses = [(line["step"], line["loss"]) for line in map(json.loads, file) if "loss" in line]
    return files, losses


def finish(config, out, log):
    run = start(config, out, log)
    try:
        code = run.wait(timeout=2 * LIMIT)
    except subprocess.TimeoutExpired:
        run.terminate()
        fail("HANG: a run that nobody has killed", log)
    if code != 0:
        fail(f"exit code {code} of a resumed run", log)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=10)
    args = parser.parse_args()
    draw = random.Random(int(os.environ.get("SEED", "1")))
    counts, runs, slowest, began = {}, 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w+") as log:
        config, whole, out = (os.path.join(folder, name) for name in ("torture.toml", "whole", "out"))
        with open(config, "w") as file:
            file.write(CONFIG)
        finish(config, whole, log)
        expected, kills = last(whole), 0
        while kills < args.kills:
            shutil.rmtree(out, ignore_errors=True)
            runs += 1
            # The run of a round is killed until it is through, or has been killed enough.
            for _ in range(8):
                launcher = start(config, out, log)
                killed = kill(draw, launcher, out, log)
                if killed is None:
                    launcher.wait(timeout=LIMIT)
                    break
                what, took = killed
                kills, slowest = kills + 1, max(slowest, took)
                counts[what] = counts.get(what, 0) + 1
                if kills >= args.kills:
                    break
            finish(config, out, log)
            if last(out) != expected:
                fail(f"DIFFERENT: run {runs} does not end as the one that was left alone", log)
            print(f"{kills} kills in {runs} runs, all ended as if nothing had happened", flush=True)
    for what, count in sorted(counts.items()):
        print(f"  {count:>4}  {what}")
    print(f"{kills} kills, {runs} runs, 0 lost states, 0 hangs, 0 differences; all ranks gone {slowest:.1f} s after a kill "
          f"at most; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
