#!/usr/bin/env bash
# What saving every 100 steps costs, and how fast it is beside the disk's own speed: 50 million parameters on two ranks.
#   scripts/bench-save.sh [--saves N] [--folder DIR] [--short]     about ten minutes; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cargo build --release --quiet
exec python3 benches/save.py "$@"
