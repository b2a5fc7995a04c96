#!/usr/bin/env bash
# Data: tokenising beside the Python package `tokenizers`, on one core and two, memory of a preparation, time to the first
# step, and what reading batches costs.
#   scripts/bench-data.sh [--rounds N] [--short]      about ten minutes; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/hugging-face.sh
cargo build --release --quiet
exec python3 benches/data.py "$@"
