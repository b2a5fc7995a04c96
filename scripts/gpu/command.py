"""Runs the program and others, each within the time that its check has left."""

import json
import os
import signal
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.environ["OUROBOROS"]
# Between asking processes to end and killing them: mpirun ends its ranks first.
PATIENCE = 10


class Skipped(Exception):
    """A check that cannot be made here, with the reason."""


class Clock:
    """When the check under way must be over, and what must then be ended."""

    def __init__(self):
        self.start(60)

    def start(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return max(1.0, self.end - time.monotonic())


CLOCK = Clock()


RUNNING = []


def end_all():
    """Ends whatever has been started: the checks are being ended."""
    for process in RUNNING:
        if process.poll() is None:
            end(process)


def end(process):
    """Ends a process with what it has started: ranks that are left would hold the GPU."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            # mpirun gives its ranks groups of their own, and ends them when it is told to end.
            process.send_signal(sign) if sign == signal.SIGTERM else os.killpg(process.pid, sign)
        except ProcessLookupError:
            pass
        try:
            process.wait(PATIENCE)
            return
        except subprocess.TimeoutExpired:
            pass


def started(command, env=None, **how):
    command = [str(word) for word in command]
    env = {**os.environ, **(env or {})}
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **how)
    RUNNING[:] = [other for other in RUNNING if other.poll() is None] + [process]
    return process


def run(command, code=0, env=None):
    """Runs a command to its end, which must have this code; its output."""
    process = started(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    line, limit = " ".join(map(str, command)), CLOCK.left()
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(process)
        text, _ = process.communicate()
        raise AssertionError(f"timed out after {limit:.0f} s: {line}\n{tail(text)}") from None
    except BaseException:
        end(process)
        raise
    assert process.returncode == code, f"exit code {process.returncode}, not {code}: {line}\n{tail(text)}"
    return text


def tail(text):
    return "\n".join(text.splitlines()[-15:])


def settings(pairs):
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


# Ranks that share a GPU must look like ranks of different hosts; they talk over the loopback.
APART = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_RAS_ENABLE": "0"}


def ranks(count, args, code=0):
    """The program under mpirun, all ranks on one GPU, and none bound to a core: worker, autograd and NCCL's threads need several."""
    apart = 'NCCL_HOSTID=$OMPI_COMM_WORLD_RANK exec "$0" "$@"'
    start = ["mpirun", "-n", count, "--oversubscribe", "--bind-to", "none", "bash", "-c", apart]
    return run([*start, PROGRAM, *args], code, APART)


def lines_of(folder):
    """What `metrics.jsonl` has."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def peak_memory(text):
    """Predicted and measured MiB of the first stage, out of what a run prints."""
    row = [line.split() for line in text.splitlines() if line.startswith("stage 0, replica 0")][-1]
    return float(row[-2]), float(row[-1])
