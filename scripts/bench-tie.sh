#!/usr/bin/env bash
# What a tie costs: tokens/s of the enwik8 recipe's model on 2x1, tied and untied, in alternating rounds. Batches are
# smaller than the recipe's, so that the cost of the table, which is one a step, weighs more than it does there.
#   scripts/bench-tie.sh [ROUNDS]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
cargo build --release --quiet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
head -c 2000000 /dev/urandom >"$out/noise"
target/release/ouroboros data prepare "$out/noise" --out "$out/noise.tokens" >/dev/null
for round in $(seq "$rounds"); do
    for tie in none aligned; do
        mpirun -n 2 target/release/ouroboros train configs/enwik8-xl-12l.toml --grid 2x1 --out "$out/tie-$tie-$round" \
            --set data.path="$out/noise.tokens" --set model.tie="$tie" --set batch=2 --set microbatches=2 --set steps=8 \
            --set eval.every=1000 --set eval.tokens=1 >"$out/log" 2>&1 || { tail -n 20 "$out/log" >&2; exit 1; }
    done
done
python3 scripts/rates.py "$out" "$rounds" tie none aligned
