#!/usr/bin/env bash
# Efficiency of the runtime on grids of up to 44 ranks with emulated compute, beside the schedule's prediction.
#   scripts/bench-grid.sh [--rounds N] [--short]      about a quarter of an hour; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cargo build --release --quiet
exec python3 benches/grid.py "$@"
