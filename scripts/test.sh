#!/usr/bin/env bash
# Every gate, cheapest first: set-up, format, lints, documentation, tests, then whether the benchmarks run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/setup.sh
say "format"
cargo fmt --check
say "clippy"
cargo clippy --quiet --all-targets -- -D warnings
say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps
say "tests"
cargo test --no-fail-fast
say "kills"
cargo build --release --quiet
scripts/torture.sh 10
say "batch jobs, with a real Slurm"
scripts/test-slurm.sh
say "benchmarks, in their short form"
# With a libtorch of one's own there is no Python package of torch, and so no peers.
if [ -x .venv/bin/python ]; then
    scripts/bench-peers.sh --short
else
    echo "bench-peers: skipped: no torch in .venv (set up without LIBTORCH to have it)"
fi
scripts/bench-grid.sh --short
scripts/bench-hosts.sh --short
scripts/bench-save.sh --short
say "what needs a GPU: tried where there is one; and whether its checks work, on the processor"
scripts/gpu-check.sh --quick
scripts/gpu-check.sh --quick --processor
