#!/usr/bin/env bash
# Ours beside plain PyTorch, DDP, and GPipe and 1F1B of torch.distributed.pipelining: one table, and runs/bench-peers.json.
#   scripts/bench-peers.sh [--rounds N] [--short]      about a quarter of an hour; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# torch.distributed sends its objects through numpy, which torch does not bring.
if [ -x .venv/bin/pip ] && ! .venv/bin/python -c "import numpy" 2>/dev/null; then
    .venv/bin/pip install --quiet --disable-pip-version-check numpy
fi
cargo build --release --quiet
exec python3 benches/peers.py "$@"
