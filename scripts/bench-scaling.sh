#!/usr/bin/env bash
# Tokens/s of 1x1, 2x1 and 1x2 on the same model, one thread a rank, alternating rounds; medians and ratios.
#   scripts/bench-scaling.sh [ROUNDS] [CONFIG...]       by default of the Transformer and of the Transformer-XL
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
shift || true
configs=("$@")
[ ${#configs[@]} -gt 0 ] || configs=(configs/scaling.toml configs/scaling-xl.toml)
cargo build --release --quiet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in $(seq "$rounds"); do
    for grid in 1x1 2x1 1x2; do
        for config in "${configs[@]}"; do
            ranks=$((${grid%x*} * ${grid#*x}))
            name=$(basename "$config" .toml)
            mpirun -n "$ranks" target/release/ouroboros train "$config" --grid "$grid" \
                --out "$out/$name-$grid-$round" >"$out/log" 2>&1 || { tail -n 20 "$out/log" >&2; exit 1; }
        done
    done
done
for config in "${configs[@]}"; do
    python3 scripts/rates.py "$out" "$rounds" "$(basename "$config" .toml)" 1x1 2x1 1x2
done
