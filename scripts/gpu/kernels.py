"""Where the GPU's time of a step goes, by kinds of kernels, out of what Nsight Compute has written about a training:

    ncu --clock-control none --metrics gpu__time_duration.sum --csv --log-file kernels.csv ouroboros train CONFIG --set steps=4 ...
    python3 scripts/gpu/kernels.py kernels.csv [LAYERS]

One step, from the end of an update to the end of the next; with LAYERS also a layer's share. Kernels are timed one by one, so a device
that runs hot in a row of them is slower than their sum.
"""

import collections
import csv
import sys

# The first that a kernel's name has.
UPDATE, PRODUCTS = "update of the weights", "matrix products"
KINDS = [
    (UPDATE, ("update_",)),
    ("layer norms", ("layer_norm", "GammaBeta", "rms_norm")),
    (PRODUCTS, ("nvjet", "gemm", "cutlass", "splitKreduce")),
    ("attention", ("sdpa", "flash", "fmha", "dot_do_o", "convert_dq", "CatArray")),
    ("GELU", ("Gelu",)),
    ("gradients into the f32 sum", ("add_bf16",)),
    ("residual additions", ("CUDAFunctor_add<c10::BFloat16>",)),
    ("gradients of biases", ("sum_functor<c10::BFloat16",)),
]


def kind(name):
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "the gradient's norm, loss, embedding, others")


def last_step(path):
    """Names and microseconds of the kernels of the last whole step."""
    with open(path) as file:
        rows = list(csv.DictReader(line for line in file if line.startswith('"')))
    units = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0}
    kernels = [(row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]]) for row in rows]
    # A step may have several updates, of parts of the weights and of the table; then come products again.
    last, ends = None, []
    for number, (name, _) in enumerate(kernels):
        if kind(name) == UPDATE:
            last = number
        elif kind(name) == PRODUCTS and last is not None:
            ends, last = [*ends, last], None
    ends += [last] if last is not None else []
    if len(ends) < 2:
        sys.exit(f"kernels: {len(ends)} updates in {path}, and a step lies between two")
    return kernels[ends[-2] + 1 : ends[-1] + 1]


def main():
    kernels = last_step(sys.argv[1])
    layers = int(sys.argv[2]) if len(sys.argv) > 2 else None
    sums = collections.defaultdict(lambda: [0, 0.0])
    for name, microseconds in kernels:
        of = sums[kind(name)]
        of[0], of[1] = of[0] + 1, of[1] + microseconds

    whole = sum(of for _, of in sums.values())
    print(f"{'kernels':>8} {'us':>9} {'share':>6}{'  us a layer' if layers else ''}")
    for name, (count, of) in sorted(sums.items(), key=lambda item: -item[1][1]):
        print(f"{count:8} {of:9.0f} {of / whole:6.1%}" + (f" {of / layers:11.0f}" if layers else "") + f"  {name}")
    print(f"{len(kernels):8} {whole:9.0f}")


if __name__ == "__main__":
    main()
