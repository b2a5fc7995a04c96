#!/usr/bin/env bash
# The batch scripts under a real Slurm: a controller and two nodes on this host, for as long as the test takes (one to two
# minutes). A job is stopped by a signal, then by its time limit; each time it saves, is queued again and goes on, and ends with
# the digits of an undisturbed run. Needs Debian's slurm-wlm and munge, which it installs if root; else it leaves with 0.
#   OUROBOROS=/path/to/ouroboros scripts/test-slurm.sh      tests that program instead of building one
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

steps=${STEPS:-2000} # a run of 10 to 30 s

skip() { echo "test-slurm: skipped: $*"; exit 0; }

# Daemons that the packages bring must not start.
install_slurm() {
    local policy=/usr/sbin/policy-rc.d code=0
    if [ -e "$policy" ]; then policy=''; else printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"; fi
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge; } \
        >"$work/apt.log" 2>&1 || code=$?
    [ -z "$policy" ] || rm -f "$policy"
    return "$code"
}

has_slurm() {
    local tool
    # Debian has the daemons where only root looks.
    PATH=$PATH:/usr/sbin:/sbin
    for tool in munged slurmctld slurmd sbatch; do type -P "$tool" >/dev/null || return 1; done
}

daemons=()
clean_up() {
    local code=$? log pid
    trap - EXIT
    if [ "$code" != 0 ]; then
        for log in "$work"/*.out; do
            [ ! -s "$log" ] || { echo "--- the end of ${log##*/}"; tail -n 20 "$log"; }
        done >&2
        [ "${#daemons[@]}" = 0 ] || timeout 10 squeue --format='%i %T %r' >&2 || true
    fi
    # The processes of jobs end with their jobs, not with the daemons.
    if [ "${#daemons[@]}" -gt 1 ]; then
        timeout 10 squeue --noheader --format=%A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null || true
        within 20 no_jobs || true
    fi
    # The last one first.
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        pid=${daemons[i]}
        kill "$pid" 2>/dev/null || continue
        within 10 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
    done
    for pid in $(strays); do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$work"
    exit "$code"
}

# What is left of jobs: processes that know this Slurm's configuration.
strays() {
    env -u SLURM_CONF grep -lsazx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | cut -d/ -f3
}

gone() { ! kill -0 "$1" 2>/dev/null; }
no_jobs() { [ -z "$(timeout 10 squeue --noheader 2>/dev/null)" ]; }

# within SECONDS COMMAND...: waits until the command succeeds.
within() {
    local limit=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$limit" ] || return 1
        sleep 0.2
    done
}

fail() { echo "test-slurm: FAILED: $*" >&2; exit 1; }

# daemon NAME COMMAND...: starts it, to be stopped by its process id. In a session of its own: Ctrl-C is for this script, which
# needs the daemons to end their jobs.
daemon() {
    local name=$1
    shift
    setsid "$@" >"$work/$name.out" 2>&1 &
    daemons+=($!)
}

free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)) && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

start_slurm() {
    local user
    user=$(id -un)
    # A key and a socket of its own: a munge of this host goes on undisturbed.
    (umask 077 && head -c 1024 /dev/urandom >"$work/munge.key")
    daemon munged munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
        --pid-file="$work/munged.pid" --log-file=/dev/null --seed-file="$work/munged.seed"
    within 10 test -S "$work/munge.socket" || fail "munged has not started"

    # cred_expire is also how long Slurm keeps a job that was queued again from starting: 120 s by default. The scheduler looks
    # every second, not every 30 or 60. config_overrides: nodes are believed to have two cores.
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$work/state
SlurmctldPidFile=$work/slurmctld.pid
SlurmctldLogFile=/dev/null
SlurmdSpoolDir=$work/%n
SlurmdPidFile=$work/%n.pid
SlurmdLogFile=/dev/null
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
KillWait=5
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END
    mkdir "$work/state" "$work/node1" "$work/node2"
    daemon slurmctld slurmctld -D -c
    within 20 controller_answers || fail "slurmctld has not started"
    daemon node1 slurmd -D -N node1
    daemon node2 slurmd -D -N node2
    within 30 nodes_idle || fail "the nodes are not idle: $(sinfo --Node --long 2>&1)"
}

controller_answers() { timeout 5 scontrol ping 2>/dev/null | grep -q ' UP'; }
nodes_idle() { [ "$(timeout 5 sinfo --noheader --format='%D %t' 2>/dev/null)" = "2 idle" ]; }

field() { scontrol show job --oneliner "$1" | sed -n "s/.* $2=\([^ ]*\).*/\1/p"; }

# in_state JOB STATE: whether it is; fails if it never will be.
in_state() {
    local state
    state=$(field "$1" JobState)
    case "$state" in
        "$2") return 0 ;;
        PENDING | RUNNING | COMPLETING | CONFIGURING | REQUEUED) return 1 ;;
        *) fail "job $1 is $state, not $2" ;;
    esac
}
restarted() { [ "$(field "$1" Restarts)" = "$2" ] && in_state "$1" PENDING; }
steps_done() { [ -e "$1/metrics.jsonl" ] && [ "$(grep -c '"loss"' "$1/metrics.jsonl")" -ge "$2" ]; }

# The losses of a run's steps, which must be 1, 2, ... each once.
losses() {
    python3 - "$1/metrics.jsonl" <<'END'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
lines = [line for line in lines if "loss" in line]
steps = [line["step"] for line in lines]
assert steps == list(range(1, len(steps) + 1)), f"the steps are {steps}"
for line in lines:
    print(line["step"], repr(line["loss"]))
END
}

# same RUN RUN: every loss and every byte of the last states.
same() {
    local name
    losses "$1" >"$work/losses.1"
    losses "$2" >"$work/losses.2"
    [ "$(wc -l <"$work/losses.1")" = "$steps" ] || fail "$1 has $(wc -l <"$work/losses.1") losses"
    diff "$work/losses.1" "$work/losses.2" >"$work/losses.diff" || fail "losses differ: $(head -n 6 "$work/losses.diff")"
    diff <(cd "$1/checkpoints/step-$steps" && ls) <(cd "$2/checkpoints/step-$steps" && ls) || fail "the states have other files"
    for name in "$1/checkpoints/step-$steps"/*.safetensors; do
        cmp "$name" "$2/checkpoints/step-$steps/${name##*/}" || fail "the states differ"
    done
}

# This test may itself run in a job, or where variables have been set for one.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!OMPI_MCA_@}" RANKS GRIDS ARGS
work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf
trap clean_up EXIT
trap "exit 143" INT TERM HUP
if ! has_slurm; then
    if [ "$(id -u)" != 0 ] || ! type -P apt-get >/dev/null; then skip "slurm-wlm and munge are missing"; fi
    say "packages: slurm-wlm munge"
    { install_slurm && has_slurm; } || skip "slurm-wlm and munge cannot be installed: $(tail -n 1 "$work/apt.log")"
fi
if [ -z "${OUROBOROS:-}" ]; then
    cargo build --release --quiet
    OUROBOROS=$root/target/release/ouroboros
fi
export OUROBOROS
# Both nodes are this host, and Open MPI would have the shared memory of its ranks twice under the same names.
export MPIRUN_ARGS="--mca btl self,tcp --mca btl_tcp_if_include lo --mca oob_tcp_if_include lo"

cat >"$work/tiny.toml" <<END
name = "tiny"
steps = $steps
batch = 24
[model]
layers = 6
d_model = 16
heads = 2
d_ff = 32
[data]
synthetic = 4000
sequence = 8
[optimizer]
lr = 1e-2
warmup = 2
[checkpoint]
every = 300
END
export CONFIG=$work/tiny.toml GRID=2x2

say "a Slurm of two nodes"
start_slurm
sinfo --version

say "a job that fails is not queued again"
job=$(CONFIG=$work/none.toml OUT=$work/none sbatch --parsable --output="$work/none.out" scripts/slurm/train.sbatch)
within 60 in_state "$job" FAILED || fail "the job has not failed"
[ "$(field "$job" Restarts) $(field "$job" ExitCode)" = "0 2:0" ] \
    || fail "the job was queued again, or has another exit code than 2"

say "stopped by a signal, stopped by its time limit, each time queued again"
# The margin leaves the second launch 6 s of its minute; the others have ten minutes.
job=$(OUT=$work/job STOP_MARGIN=54 sbatch --parsable --time=10 --signal=B:USR1@2 --output="$work/job.out" scripts/slurm/train.sbatch)
within 60 steps_done "$work/job" 20 || fail "the job does not train"
scancel --signal=USR1 --batch "$job"
within 30 restarted "$job" 1 || fail "the job was not queued again after SIGUSR1"
scontrol update JobId="$job" TimeLimit=1
within 60 restarted "$job" 2 || fail "the job was not queued again before its time limit"
scontrol update JobId="$job" TimeLimit=10
within 240 in_state "$job" COMPLETED || fail "the job has not ended"
grep -E 'the run stops|^stopped at|no checkpoint|resuming at' "$work/job.out" || true
for reason in "SIGUSR1 at " "the end of the batch job is 54 s away"; do
    grep -q "$reason" "$work/job.out" || fail "no launch was stopped by: $reason (a fast machine? STEPS=10000 $0)"
done

say "the same run, undisturbed"
"$OUROBOROS" train "$CONFIG" --grid "$GRID" --transport local --out "$work/undisturbed" >"$work/undisturbed.out" 2>&1
same "$work/job" "$work/undisturbed"

say "an array of two grids, one of them stopped"
array=$(GRIDS="1x1 2x1" OUT=$work/sweep ARGS="--set steps=400" sbatch --parsable --array=0-1 --ntasks=2 --time=10 \
    --output="$work/sweep-%a.out" scripts/slurm/sweep.sbatch)
within 60 steps_done "$work/sweep/2x1" 20 || fail "task 1 of the array does not train"
scancel --signal=USR1 --batch "${array}_1"
for task in 0 1; do
    within 120 in_state "${array}_$task" COMPLETED || fail "task $task of the array has not ended"
    [ "$(field "${array}_$task" Restarts)" = "$task" ] || fail "task $task was restarted $(field "${array}_$task" Restarts) times"
done
steps_done "$work/sweep/1x1" 400 && steps_done "$work/sweep/2x1" 400 || fail "a grid of the array has not all its steps"

echo
echo "test-slurm: passed in $SECONDS s: $steps losses and the last state are those of the undisturbed run"
