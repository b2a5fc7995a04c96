#!/usr/bin/env bash
# The models of today: a Llama beside `transformers`, large vocabularies, generation, import and export.
#   scripts/bench-models.sh [--rounds N] [--short]      about ten minutes; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/hugging-face.sh
cargo build --release --quiet
exec python3 benches/models.py "$@"
