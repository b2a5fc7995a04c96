#!/usr/bin/env bash
# Makes the pictures of schedules that the documents show.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cargo build --release --quiet
target/release/ouroboros schedule --grid 4x1 -m 2 --times 1:2:0 --steps 6 --svg docs/schedules.svg >/dev/null
echo "pictures: docs/schedules.svg"
