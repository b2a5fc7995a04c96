"""The checks of scripts/gpu-check.sh. Every check is a function that raises on failure, or `Skipped` with a reason."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "benches"))
PROGRAM = os.environ["OUROBOROS"]
TIME_LIMIT = 300

# Of f32 losses of the processor and a GPU, relative, after as many steps as SMALL has: sums in another order.
LOSS_TOLERANCE = 1e-3
# Of bf16 and f32 at the end of the run.
BF16_TOLERANCE = 0.05
# Peak memory over the prediction; tokens/s over PyTorch eager; share of the GPU's own matrix rate; host time of a step.
MEMORY, OVER_EAGER, UTILISATION, HOST = 1.10, 1.10, 0.60, 0.05

SMALL = {"model.layers": 4, "model.d_model": 128, "model.heads": 4, "model.d_ff": 512, "data.sequence": 64, "batch": 8,
         "microbatches": 2, "steps": 30}
# Parameters in M: layers, width, rows of a batch. Bytes are the vocabulary, so all weights are in the blocks.
MODELS = {127: (18, 768, 32), 352: (28, 1024, 16), 1309: (26, 2048, 8)}
SEQUENCE = 1024


class Skipped(Exception):
    pass


def run(command, code=0, env=None):
    """Runs a command to its end, which must have this code; its output."""
    command = [str(word) for word in command]
    env = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as late:
        tail = "\n".join(str(late.stdout or "").splitlines()[-10:])
        raise AssertionError(f"more than {TIME_LIMIT} s: {' '.join(command)}\n{tail}")
    text = done.stdout + done.stderr
    tail = "\n".join(text.splitlines()[-15:])
    assert done.returncode == code, f"exit code {done.returncode}, not {code}: {' '.join(command)}\n{tail}"
    return text


def settings(pairs):
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


def ranks(count, args, code=0):
    """The program under mpirun, all ranks on one GPU."""
    apart = 'NCCL_HOSTID=$OMPI_COMM_WORLD_RANK exec "$0" "$@"'
    env = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    return run(["mpirun", "-n", count, "--oversubscribe", "bash", "-c", apart, PROGRAM, *args], code, env)


def train(folder, grid, sets, more=(), count=1, config="configs/scaling.toml"):
    """Trains the small model; what `metrics.jsonl` has without times, and what was printed."""
    args = ["train", config, "--grid", grid, "--out", folder, *settings({**SMALL, **sets}), *more]
    text = run([PROGRAM, *args]) if count == 1 else ranks(count, args)
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line.pop("step_s", None), line.pop("tokens_per_s", None)
    return lines, text


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


CUDA = {"device": "cuda", "deterministic": "true", "allow_shared_gpu": "true"}


def processor_and_gpu_agree(work):
    one, _ = train(f"{work}/cpu", "1x1", {"device": "cpu"})
    other, _ = train(f"{work}/gpu", "1x1", CUDA)
    worst = max(abs(a - b) / a for a, b in zip(losses(one), losses(other)))
    assert worst < LOSS_TOLERANCE, f"losses differ by {worst:.2e}"
    return f"losses differ by {worst:.1e} at most, {LOSS_TOLERANCE:.0e} allowed"


def grid_equals_oracle(grid, count, more=(), sets=None):
    def check(work):
        sets_ = {**CUDA, "eval.every": 10, "eval.tokens": 2000, **(sets or {})}
        oracle, _ = train(f"{work}/oracle", grid, sets_, ["--emulate"])
        found, _ = train(f"{work}/grid", grid, sets_, more, count)
        first = next((n for n, (a, b) in enumerate(zip(oracle, found)) if a != b), None)
        assert first is None and len(oracle) == len(found), f"line {first}: {oracle[first]} and {found[first]}"
        return f"{len(found)} lines of metrics equal the oracle's bit for bit"
    return check


def resumed(work):
    sets = {**CUDA, "checkpoint.every": 10}
    whole, _ = train(f"{work}/whole", "2x1", sets, count=2)
    train(f"{work}/part", "2x1", {**sets, "steps": 20}, count=2)
    rest, _ = train(f"{work}/part", "2x1", sets, ["--resume"], count=2)
    assert losses(rest)[20:] == losses(whole)[20:], "the resumed run is another"
    return "10 steps after a resume equal those of the run that was not stopped"


def precisions(work):
    wide = losses(train(f"{work}/f32", "1x1", CUDA)[0])
    text = []
    for precision in ("tf32", "bf16"):
        narrow = losses(train(f"{work}/{precision}", "1x1", {**CUDA, "precision": precision})[0])
        assert abs(narrow[-1] - wide[-1]) / wide[-1] < BF16_TOLERANCE, f"{precision} ends at {narrow[-1]}, f32 at {wide[-1]}"
        text.append(f"{precision} ends at {narrow[-1]:.4f}")
    return f"f32 ends at {wide[-1]:.4f}, " + ", ".join(text)


def sharing_is_refused(work):
    args = ["train", "configs/scaling.toml", "--grid", "2x1", "--out", work, *settings({**SMALL, "device": "cuda"})]
    text = ranks(2, args, code=2)
    assert "allow_shared_gpu" in text or "ranks on this host" in text, text[-500:]
    return "two ranks on one GPU: one error, exit code 2"


def overlap(work):
    os.environ["OUROBOROS_LOG"] = "debug"
    try:
        big = {**CUDA, "model.layers": 8, "model.d_model": 1024, "model.d_ff": 4096, "bucket_kib": 4096, "deterministic": "false"}
        train(f"{work}/run", "1x2", big, count=2)
    finally:
        del os.environ["OUROBOROS_LOG"]
    with open(f"{work}/run/log/rank-0.log") as file:
        found = re.findall(r"sums=(\d+) took_ms=([0-9.]+) waited_ms=([0-9.]+)", file.read())
    assert found, "the log has no times of sums"
    sums, took, waited = int(found[-1][0]), float(found[-1][1]), float(found[-1][2])
    assert waited < took, f"{sums} sums took {took} ms, and compute waited {waited} ms for them"
    return f"{sums} sums took {took:.1f} ms, of which compute waited {waited:.1f} ms"


def memory(work):
    sets = {**CUDA, "precision": "bf16", "model.layers": 12, "model.d_model": 768, "model.heads": 12, "model.d_ff": 3072,
            "data.sequence": SEQUENCE, "batch": 16, "microbatches": 2, "steps": 10}
    _, text = train(f"{work}/run", "1x1", sets)
    row = [line.split() for line in text.splitlines() if line.startswith("stage 0, replica 0")][-1]
    predicted, measured = float(row[-2]), float(row[-1])
    assert measured <= MEMORY * predicted, f"{measured} MiB, {predicted} predicted"
    return f"{measured:.0f} MiB of the GPU, {predicted:.0f} predicted"


def out_of_memory(work):
    sets = {**SMALL, "device": "cuda", "model.layers": 400, "model.d_model": 8192, "model.heads": 64, "model.d_ff": 32768}
    text = run([PROGRAM, "train", "configs/scaling.toml", "--out", work, *settings(sets)], code=2)
    assert "MiB predicted for" in text, text[-500:]
    return "a model that is too large: one error with the need, exit code 2"


def matrix_rate(torch):
    """What the GPU does in a large bf16 product, FLOP/s."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * n**3 / (time.monotonic() - begun)


def pytorch(torch, million, compiled):
    """Tokens/s of the same model in PyTorch, bf16 by autocast over f32 weights, fused AdamW."""
    from peers import model as peer

    layers, width, rows = MODELS[million]
    shape = {"layers": layers, "d_model": width, "heads": width // 64, "d_ff": 4 * width}
    torch.manual_seed(1)
    module = peer.Part(shape, SEQUENCE, 0, layers)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    module.cuda()
    optimizer = peer.optimizer(module, {"weight_decay": 0.1, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8})
    forward = torch.compile(module) if compiled else module
    tokens = torch.randint(0, 256, (rows, SEQUENCE), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = peer.loss(forward(tokens), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    seconds = (time.monotonic() - begun) / 20
    del module, optimizer, forward
    torch.cuda.empty_cache()
    return rows * SEQUENCE / seconds


def busy(process):
    """Shares of time, each over a fraction of a second, in which the GPU had work while a process ran."""
    shares = []
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
    while process.poll() is None:
        try:
            shares.append(int(subprocess.run(query, text=True, capture_output=True).stdout.strip() or 0) / 100)
        except (OSError, ValueError):
            return []
        time.sleep(0.2)
    return shares


def ours(work, million):
    """Tokens/s, and the share of a step in which the GPU has no work; none if nobody can tell."""
    layers, width, rows = MODELS[million]
    sets = {"device": "cuda", "precision": "bf16", "model.layers": layers, "model.d_model": width, "model.heads": width // 64,
            "model.d_ff": 4 * width, "model.tie": "none", "data.sequence": SEQUENCE, "batch": rows, "microbatches": 1, "steps": 60}
    command = [PROGRAM, "bench", "configs/scaling.toml", "--grid", "1x1", "--out", work, *settings(sets)]
    with open(os.path.join(os.path.dirname(work), "bench.txt"), "w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        shares = busy(process)
        output.seek(0)
        assert process.wait(TIME_LIMIT) == 0, "\n".join(output.read().splitlines()[-10:])
    # Start and end are no steps.
    steady = sorted(share for share in shares if share > 0)
    idle = 1 - steady[len(steady) // 2] if steady else None
    with open(os.path.join(work, "metrics.jsonl")) as file:
        seconds = sorted(line["step_s"] for line in list(map(json.loads, file))[5:])
    return rows * SEQUENCE / seconds[len(seconds) // 2], idle


def speed(million):
    def check(work):
        try:
            import torch
        except ImportError:
            raise Skipped("PyTorch is not here")
        if not torch.cuda.is_available():
            raise Skipped("this PyTorch sees no GPU")
        layers, width, _ = MODELS[million]
        rate = matrix_rate(torch)
        found, idle = ours(f"{work}/ours", million)
        eager, compiled = pytorch(torch, million, False), pytorch(torch, million, True)
        # Forward and backward: 6 a weight and token, and the attention's two products, of which half is masked.
        flops = 6 * million * 1e6 + 6 * layers * width * SEQUENCE
        share = found * flops / rate
        text = (f"{found:,.0f} tokens/s, PyTorch {eager:,.0f} eager and {compiled:,.0f} compiled: {found / eager:.2f} and "
                f"{found / compiled:.2f}; {share:.2f} of {rate / 1e12:.0f} TFLOP/s; "
                + ("nvidia-smi does not tell how busy it is" if idle is None else f"{idle:.0%} of the time without work"))
        if million > 1000:
            assert found >= OVER_EAGER * eager and share >= UTILISATION and (idle is None or idle <= HOST), text
        return text
    return check


ANYWHERE = (processor_and_gpu_agree, resumed)


def checks(quick):
    yield "CPU and CUDA agree (f32)", processor_and_gpu_agree
    yield "1x1 equals the oracle", grid_equals_oracle("1x1", 1)
    yield "2x1 equals the oracle (NCCL)", grid_equals_oracle("2x1", 2)
    yield "1x2 equals the oracle (NCCL)", grid_equals_oracle("1x2", 2)
    yield "2x2 equals the oracle (NCCL)", grid_equals_oracle("2x2", 4)
    yield "3x1 as a ring equals the oracle (NCCL)", grid_equals_oracle("3x1", 2, sets={"grid.placement": "ring"})
    yield "2x2 equals the oracle, wire = bf16 (NCCL)", grid_equals_oracle("2x2", 4, sets={"wire": "bf16"})
    yield "2x2 equals the oracle, bf16 (NCCL)", grid_equals_oracle("2x2", 4, sets={"precision": "bf16"})
    yield "2x2 equals the oracle, three microbatches (NCCL)", grid_equals_oracle("2x2", 4, sets={"microbatches": 3, "batch": 12})
    yield "3x1 equals the oracle, gpipe (NCCL)", grid_equals_oracle("3x1", 3, sets={"schedule": "gpipe"})
    yield "3x1 equals the oracle, sequential (NCCL)", grid_equals_oracle("3x1", 3, sets={"schedule": "sequential", "microbatches": 1})
    yield "3x1 equals the oracle, 1f1b, recompute by blocks (NCCL)", grid_equals_oracle("3x1", 3, sets={"schedule": "1f1b", "recompute": "blocks"})
    yield "2x1 equals the oracle, sequential, wire = bf16 (NCCL)", grid_equals_oracle("2x1", 2, sets={"schedule": "sequential", "wire": "bf16"})
    yield "4x1 equals the oracle, synchronous start (NCCL)", grid_equals_oracle("4x1", 4, sets={"sync_steps": 3})
    yield "2x1 equals the oracle, dropout (NCCL)", grid_equals_oracle("2x1", 2, sets={"model.dropout": 0.1})
    yield "2x1 equals the oracle, Transformer-XL (NCCL)", grid_equals_oracle("2x1", 2, sets={"model.arch": "transformer-xl", "model.mem_len": 32})
    yield "2x1 equals the oracle, Muon (NCCL)", grid_equals_oracle("2x1", 2, sets={"optimizer.kind": "muon"})
    yield "3x1 equals the oracle, SOAP (NCCL)", grid_equals_oracle("3x1", 3, sets={"optimizer.kind": "soap", "optimizer.soap_every": 3})
    yield "3x2 equals the oracle, a fresh tied head (NCCL)", grid_equals_oracle("3x2", 6, sets={"model.tie": "head"})
    yield "4x1 as a ring equals the oracle, a fresh tied head, bf16 (NCCL)", grid_equals_oracle(
        "4x1", 3, sets={"model.tie": "head", "grid.placement": "ring", "precision": "bf16"})
    yield "2x2 with a self-test of all links (NCCL)", grid_equals_oracle("2x2", 4, ["--self-test"])
    yield "2x2 equals the oracle (over MPI)", grid_equals_oracle("2x2", 4, ["--transport", "mpi"])
    yield "2x2 equals the oracle (threads)", grid_equals_oracle("2x2", 1)
    yield "a resumed run is the same", resumed
    yield "tf32 and bf16 beside f32", precisions
    yield "sharing a GPU is refused", sharing_is_refused
    yield "sums overlap with compute", overlap
    yield "memory against its prediction", memory
    yield "a model that is too large", out_of_memory
    for million in () if quick else MODELS:
        yield f"speed at {million} M parameters, bf16", speed(million)


def why_not():
    """Why nothing can be checked here, if so."""
    text = run([PROGRAM, "doctor"])
    print(text)
    lines = [line for line in text.splitlines() if line.startswith("GPU")]
    return next((line[4:].strip() for line in lines if line.startswith("GPU  ") or "; 0 devices" in line), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the measurements of speed")
    parser.add_argument("--processor", action="store_true", help="the checks that need no GPU, on the processor: whether they work")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    args = parser.parse_args()
    reason, rows = why_not(), []
    if args.processor:
        reason, CUDA["device"] = None, "cpu"
    for name, check in checks(args.quick):
        if args.only not in name or (args.processor and check not in ANYWHERE and "oracle" not in name):
            continue
        name = name.replace("NCCL", "MPI") if args.processor else name
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            try:
                if reason:
                    raise Skipped(reason)
                state, text = "passed", check(work)
            except Skipped as skipped:
                state, text = "skipped", str(skipped)
            except Exception as error:  # Whatever it is, the other checks are worth having.
                state, text = "FAILED", f"{type(error).__name__}: {error}"
        rows.append((state, name, text, time.monotonic() - begun))
        print(f"{state:8} {name}: {text} ({rows[-1][3]:.0f} s)", flush=True)
    count = {state: sum(row[0] == state for row in rows) for state in ("passed", "FAILED", "skipped")}
    print(f"\ngpu-check: {count['passed']} passed, {count['FAILED']} failed, {count['skipped']} skipped")
    sys.exit(1 if count["FAILED"] else 0)


main()
