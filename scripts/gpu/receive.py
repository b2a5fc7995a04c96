"""One of two processes on one GPU: 0 times bf16 products while a receive waits for what 1 sends only afterwards. Prints, as JSON, how
many times as long they take, as they are and with the receive's multiprocessors left to it.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

SIDE, WARM, PRODUCTS = 8192, 5, 30


def seconds(product):
    """Of the products alone: waiting for the whole device would wait for the receive."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WARM):
        product()
    begun.record()
    for _ in range(PRODUCTS):
        product()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000 / PRODUCTS


def timing(value, store):
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = lambda: torch.mm(a, b)
    alone, found = seconds(product), {}

    for name, left in (("beside", None), ("carved", int(os.environ["NCCL_MAX_CTAS"]))):
        if left is not None:
            torch.backends.cuda.preferred_blas_library("cublaslt")
            torch._C._set_sm_carveout_experimental(left)
            seconds(product)
        request = dist.irecv(value, 1)
        time.sleep(0.2)
        found[name] = seconds(product) / alone
        store.set(name, "measured")
        request.wait()
        torch.cuda.synchronize()
    print(json.dumps(found))


def main():
    rank = int(sys.argv[1])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, rank == 0)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2)
    value = torch.zeros(1 << 20, device="cuda")
    # Connects the two.
    dist.send(value, 0) if rank else dist.recv(value, 1)
    torch.cuda.synchronize()

    if rank == 0:
        timing(value, store)
        return
    for name in ("beside", "carved"):
        # Nothing of this process runs on the GPU meanwhile.
        store.wait([name])
        dist.send(value, 0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
