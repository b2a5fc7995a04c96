"""How fast a GPU is, beside PyTorch and beside what it can do. Checks as in `checks.py`; the goals are for 1.3 B parameters."""

import json
import os
import re
import subprocess
import sys
import time
import warnings

from checks import CUDA, logged, train
from command import APART, CLOCK, PROGRAM, ROOT, Skipped, end, lines_of, run, settings, started, tail

sys.path.insert(0, os.path.join(ROOT, "benches", "peers"))

# Tokens/s over PyTorch eager; share of a step without work on the GPU; peak memory over the prediction.
OVER_EAGER, HOST, MEMORY = 1.15, 0.02, 1.05
# Share of the GPU's own matrix rate: the H100 has as much of it as the H200, and less bandwidth for all the rest.
UTILISATION = {"H200": 0.65, "H100": 0.60}

# Parameters in M: layers, width, rows of a batch. Bytes are the vocabulary, so all weights are in the blocks.
MODELS = {127: (18, 768, 32), 352: (28, 1024, 16), 1309: (26, 2048, 16)}
SEQUENCE = 1024
# Bytes of an AdamW update a value: reads weight, gradient and two moments, all f32, and whether it decays; writes weight, moments,
# the bf16 version and the cleared gradient.
UPDATE_BYTES = 4 * 4 + 1 + 3 * 4 + 2 + 4


def pytorch_here():
    """PyTorch, if it is here."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # Which nothing here needs.
    try:
        import torch
    except ImportError:
        raise Skipped("PyTorch is not here") from None
    return torch


def on_gpu():
    """The same, if it sees a GPU."""
    torch = pytorch_here()
    if not torch.cuda.is_available():
        raise Skipped("this PyTorch sees no GPU")
    return torch


def told(path, pattern):
    """The last line of a rank's log that has a pattern, as numbers."""
    with open(path) as file:
        found = re.findall(pattern, file.read())
    assert found, f"the log has no {pattern}"
    return [float(number) for number in found[-1]]


def overlap(work):
    with logged():
        big = {**CUDA, "model.layers": 8, "model.d_model": 1024, "model.d_ff": 4096, "bucket_kib": 4096, "deterministic": "false"}
        train(f"{work}/run", "1x2", big, count=2)
    sums, took, waited = told(f"{work}/run/log/rank-0.log", r"sums=(\d+) took_ms=([0-9.]+) waited_ms=([0-9.]+)")
    assert waited < took, f"{sums:.0f} sums took {took} ms, and compute waited {waited} ms for them"
    text = f"{sums:.0f} sums took {took:.1f} ms, of which compute waited {waited:.1f} ms"
    return text, {"sums": sums, "took_ms": took, "waited_ms": waited}


def update(work):
    """The update's kernel, which moves bytes and does little else, beside a copy of PyTorch's."""
    torch = on_gpu()
    with logged():
        bench(f"{work}/run", 352, 20)
    updates, values, took = told(f"{work}/run/log/rank-0.log", r"updates=(\d+) values=(\d+) took_ms=([0-9.]+)")
    rate = updates * values * UPDATE_BYTES / took / 1e6
    copied = copy_rate(torch)
    text = f"{updates:.0f} updates of {values:.0f} values: {rate:.0f} GB/s, a copy {copied:.0f} GB/s: {rate / copied:.2f} of it"
    return text, {"GB/s": rate, "copy GB/s": copied}


def timed(torch, count, work):
    """Seconds that a piece of work takes on the device, of so many in a row."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return (time.monotonic() - begun) / count


def copy_rate(torch):
    """What a copy inside the GPU moves, reads and writes, GB/s."""
    a, b = (torch.empty(1 << 28, device="cuda") for _ in range(2))
    return 2 * 4 * (1 << 28) / timed(torch, 10, lambda: b.copy_(a)) / 1e9


def matrix_rate(torch):
    """What the GPU does in a large bf16 product, FLOP/s."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed(torch, 20, lambda: a @ b)


def pytorch(torch, shape, rows, sequence, device, compiled=False, steps=20):
    """Tokens/s of the same model in PyTorch, bf16 by autocast over f32 weights, fused AdamW."""
    import model as peer

    torch.manual_seed(1)
    with torch.device(device):
        module = peer.Part(shape, sequence, 0, shape["layers"])
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        tokens = torch.randint(0, 256, (rows, sequence))
    optimizer = peer.optimizer(module, {"weight_decay": 0.1, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8})
    forward = torch.compile(module) if compiled else module

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = peer.loss(forward(tokens), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device == "cpu":
        step()
        return None
    seconds = timed(torch, steps, step)
    del module, optimizer, forward
    torch.cuda.empty_cache()
    return rows * sequence / seconds


def peer_works(work):
    """That PyTorch's side of the comparison can be made at all."""
    pytorch(pytorch_here(), {"layers": 2, "d_model": 32, "heads": 2, "d_ff": 64}, 2, 8, "cpu")
    return "PyTorch's model takes a step"


def shape_of(million):
    layers, width, rows = MODELS[million]
    return {"layers": layers, "d_model": width, "heads": width // 64, "d_ff": 4 * width}, rows


def bench(folder, million, steps, watch=None):
    """Measures our own step at a size."""
    shape, rows = shape_of(million)
    sets = {"device": "cuda", "precision": "bf16", **{f"model.{key}": value for key, value in shape.items()}, "model.tie": "none",
            "data.sequence": SEQUENCE, "batch": rows, "microbatches": 1, "steps": steps}
    command = [PROGRAM, "bench", "configs/scaling.toml", "--grid", "1x1", "--out", folder, *settings(sets)]
    if watch is None:
        return run(command)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(os.path.dirname(folder), "bench.txt"), "w+") as output:
        process = started(command, stdout=output, stderr=output)
        try:
            watch(process)
            code = process.wait(CLOCK.left())
        except subprocess.TimeoutExpired:
            code = "timed out"
        finally:
            if process.poll() is None:
                end(process)
        output.seek(0)
        assert code == 0, f"{code}: {tail(output.read())}"


def busy(shares):
    """Fills `shares` with what part of the time, each a fraction of a second, the GPU had work while a process ran."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]

    def watch(process):
        while process.poll() is None and CLOCK.left() > 1:
            try:
                shares.append(int(subprocess.run(query, text=True, capture_output=True).stdout.strip() or 0) / 100)
            except (OSError, ValueError):
                return
            time.sleep(0.2)
    return watch


def ours(work, million):
    """Tokens/s; the share of a step in which the GPU has no work, none if nobody can tell; peak memory over its prediction."""
    shares = []
    bench(f"{work}/ours", million, 40, busy(shares))
    # Start and end are no steps.
    steady = sorted(share for share in shares if share > 0)
    idle = 1 - steady[len(steady) // 2] if steady else None
    seconds = sorted(line["step_s"] for line in lines_of(f"{work}/ours")[5:])
    with open(f"{work}/ours/bench.json") as file:
        device = json.load(file)["devices"][0]
    _, rows = shape_of(million)
    return rows * SEQUENCE / seconds[len(seconds) // 2], idle, device["peak_bytes"] / device["predicted_bytes"]


def speed(million, compiled):
    def check(work):
        torch = on_gpu()
        shape, rows = shape_of(million)
        rate = matrix_rate(torch)
        torch.cuda.empty_cache()
        found, idle, over = ours(work, million)
        eager = pytorch(torch, shape, rows, SEQUENCE, "cuda")
        # Forward and backward: 6 a weight and token, and the attention's two products, of which half is masked.
        flops = 6 * million * 1e6 + 6 * shape["layers"] * shape["d_model"] * SEQUENCE
        share = found * flops / rate
        figures = {"tokens/s": found, "eager": eager, "over eager": found / eager, "matrix FLOP/s": rate, "share": share,
                   "idle": idle, "memory over prediction": over}
        text = (f"{found:,.0f} tokens/s, {found / eager:.2f} of PyTorch eager ({eager:,.0f}); {share:.2f} of the {rate / 1e12:.0f} "
                f"TFLOP/s of a large product; peak memory {over:.2f} of its prediction; "
                + ("nvidia-smi does not tell how busy it is" if idle is None else f"{idle:.0%} of the time without work"))
        if compiled:
            figures["compiled"] = pytorch(torch, shape, rows, SEQUENCE, "cuda", True)
            text += f"; {found / figures['compiled']:.2f} of PyTorch compiled ({figures['compiled']:,.0f})"
        if million > 1000:
            card = torch.cuda.get_device_name()
            goal = next((goal for name, goal in UTILISATION.items() if name in card), 0)
            missed = found < OVER_EAGER * eager or share < goal or (idle or 0) > HOST or over > MEMORY
            assert not missed, f"below its goals ({OVER_EAGER} of eager, {goal}, {HOST:.0%}, {MEMORY}): {text} {figures}"
        return text, figures
    return check


def receive(work):
    """What a receive that waits costs the products beside it, by how many blocks of threads it has."""
    on_gpu()
    figures = {}
    for blocks in (1, 4):
        env = {**APART, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + blocks), "NCCL_MAX_CTAS": str(blocks),
               "NCCL_MIN_CTAS": "1"}
        other = started([sys.executable, "scripts/gpu/receive.py", "1"], {**env, "NCCL_HOSTID": "1"})
        try:
            text = run([sys.executable, "scripts/gpu/receive.py", "0"], env={**env, "NCCL_HOSTID": "0"})
        finally:
            end(other)
        # PyTorch's warnings go the same way.
        found = next((line for line in text.splitlines() if line.startswith("{")), None)
        assert found, f"no figures: {tail(text)}"
        figures[blocks] = json.loads(found)
    one, four = figures[1], figures[4]
    return (f"products beside a receive of one block of threads take {one['beside']:.2f} times as long, {one['carved']:.2f} with its "
            f"multiprocessor left free; of four {four['beside']:.2f} and {four['carved']:.2f}"), figures


# The first of them is worth as much as the first checks.
FIRST = [1309]
REST = [("sums overlap with compute", overlap), ("the update's bandwidth", update), ("the price of a posted receive", receive)]
LAST = [352, 127]


def row(million, compiled):
    return f"speed at {million} M parameters, bf16", speed(million, compiled)
