"""Trains a model of a Hugging Face folder with `transformers` as it comes, and prints what it measured as one line of JSON.

    python benches/peers/llama.py FOLDER WEIGHTS --microbatches M --steps N

FOLDER: the model, as `ouroboros export` has written it; WEIGHTS: the folder of weights that it was made of, whose config
tells text, batch and optimizer. Eager PyTorch, `attn_implementation="sdpa"`, one thread.
"""

import argparse
import json
import os
import time

import torch
from model import Streams, loss, optimizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("weights")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with open(os.path.join(args.weights, "manifest.json")) as file:
        config = json.load(file)["config"]
    batch, sequence = config["batch"], config["data"]["sequence"]
    text = Streams(config["data"]["path"], batch, sequence, config["data"]["held_out"])
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, attn_implementation="sdpa").train()
    update = optimizer(model, config["optimizer"])
    share = batch // args.microbatches
    losses, seconds = [], []
    for t in range(args.steps):
        start = time.perf_counter()
        total = 0.0
        for j in range(args.microbatches):
            tokens, targets = text.batch(t, range(j * share, (j + 1) * share))
            value = loss(model(tokens, use_cache=False).logits, targets) / args.microbatches
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["optimizer"]["clip"])
        update.step()
        update.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
    print(json.dumps({"losses": losses, "seconds": seconds, "tokens": batch * sequence}))


if __name__ == "__main__":
    main()
