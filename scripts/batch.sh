#!/usr/bin/env bash
# Sourced by the batch scripts of Slurm and PBS, which describe the variables: one launch of a run, which goes on where the
# launch before it stopped. `requeue`, a function of theirs, queues the job once more.
set -euo pipefail

# The number of ranks of a grid, one a place.
ranks_of() {
    [[ $1 =~ ^([0-9]+)x([0-9]+)$ ]] || { echo "batch: GRID=$1 is not stages x replicas, as in 4x2" >&2; return 2; }
    echo $((BASH_REMATCH[1] * BASH_REMATCH[2]))
}

# launch OPTION...: mpirun with the program and these options to it; leaves with mpirun's code.
launch() {
    local program=${OUROBOROS:-target/release/ouroboros} mpirun_args program_args ranks code
    [ -x "$program" ] || { echo "batch: OUROBOROS=$program is no program in $PWD (cargo build --release)" >&2; exit 2; }
    ranks=${RANKS:-$(ranks_of "$GRID")}
    read -ra mpirun_args <<<"${MPIRUN_ARGS:-}"
    read -ra program_args <<<"${ARGS:-}"

    # The batch system warns this script only. mpirun passes SIGUSR1 on to all ranks and waits for them; after SIGTERM it would
    # kill them within seconds, whatever they still have to save.
    pid='' asked='' again=1
    trap 'asked=1 again=1; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || true' USR1 TERM
    mpirun "${mpirun_args[@]}" -n "$ranks" "$program" train "$CONFIG" --grid "$GRID" --out "$OUT" --resume "$@" \
        "${program_args[@]}" &
    pid=$!
    # A signal interrupts `wait`, whose result is then the signal's and not mpirun's.
    while [ -n "$again" ]; do
        again='' code=0
        wait "$pid" || code=$?
    done

    # 75: stopped and saved. Where the batch system wants the nodes back, any failure is taken for its doing: it may end the
    # daemons of mpirun on other nodes before the run has left.
    if [ "$code" = 75 ] || { [ "$code" != 0 ] && { [ -n "$asked" ] || taken_away; }; }; then
        echo "batch: stopped with code $code; $OUT has what is needed to go on"
        requeue || echo "batch: the job cannot be queued again; submit it by hand, and it goes on" >&2
    fi
    exit "$code"
}
