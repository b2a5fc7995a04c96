#!/usr/bin/env bash
# Sourced by the batch scripts of Slurm: scripts/batch.sh, and what Slurm has to do with it.
source scripts/batch.sh

# A task of an array may have the whole array's number as its SLURM_JOB_ID.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Queues this job again, unless it was cancelled.
requeue() {
    [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || return 0
    scontrol requeue "$job"
}

# Whether this job is being preempted, of which Slurm tells the tasks but not this script (unless it is set to, see README.md).
taken_away() {
    scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'
}

# Slurm 22.05 and older ones do not tell jobs when they end. Without a time limit there is no end.
if [ -z "${SLURM_JOB_END_TIME:-}" ] && end=$(squeue --noheader --jobs="$job" --format=%e) \
    && end=$(date --date="$end" +%s 2>/dev/null); then
    export SLURM_JOB_END_TIME=$end
fi
