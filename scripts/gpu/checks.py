"""Whether a GPU gives the right numbers and errors. Every check is a function of a folder that raises on failure, or `Skipped`
with a reason; it returns what it found, in words, or words and figures.
"""

import contextlib
import functools
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from command import PROGRAM, ROOT, end_all, lines_of, peak_memory, ranks, run, settings

sys.path.insert(0, os.path.join(ROOT, "tests", "report"))

# Of f32 losses of the processor and a GPU, relative, after as many steps as SMALL has: sums in another order.
LOSS_TOLERANCE = 1e-3
# Of bf16 and f32 at the end of the run.
BF16_TOLERANCE = 0.05
# Peak memory over the prediction.
MEMORY = 1.10

SMALL = {"model.layers": 4, "model.d_model": 128, "model.heads": 4, "model.d_ff": 512, "data.sequence": 64, "batch": 8,
         "microbatches": 2, "steps": 30}
# A run that hangs is to name the place before its check is over.
CUDA = {"device": "cuda", "deterministic": "true", "allow_shared_gpu": "true", "stall_seconds": 45}


def train(folder, grid, sets, more=(), count=1, config="configs/scaling.toml"):
    """Trains the small model; what `metrics.jsonl` has without times, and what was printed."""
    args = ["train", config, "--grid", grid, "--out", folder, *settings({**SMALL, **sets}), *more]
    text = run([PROGRAM, *args]) if count == 1 else ranks(count, args)
    lines = lines_of(folder)
    for line in lines:
        line.pop("step_s", None), line.pop("tokens_per_s", None), line.pop("time", None)
        for of in line.get("staleness", []):
            # By the clock; and what only the oracle knows.
            of.pop("seconds", None), of.pop("fresh_cosine", None)
    return lines, text


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def together(*parts):
    """Runs functions at once, each in a thread: most of a check is starting programs."""
    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(part) for part in parts]
        try:
            return [future.result() for future in futures]
        except BaseException:
            end_all()  # What the other threads wait for.
            raise


def processor_and_gpu_agree(sets):
    def check(work):
        (one, _), (other, _) = together(
            lambda: train(f"{work}/cpu", "1x1", {**sets, "device": "cpu"}), lambda: train(f"{work}/gpu", "1x1", {**CUDA, **sets}))
        worst = max(abs(a - b) / a for a, b in zip(losses(one), losses(other)))
        assert worst < LOSS_TOLERANCE, f"losses differ by {worst:.2e}"
        return f"losses differ by {worst:.1e} at most, {LOSS_TOLERANCE:.0e} allowed", {"worst": worst}
    return check


AGREE = [(f"CPU and CUDA agree{what}", processor_and_gpu_agree(sets)) for what, sets in (
    (" (f32)", {}), (", Muon", {"optimizer.kind": "muon"}), (", SOAP", {"optimizer.kind": "soap"}),
    (", dropout", {"model.dropout": 0.1}),
    (", Llama", {"model.arch": "llama", "model.kv_heads": 2, "model.qk_norm": "true", "model.vocabulary": 9000}))]


@contextlib.contextmanager
def logged():
    """The log has what is measured on the device only at `debug`; and libtorch tells where the host waits for it."""
    os.environ["OUROBOROS_LOG"] = "debug"
    try:
        yield
    finally:
        del os.environ["OUROBOROS_LOG"]


def nothing_is_waited_for(work):
    """As many waits of the host for the device in a longer run: those are of its start and its end."""
    kinds = {"AdamW, dropout": {"model.dropout": 0.1}, "Llama": {"model.arch": "llama", "model.kv_heads": 2}, "Muon": {"optimizer.kind": "muon"}, "SOAP": {"optimizer.kind": "soap"},
             "Transformer-XL, bf16": {"model.arch": "transformer-xl", "model.mem_len": 32, "precision": "bf16"}}
    text, figures = [], {}
    with logged():
        for name, sets in kinds.items():
            of = lambda steps: train(f"{work}/{name}-{steps}", "1x1", {**CUDA, "deterministic": "false", **sets, "steps": steps})[1]
            waits = [run.count("synchronizing CUDA operation") for run in together(lambda: of(20), lambda: of(40))]
            figures[name] = (waits[1] - waits[0]) / 20
            text.append(f"{name} {figures[name]:g}")
    assert not any(figures.values()), "waits of the host a step: " + ", ".join(text)
    return "the host waits for the device in no step: " + ", ".join(kinds), figures


@functools.cache
def oracle(grid, sets):
    """The oracle's lines, once for all checks of the same grid and settings."""
    with tempfile.TemporaryDirectory() as work:
        return train(f"{work}/oracle", grid, dict(sets), ["--oracle"])[0]


def grid_equals_oracle(grid, count, more=(), sets=None):
    def check(work):
        sets_ = {**CUDA, "eval.every": 10, "eval.tokens": 2000, **(sets or {})}
        expected, (found, _) = together(
            lambda: oracle(grid, tuple(sets_.items())), lambda: train(f"{work}/grid", grid, sets_, more, count))
        first = next((n for n, (a, b) in enumerate(zip(expected, found)) if a != b), None)
        assert first is None, f"line {first} differs: {expected[first]} and {found[first]}"
        assert len(expected) == len(found), f"{len(expected)} lines and {len(found)}"
        return f"{len(found)} lines of metrics equal the oracle's bit for bit"
    return check


def resumed(work):
    sets = {**CUDA, "checkpoint.every": 10}

    def in_parts():
        train(f"{work}/part", "2x1", {**sets, "steps": 20}, count=2)
        return train(f"{work}/part", "2x1", sets, ["--resume"], count=2)

    (whole, _), (rest, _) = together(lambda: train(f"{work}/whole", "2x1", sets, count=2), in_parts)
    assert losses(rest)[20:] == losses(whole)[20:], "the resumed run is another"
    return "10 steps after a resume equal those of the run that was not stopped"


def traced(work):
    """Of a trace whose moments are the device's, all that must be true of a trace; and the numbers are those without one."""
    import check as traces

    sets = {**CUDA, "deterministic": "false"}
    (plain, _), (found, _) = together(
        lambda: train(f"{work}/plain", "2x2", CUDA, count=4), lambda: train(f"{work}/traced", "2x2", CUDA, ["--trace", "10..14"], 4))
    assert losses(plain) == losses(found), "the traced run is another"
    train(f"{work}/ring", "3x1", {**sets, "grid.placement": "ring"}, ["--trace", "10..14"], 2)
    said = [traces.holds(traces.unpacked(f"{work}/{name}/trace-10-14.json.gz")) for name in ("traced", "ring")]
    return f"2x2: {said[0]}; 3x1 as a ring: {said[1]}"


def precisions(work):
    of = lambda precision: losses(train(f"{work}/{precision}", "1x1", {**CUDA, "precision": precision})[0])[-1]
    wide, *others = together(*(functools.partial(of, precision) for precision in ("f32", "tf32", "bf16")))
    text = []
    for precision, narrow in zip(("tf32", "bf16"), others):
        assert abs(narrow - wide) / wide < BF16_TOLERANCE, f"{precision} ends at {narrow}, f32 at {wide}"
        text.append(f"{precision} ends at {narrow:.4f}")
    return f"f32 ends at {wide:.4f}, " + ", ".join(text)


def sharing_is_refused(work):
    args = ["train", "configs/scaling.toml", "--grid", "2x1", "--out", work, *settings({**SMALL, "device": "cuda"})]
    text = ranks(2, args, code=2)
    assert "allow_shared_gpu" in text or "ranks on this host" in text, text[-500:]
    return "two ranks on one GPU: one error, exit code 2"


def memory(work):
    sets = {**CUDA, "precision": "bf16", "model.layers": 12, "model.d_model": 768, "model.heads": 12, "model.d_ff": 3072,
            "data.sequence": 1024, "batch": 16, "microbatches": 2, "steps": 10}
    predicted, measured = peak_memory(train(f"{work}/run", "1x1", sets)[1])
    assert measured <= MEMORY * predicted, f"{measured} MiB, {predicted} predicted"
    return f"{measured:.0f} MiB of the GPU, {predicted:.0f} predicted", {"measured": measured, "predicted": predicted}


def out_of_memory(work):
    sets = {**SMALL, "device": "cuda", "model.layers": 400, "model.d_model": 8192, "model.heads": 64, "model.d_ff": 32768}
    text = run([PROGRAM, "train", "configs/scaling.toml", "--out", work, *settings(sets)], code=2)
    assert "MiB predicted for" in text, text[-500:]
    return "a model that is too large: one error with the need, exit code 2"


def equals_oracle(name, count, more=(), **sets):
    """A row: `name` begins with the grid."""
    return name, grid_equals_oracle(name.split()[0], count, more, {key.replace("__", "."): value for key, value in sets.items()})


# Those that are worth most: where time is short, the others are left out.
FIRST = [
    AGREE[0],
    equals_oracle("1x1 equals the oracle", 1),
    equals_oracle("2x1 equals the oracle (NCCL)", 2),
    equals_oracle("1x2 equals the oracle (NCCL)", 2),
    equals_oracle("2x2 equals the oracle, bf16 (NCCL)", 4, precision="bf16"),
]
REST = [
    ("sharing a GPU is refused", sharing_is_refused),
    ("no step waits for the device", nothing_is_waited_for),
    *AGREE[1:],
    equals_oracle("2x2 equals the oracle (NCCL)", 4),
    equals_oracle("3x1 as a ring equals the oracle (NCCL)", 2, grid__placement="ring"),
    equals_oracle("3x1 equals the oracle, gpipe (NCCL)", 3, schedule="gpipe"),
    equals_oracle("3x1 equals the oracle, sequential (NCCL)", 3, schedule="sequential", microbatches=1),
    equals_oracle("1x3 equals the oracle (NCCL)", 3, batch=12),
    equals_oracle("1x3 equals the oracle, wire = bf16 (NCCL)", 3, batch=12, wire="bf16"),
    equals_oracle("2x2 equals the oracle (over MPI)", 4, ["--transport", "mpi"]),
    equals_oracle("2x2 equals the oracle (threads)", 1),
    equals_oracle("2x1 equals the oracle, dropout (NCCL)", 2, model__dropout=0.1),
    equals_oracle("2x1 equals the oracle, Transformer-XL (NCCL)", 2, model__arch="transformer-xl", model__mem_len=32),
    equals_oracle("2x1 equals the oracle, Llama, bf16 (NCCL)", 2, model__arch="llama", model__kv_heads=2,
                  model__vocabulary=9000, model__loss_chunk_mib=2, precision="bf16"),
    ("tf32 and bf16 beside f32", precisions),
    ("a trace of the device's moments", traced),
    equals_oracle("3x1 equals the oracle, measured staleness (NCCL)", 3, staleness__every=7),
    equals_oracle("2x1 equals the oracle, Muon (NCCL)", 2, optimizer__kind="muon"),
    equals_oracle("3x1 equals the oracle, SOAP (NCCL)", 3, optimizer__kind="soap", optimizer__soap_every=3),
    ("memory against its prediction", memory),
    ("a model that is too large", out_of_memory),
    ("a resumed run is the same", resumed),
    equals_oracle("2x2 equals the oracle, wire = bf16 (NCCL)", 4, wire="bf16"),
    equals_oracle("2x2 equals the oracle, three microbatches (NCCL)", 4, microbatches=3, batch=12),
    equals_oracle("3x1 equals the oracle, 1f1b, recompute by blocks (NCCL)", 3, schedule="1f1b", recompute="blocks"),
    equals_oracle("2x1 equals the oracle, sequential, wire = bf16 (NCCL)", 2, schedule="sequential", wire="bf16"),
    equals_oracle("4x1 equals the oracle, synchronous start (NCCL)", 4, sync_steps=3),
    equals_oracle("3x2 equals the oracle, a fresh tied head (NCCL)", 6, model__tie="head"),
    equals_oracle("4x1 as a ring equals the oracle, a fresh tied head, bf16 (NCCL)", 3,
                  model__tie="head", grid__placement="ring", precision="bf16"),
    equals_oracle("2x2 equals the oracle, with a self-test of all links (NCCL)", 4, ["--self-test"]),
]
# What shows on a processor that the checks themselves work; besides everything about the oracle.
ANYWHERE = (*(check for _, check in AGREE), resumed, traced)
