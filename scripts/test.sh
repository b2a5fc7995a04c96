#!/usr/bin/env bash
# Every gate, cheapest first: set-up, format, lints, documentation, tests.
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
