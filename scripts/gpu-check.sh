#!/usr/bin/env bash
# What only a GPU can show: losses, grids against the oracle, NCCL, memory, speed beside PyTorch. One GPU is enough: ranks share
# it, each with an NCCL_HOSTID of its own, because NCCL refuses two ranks of one host on one GPU. Prints what passed, failed
# and was skipped, with reasons; without a GPU everything is skipped, and that is no failure.
#   scripts/gpu-check.sh [--quick]        --quick leaves the measurements of speed out
#   OUROBOROS=/path/to/ouroboros PYTHON=/path/to/python3 scripts/gpu-check.sh      uses these instead of building and .venv
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${OUROBOROS:-}" ]; then
    cargo build --release --quiet
    OUROBOROS=$root/target/release/ouroboros
fi
export OUROBOROS
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" scripts/gpu_check.py "$@"
