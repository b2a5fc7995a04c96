#!/usr/bin/env bash
# Damages everything that is read from outside, at random, for so many minutes, and prints executions and findings of each target.
#   scripts/fuzz.sh MINUTES [TARGET] [--seed N]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

minutes=${1:?"say for how many minutes: scripts/fuzz.sh 10"}
shift
seconds=$(awk -v minutes="$minutes" 'BEGIN { print minutes * 60 }')
# With the checks of a build for tests: sums that overflow are findings.
cargo test --quiet --test fuzz -- "$@" --seconds "$seconds"
