#!/usr/bin/env bash
# Tokens/s of 1x1, 2x1 and 1x2 on the same model, one thread a rank, alternating rounds; medians and ratios.
#   scripts/bench-scaling.sh [ROUNDS]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
cargo build --release --quiet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in $(seq "$rounds"); do
    for grid in 1x1 2x1 1x2; do
        ranks=$((${grid%x*} * ${grid#*x}))
        mpirun -n "$ranks" target/release/ouroboros train configs/scaling.toml --grid "$grid" \
            --out "$out/$grid-$round" >"$out/log" 2>&1 || { tail -n 20 "$out/log" >&2; exit 1; }
    done
done
python3 - "$out" "$rounds" <<'PY'
import json, os, platform, statistics, sys

out, rounds = sys.argv[1], int(sys.argv[2])

def rate(grid, n):
    """Tokens/s of a run: tokens of a step over the median time of its steps, the first quarter left out."""
    lines = [json.loads(line) for line in open(os.path.join(out, f"{grid}-{n}", "metrics.jsonl"))]
    steps = [line for line in lines if "loss" in line]
    steps = steps[len(steps) // 4:]
    span = sum(line["step_s"] for line in steps)
    return steps[0]["tokens_per_s"] * steps[0]["step_s"] * len(steps) / span

rates = {grid: [rate(grid, n) for n in range(1, rounds + 1)] for grid in ("1x1", "2x1", "1x2")}
model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
print(f"{model or platform.machine()}, {os.cpu_count()} cores, {rounds} rounds, medians")
base = statistics.median(rates["1x1"])
print(f"{'grid':>5} {'tokens/s':>10} {'spread':>15} {'over 1x1':>9}")
for grid, values in rates.items():
    middle = statistics.median(values)
    print(f"{grid:>5} {middle:>10,.0f} {min(values):>7,.0f}-{max(values):<7,.0f} {middle / base:>9.2f}")
PY
