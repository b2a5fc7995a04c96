"""Trains the benchmark's model as a PyTorch user would, and prints what it measured as one line of JSON.

    python benches/peers/train.py KIND WEIGHTS --microbatches M --steps N

KIND: eager (one process), ddp (two ranks, gloo), gpipe or 1f1b (two ranks, torch.distributed.pipelining, gloo), or
products: nothing but the model's matrix products and attention, forward and backward, in one process: what no program
with libtorch's kernels can do without. With --ranks 2 only the first of two replicas' share of them.
WEIGHTS: a folder that `ouroboros init` has written, with the initial weights and the config. One thread a rank.
The steps' losses are printed too: they must be those of the other programs.
"""

import argparse
import ctypes
import glob
import json
import os
import socket
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import Part, Streams, load, loss, optimizer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["eager", "ddp", "gpipe", "1f1b", "products"])
    parser.add_argument("weights")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1, help="products only")
    return parser.parse_args()


class Run:
    """What all kinds share: settings, text, the clock and the losses."""

    def __init__(self, args, rank, ranks):
        with open(os.path.join(args.weights, "manifest.json")) as file:
            self.config = json.load(file)["config"]
        config = self.config
        self.args, self.rank, self.ranks = args, rank, ranks
        self.model, self.sequence, self.batch = config["model"], config["data"]["sequence"], config["batch"]
        self.text = Streams(config["data"]["path"], self.batch, self.sequence, config["data"]["held_out"])
        self.losses, self.seconds = [], []
        torch.set_num_threads(1)
        # Rank r on core r, as mpirun binds ours.
        cores = sorted(os.sched_getaffinity(0))
        if ranks > 1 and len(cores) >= ranks:
            os.sched_setaffinity(0, {cores[rank]})

    def part(self, first, past):
        part = Part(self.model, self.sequence, first, past)
        load(part, glob.glob(os.path.join(self.args.weights, "*.safetensors")))
        return part

    def clip(self, module):
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.config["optimizer"]["clip"])

    def train(self, step):
        """Calls `step(t)`, which returns the loss or none, and keeps its time."""
        for t in range(self.args.steps):
            start = time.perf_counter()
            value = step(t)
            self.seconds.append(time.perf_counter() - start)
            self.losses.append(value)

    def report(self):
        tokens = self.batch * self.sequence
        return {"losses": self.losses, "seconds": self.seconds, "tokens": tokens}


def whole(run, wrap):
    """The whole model on every rank, each with its rows of the batch; eager and ddp."""
    module = wrap(run.part(0, run.model["layers"]))
    update = optimizer(module, run.config["optimizer"])
    rows = run.batch // run.ranks
    share = rows // run.args.microbatches

    def step(t):
        total = 0.0
        for j in range(run.args.microbatches):
            first = run.rank * rows + j * share
            tokens, targets = run.text.batch(t, range(first, first + share))
            last = j + 1 == run.args.microbatches
            if hasattr(module, "require_backward_grad_sync"):
                module.require_backward_grad_sync = last
            value = loss(module(tokens), targets) / run.args.microbatches
            value.backward()
            total += value.item()
        run.clip(module)
        update.step()
        update.zero_grad()
        return total

    run.train(step)


def quickest(ways):
    """Which of several calls takes least time."""

    def seconds(way):
        way()
        start = time.perf_counter()
        for _ in range(3):
            way()
        return time.perf_counter() - start

    return min(range(len(ways)), key=lambda i: seconds(ways[i]))


def three_products(values, weights, tokens):
    """What one layer's product needs forward and backward, each in the ways of libtorch's two libraries: MKL, and oneDNN, which has
    the convolutions. Of MKL's the results go into memory that is there already."""
    weight, weight_gradient = weights
    (x, dx), (dy, y) = values[weight.shape[1]], values[weight.shape[0]]
    pixel = weight.view(*weight.shape, 1, 1)

    def image(flat):
        return flat.view(16, tokens // 16, 1, flat.shape[1]).permute(0, 3, 1, 2)

    def backward(mask):
        return torch.ops.aten.convolution_backward(
            image(dy), image(x), pixel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)

    ways = [
        [lambda: torch.mm(x, weight.t(), out=y)],
        [lambda: torch.mm(dy, weight, out=dx)],
        [lambda: torch.mm(dy.t(), x, out=weight_gradient)],
    ]
    if tokens % 16 == 0:
        ways[0].append(lambda: torch.conv2d(image(x), pixel))
        ways[1].append(lambda: backward([True, False, False]))
        ways[2].append(lambda: backward([False, True, False]))
    return ways


def products(run):
    """Every matrix product of a step, forward and backward, and the attention, and nothing else."""
    model, m = run.model, run.args.microbatches
    d, f, heads, layers = model["d_model"], model["d_ff"], model["heads"], model["layers"]
    rows = run.batch // run.args.ranks // m
    tokens = rows * run.sequence
    shapes = layers * [(3 * d, d), (d, d), (f, d), (d, f)] + [(256, d)]
    weights = [(torch.randn(shape), torch.empty(shape)) for shape in shapes]
    values = {width: (torch.randn(tokens, width), torch.empty(tokens, width)) for width in {d, 3 * d, f, 256}}
    # Memory that is given back is kept, as ours keeps it: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)
    libc.mallopt(-1, 1 << 30)
    layers_ways = [three_products(values, pair, tokens) for pair in weights]
    best = {shape: [quickest(both) for both in ways] for shape, ways in zip(shapes, layers_ways)}
    calls = [both[i] for shape, ways in zip(shapes, layers_ways) for i, both in zip(best[shape], ways)]
    query, key, value, gradient = (torch.randn(rows, heads, run.sequence, d // heads) for _ in range(4))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def step(t):
        for _ in range(m):
            for call in calls:
                call()
            for _ in range(layers):
                out, sums = flash(query, key, value, 0.0, True)
                flash_backward(gradient, query, key, value, out, sums, 0.0, True)

    run.train(step)


def pipeline(run, kind):
    """Half of the layers on each rank."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    layers, m = run.model["layers"], run.args.microbatches
    cuts = [layers * rank // run.ranks for rank in range(run.ranks + 1)]
    module = run.part(cuts[run.rank], cuts[run.rank + 1])
    stage = PipelineStage(module, run.rank, run.ranks, torch.device("cpu"))
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, m, loss_fn=loss)
    update = optimizer(module, run.config["optimizer"])
    last = run.rank == run.ranks - 1

    def step(t):
        tokens, targets = run.text.batch(t, range(run.batch))
        losses = []
        if run.rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=targets, losses=losses)
        run.clip(module)
        update.step()
        update.zero_grad()
        return sum(value.item() for value in losses) / m if last else None

    run.train(step)


def rank_main(rank, ranks, args, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    run = Run(args, rank, ranks)
    if args.kind == "ddp":
        whole(run, lambda module: torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True))
        gathered = [None] * ranks
        dist.all_gather_object(gathered, run.losses)
        run.losses = [sum(values) / ranks for values in zip(*gathered)]
    else:
        pipeline(run, args.kind)
    # Times of the first rank, losses of the last.
    gathered = [None] * ranks
    dist.all_gather_object(gathered, run.report())
    if rank == 0:
        with open(path, "w") as file:
            json.dump({**gathered[0], "losses": gathered[-1]["losses"]}, file)
    dist.barrier()
    # gloo's threads may abort a process that leaves in the ordinary way ("terminate called without an active exception").
    os._exit(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    args = arguments()
    if args.kind in ("eager", "products"):
        run = Run(args, 0, 1)
        if args.kind == "eager":
            whole(run, lambda module: module)
        else:
            products(run)
        print(json.dumps(run.report()))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "report.json")
        # A rank that fails ends the others.
        mp.spawn(rank_main, args=(2, args, free_port(), path), nprocs=2, join=True)
        with open(path) as file:
            print(file.read())


if __name__ == "__main__":
    main()
