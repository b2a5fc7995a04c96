#!/usr/bin/env bash
# Every gate, cheapest first: set-up, format, lints, documentation, tests, then whether the benchmarks run.
# Prints the minutes of each part at the end, and fails if all of them took longer than LIMIT minutes.
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

hugging_face() {
    if [ -x .venv/bin/python ]; then scripts/hugging-face.sh; else echo "hugging-face: skipped: no torch in .venv"; fi
}

# What asks for no time that it takes, two at once: damaged input, golden numbers, kills, readers of reports, the GPU checks on the
# processor, and whether the benchmarks still work.
short_forms() {
    # One check of each kind; all of them say the same of the processor.
    local few='--only "agree (f32)" --only "oracle, bf16" --only "as a ring equals the oracle (" --only resumed --only "oracle, SOAP" --only side'
    local scripts=(
        "scripts/bench-grid.sh --short" "scripts/bench-hosts.sh --short" "scripts/bench-rules.sh --short"
        "scripts/bench-save.sh --short" "scripts/bench-trace.sh --short" "scripts/documents.sh --short"
        "scripts/gpu-check.sh --quick --processor $few"
        "scripts/test-gpu-kit.sh" "scripts/test-report.sh" "scripts/torture.sh 6" "scripts/golden.sh" "scripts/fuzz.sh 0.5"
    )
    # With a libtorch of one's own there is no Python package of torch, and so no peers.
    if [ -x .venv/bin/python ]; then
        scripts+=("scripts/bench-peers.sh --short" "scripts/bench-models.sh --short" "scripts/bench-data.sh --short")
    else
        echo "short forms: no peers, models and data: no torch in .venv (set up without LIBTORCH to have it)"
    fi
    # The longest first. A line of what each prints says whose it is.
    printf '%s\n' "${scripts[@]}" | tac | xargs -d '\n' -P 2 -I{} bash -c '
        set -o pipefail
        begun=$SECONDS
        {} 2>&1 | sed "s|^|$(basename "${1%% *}" .sh): |" || { echo "test.sh: $1 has failed" >&2; exit 255; }
        echo "$1: $((SECONDS - begun)) s"' short {}
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
part "tests" cargo test --no-fail-fast
part "batch jobs, with a real Slurm" scripts/test-slurm.sh
part "what needs a GPU, where there is one" scripts/gpu-check.sh --quick
part "damaged input, golden numbers, kills, reports, benchmarks in short" short_forms

say "minutes"
printf '%s' "$minutes"
printf '%6.1f  in all (limit %s)\n' "$(in_minutes $SECONDS)" "$LIMIT"
if [ "$SECONDS" -gt $((LIMIT * 60)) ]; then
    echo "test.sh: every gate passed, but in more than $LIMIT minutes" >&2
    exit 1
fi
