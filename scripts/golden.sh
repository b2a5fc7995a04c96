#!/usr/bin/env bash
# Golden numbers: losses and final digests of short runs that together use every part of the arithmetic.
#   scripts/golden.sh                     runs them and compares with tests/golden/table.json: losses to 1e-6, digests
#                                         on the kind of processor that the table was made on
#   scripts/golden.sh --write             makes the table anew
#   scripts/golden.sh --compare COMMIT    builds that commit too, runs both programs here on every runner, resumes states
#                                         that the old one stopped with the new one: exit code 1 on any difference
#   --only WORD [WORD ...]                only rows whose name contains one of the words
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cargo build --release --quiet
exec python3 scripts/golden.py "$@"
