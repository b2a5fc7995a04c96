#!/usr/bin/env bash
# Every gate, cheapest first: set-up, format, lints, documentation, tests, then whether the benchmarks run.
# Prints the minutes of each part at the end, and fails if all of them took longer than LIMIT minutes.
#   TEST_PROFILE=release scripts/test.sh      tests what `cargo build --release` makes, where nothing is compiled yet
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LIMIT=${LIMIT:-35}
minutes=""
SECONDS=0

# part NAME COMMAND...: runs a gate and keeps its time.
part() {
    local name=$1 begun=$SECONDS
    shift
    say "$name"
    "$@"
    minutes+=$(printf '%6.1f  %s' "$(in_minutes $((SECONDS - begun)))" "$name")$'\n'
}

# Seconds as minutes, to a tenth.
in_minutes() { printf '%d.%d' $(($1 / 60)) $(($1 % 60 / 6)); }

documentation() { RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --document-private-items; }

# With a libtorch of one's own there is no Python package of torch, and so no peers.
peers() {
    if [ -x .venv/bin/python ]; then
        scripts/bench-peers.sh --short
    else
        echo "bench-peers: skipped: no torch in .venv (set up without LIBTORCH to have it)"
    fi
}

hugging_face() {
    if [ -x .venv/bin/python ]; then scripts/hugging-face.sh; else echo "hugging-face: skipped: no torch in .venv"; fi
}

models() {
    if [ -x .venv/bin/python ]; then scripts/bench-models.sh --short; else echo "bench-models: skipped: no torch in .venv"; fi
}

documents() {
    if [ -x .venv/bin/python ]; then scripts/bench-data.sh --short; else echo "bench-data: skipped: no torch in .venv"; fi
    scripts/documents.sh --short
}

# Compiled while libraries are fetched and one core reads the code; nothing else may run beside the tests.
release_build() { wait "$release"; }

part "set-up" scripts/setup.sh
part "format" cargo fmt --check
cargo build --release --quiet &
release=$!
trap 'kill "$release" 2>/dev/null || true' EXIT
part "Hugging Face's libraries" hugging_face
part "clippy" cargo clippy --quiet --all-targets -- -D warnings
part "documentation" documentation
part "release build" release_build
part "tests" cargo test --no-fail-fast --profile "${TEST_PROFILE:-test}"
part "damaged input, for half a minute" scripts/fuzz.sh 0.5
part "traces, curves and reports, by their readers" scripts/test-report.sh
part "golden numbers" scripts/golden.sh
part "kills" scripts/torture.sh 10
part "batch jobs, with a real Slurm" scripts/test-slurm.sh
part "benchmark: peers, in short" peers
part "benchmark: models, in short" models
part "benchmark: data, in short, and documents" documents
part "benchmark: grids, in short" scripts/bench-grid.sh --short
part "benchmark: hosts, in short" scripts/bench-hosts.sh --short
part "benchmark: rules, in short" scripts/bench-rules.sh --short
part "benchmark: saves, in short" scripts/bench-save.sh --short
part "what needs a GPU, where there is one" scripts/gpu-check.sh --quick
part "whether its checks work, on the processor" scripts/gpu-check.sh --quick --processor
part "whether its kit works, without MPI and network" scripts/test-gpu-kit.sh

say "minutes"
printf '%s' "$minutes"
printf '%6.1f  in all (limit %s)\n' "$(in_minutes $SECONDS)" "$LIMIT"
if [ "$SECONDS" -gt $((LIMIT * 60)) ]; then
    echo "test.sh: every gate passed, but in more than $LIMIT minutes" >&2
    exit 1
fi
