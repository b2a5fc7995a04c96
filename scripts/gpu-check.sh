#!/usr/bin/env bash
# What only a GPU can show: losses, grids against the oracle, NCCL, memory, speed beside PyTorch. One GPU is enough: ranks share
# it, each with an NCCL_HOSTID of its own, because NCCL refuses two ranks of one host on one GPU. Prints what passed, failed
# and was skipped, with reasons, in the order of what it is worth; without a GPU everything is skipped, and that is no failure.
#   scripts/gpu-check.sh [--quick] [--minutes N] [--only TEXT]... [--part I/N] [--compile] [--json FILE]
#       --quick leaves the measurements of speed out; --processor makes the checks that need no GPU on the processor
#   OUROBOROS=/path/to/ouroboros PYTHON=/path/to/python3 scripts/gpu-check.sh      uses these instead of building and .venv
# On a machine without Rust and MPI: `scripts/gpu-kit.sh` here, then there `. .gpu-kit/env && scripts/gpu-check.sh`.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${OUROBOROS:-}" ]; then
    cargo build --release --quiet
    OUROBOROS=$root/target/release/ouroboros
fi
export OUROBOROS
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" scripts/gpu_check.py "$@"
