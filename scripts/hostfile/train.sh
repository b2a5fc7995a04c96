#!/usr/bin/env bash
# Trains on hosts without a batch system: those of `hosts` (a copy of it: HOSTS=...), which ssh reaches without a password and
# which see this folder under the same path. `touch runs/NAME/STOP` stops it and saves, and the same command goes on; Ctrl-C leaves
# the ranks two seconds, which may be too little for a save.
#   NETWORK=10.0.0.0/24 scripts/hostfile/train.sh configs/shakespeare.toml --grid 4x2
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# Open MPI takes all networks that hosts have, also those on which they do not see each other (Docker's bridge, a management
# network), and then hangs or is slow. NETWORK, as an interface's name or better as a subnet, is the one to use: for the
# tensors (btl) and for Open MPI's own messages (oob).
network=()
[ -z "${NETWORK:-}" ] || network=(--mca btl_tcp_if_include "$NETWORK" --mca oob_tcp_if_include "$NETWORK")

# The last word of a hostfile's lines is the number of slots; mpirun starts one rank a slot.
exec mpirun --hostfile "${HOSTS:-scripts/hostfile/hosts}" "${network[@]}" target/release/ouroboros train "$@" --resume
