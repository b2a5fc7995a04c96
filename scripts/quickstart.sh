#!/usr/bin/env bash
# From a fresh machine to a trained model: set-up, build, training on a 2x2 grid under mpirun, a sample.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/setup.sh
say "build"
cargo build --release --quiet
say "training on a 2x2 grid: two stages, two replicas, four ranks"
mpirun -n 4 --oversubscribe target/release/ouroboros train configs/quickstart.toml
say "a sample"
target/release/ouroboros generate runs/quickstart --prompt $'\n' --tokens 300
