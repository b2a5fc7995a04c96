#!/usr/bin/env bash
# Kills runs at random moments, resumes them, and compares the end with that of a run that was left alone.
#   scripts/torture.sh N            N kills (default 10); SEED=... chooses others
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -x target/release/ouroboros ] || cargo build --release --quiet
exec python3 scripts/torture.py "$@"
