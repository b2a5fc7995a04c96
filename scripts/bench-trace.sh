#!/usr/bin/env bash
# What a trace costs: step times of 4x2 ranks with emulated compute of 10 + 20 ms over those without a trace, in alternating pairs: where
# all measured steps are traced, and where the trace of the first ones is put together and written beside the others.
#   scripts/bench-trace.sh [--pairs N] [--short]     about two minutes; --short only tries whether it works
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pairs=5 steps=40
while [ $# -gt 0 ]; do
    case $1 in
        --pairs) pairs=${2:?"--pairs needs a number"}; shift ;;
        --short) pairs=1 steps=28 ;;
        *) echo "bench-trace: $1 is not known" >&2; exit 2 ;;
    esac
    shift
done

cargo build --release --quiet
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# step NAME ARGUMENTS...: the seconds of a step.
step() {
    local out=$folder/$1
    shift
    timeout 120 mpirun -n 8 --oversubscribe --bind-to none target/release/ouroboros bench configs/scaling.toml --grid 4x2 \
        --emulated-compute 10,20 --steps "$steps" --out "$out" "$@" >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; return 1; }
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["step_s"])' "$out/bench.json"
}

# The ratio of two numbers, and the median of some.
over() { awk -v on="$1" -v off="$2" 'BEGIN { printf "%.4f", on / off }'; }
median() { printf '%s\n' "$@" | sort -n | awk '{ a[NR] = $1 } END { print NR % 2 ? a[(NR + 1) / 2] : (a[NR / 2] + a[NR / 2 + 1]) / 2 }'; }

traced=() written=()
for ((pair = 1; pair <= pairs; pair++)); do
    # Who goes first takes turns.
    if ((pair % 2)); then off=$(step off); fi
    on=$(step on --trace "4..$((steps - 2))")
    beside=$(step beside --trace 1..5)
    if ((pair % 2 == 0)); then off=$(step off); fi
    traced+=("$(over "$on" "$off")") written+=("$(over "$beside" "$off")")
    echo "pair $pair: off $off s, traced $on s, ratio ${traced[-1]}; written beside $beside s, ratio ${written[-1]}"
done
for what in traced written; do
    declare -n ratios=$what
    found=$(median "${ratios[@]}")
    echo "bench-trace: $what: a step takes $found times as long (median of $pairs pairs; 1.02 at most is wanted)"
    if [ "$pairs" -gt 1 ] && awk -v found="$found" 'BEGIN { exit !(found > 1.02) }'; then exit 1; fi
done
