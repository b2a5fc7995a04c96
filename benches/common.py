"""What the benchmarks share: runs of our program, medians with their spread, the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "target", "release", "ouroboros")
# A spread over this share of the median is a machine that cannot be trusted.
NOISY = 0.15
TIME_LIMIT = 240
# Steps that are not measured.
WARM = 3


def mpi_environment():
    """Open MPI refuses to start as root unless told twice."""
    if os.geteuid() == 0:
        return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return dict(os.environ)


def run(command):
    """Runs a command to its end; its output, or the last lines of it and the end of the benchmark."""
    command = [str(word) for word in command]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=mpi_environment(), text=True, capture_output=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired as late:
        tail = "\n".join(str(late.stdout or "").splitlines()[-20:])
        sys.exit(f"ran for more than {TIME_LIMIT} s: {' '.join(command)}\n{tail}")
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        sys.exit(f"exit code {done.returncode}: {' '.join(command)}\n{tail}")
    return done.stdout


def settings(pairs):
    """`--set` options."""
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


def bench(config, grid, out, sets=(), more=(), launcher=("mpirun",)):
    """`ouroboros bench` under mpirun: what it wrote, with the losses of its steps."""
    stages, replicas = map(int, grid.split("x"))
    ranks = stages * replicas
    oversubscribe = [] if ranks <= (os.cpu_count() or 1) else ["--oversubscribe"]
    command = [*launcher, "-n", ranks, *oversubscribe, PROGRAM, "bench", config, "--grid", grid, "--out", out]
    run([*command, *settings(dict(sets)), *more])
    with open(os.path.join(out, "bench.json")) as file:
        result = json.load(file)
    with open(os.path.join(out, "metrics.jsonl")) as file:
        steps = [line for line in map(json.loads, file) if "loss" in line]
    result["losses"] = [line["loss"] for line in steps]
    result["seconds"] = [line["step_s"] for line in steps]
    return result


def rate(tokens, seconds):
    """Tokens/s of the median step; the first ones allocate, tune and fill the pipeline. A busy neighbour slows some steps of
    a run down, but hardly ever half of them."""
    return tokens / statistics.median(seconds[WARM:])


def spread(values):
    """How far the values are apart, as a share of the median: all of up to four, of more the middle half, because a single
    disturbed one moves no median."""
    low, high = min(values), max(values)
    if len(values) > 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def machine():
    """The processor and its number of cores."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def table(head, rows):
    """Rows as a table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(path, result):
    """A result as JSON."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
