"""Trains the benchmark's model as a PyTorch user would, and prints what it measured as one line of JSON.

    python benches/peers/train.py KIND WEIGHTS --microbatches M --steps N

KIND: eager (one process), ddp (two ranks, gloo), gpipe or 1f1b (two ranks, torch.distributed.pipelining, gloo).
WEIGHTS: a folder that `ouroboros init` has written, with the initial weights and the config. One thread a rank.
The steps' losses are printed too: they must be those of the other programs.
"""

import argparse
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
    parser.add_argument("kind", choices=["eager", "ddp", "gpipe", "1f1b"])
    parser.add_argument("weights")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
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
    if args.kind == "eager":
        run = Run(args, 0, 1)
        whole(run, lambda module: module)
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
