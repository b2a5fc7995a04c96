#!/usr/bin/env bash
# What an update costs by each rule: the step of AdamW, Muon and SOAP on the same model, in alternating rounds.
#   scripts/bench-rules.sh [--rounds N] [--short]     some five minutes; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cargo build --release --quiet
exec python3 benches/rules.py "$@"
