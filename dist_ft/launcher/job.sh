#!/usr/bin/env bash
# What a Slurm job does, on its first node: starts the launcher on every node, saves and requeues
# itself when it is pre-empted or its time is up. `dist-ft slurm` and slurm/*.sbatch end in it.
#
#   bash job.sh RECIPE [key=value ...]
#
# Settings (environment variables):
#   PYTHON         interpreter that has dist_ft, on a disk that all nodes see
#   MAX_REQUEUES   how often the job may be requeued, default 20
#   MAX_IDLE_REQUEUES  after how many requeues in a row without a step of progress it gives up,
#                  default 3: the time limit or the checkpoint interval doesn't suffice
#   MAX_RESTARTS   how often ranks that failed are started again before the job fails, default 3
#   NPROC          ranks on a node; default: its GPUs, or 2 without one
#   GRACE_S        seconds that ranks get to save, default 120
#   CHECK_NODES=1  look at every node first (dist-ft doctor --node); the job is requeued without
#                  broken ones, and fails if they can't be looked at
#   LISTEN_S       seconds after the start before which a request to stop is not passed on: no launcher
#                  listens yet; default 10
#   WAIT_KILL_S    seconds after the first node ended until the others are killed, default 60
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface, if nodes can't find each other
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "error: no recipe: give RECIPE [key=value ...]" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?this runs inside a Slurm job: sbatch}"
PYTHON="${PYTHON:-python3}"
restarts="${SLURM_RESTART_COUNT:-0}"
# Of an array only this task: the bare job id of the last one means all of them.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
# By name, not by address: a host often looks itself up as 127.0.1.1.
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
[ -n "$HEAD_NODE" ] || { echo "error: scontrol names no node" >&2; exit 1; }
# Two jobs on one node must not meet, nor whoever lets the system choose a port: from 32768 on.
port=$((20000 + SLURM_JOB_ID % 12000))
# Whatever tasks the job was submitted with: one launcher on each node, with all cores of the node's
# tasks. Slurm 22.05 to 23.02 don't hand --cpus-per-task to srun.
one_each=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
export SRUN_CPUS_PER_TASK=$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))

# Until there are ranks that could save: a signal must neither end this script nor be lost.
asked_to_stop=""
trap 'asked_to_stop=yes' USR1 TERM

say() { echo "== $(date +%FT%T) job $job attempt $restarts: $*"; }

# A controller that is busy or starts again does not answer for a while.
patiently() {
  local pause
  for pause in 1 2 4 8 15 30 0; do
    "$@" && return
    sleep "$pause"
  done
  return 1
}

# Not after a scancel, which requeueing would undo, and not where Slurm requeues by itself, after a
# lost node: the job is COMPLETING then. So it is when its time was over before all had saved.
is_ours() { [[ "$1" == *" JobState=RUNNING "* || "$1" == *" Reason=TimeLimit "* ]]; }

# requeue WHY [NODES]: ends this script if the job is requeued; without NODES, if there are any.
requeue() {
  local shown
  if ! shown=" $(patiently scontrol -o show job "$job") "; then
    say "$1, but Slurm does not tell whether the job is still ours, so it is not requeued: type" \
      "'scontrol requeue $job' when Slurm answers again, or submit the same script to go on" >&2
    return
  fi
  if ! is_ours "$shown"; then
    say "$1; left to Slurm, which has cancelled or requeued the job itself"
    return
  fi
  if [ "$restarts" -ge "${MAX_REQUEUES:-20}" ]; then
    say "$1, but not requeued any more: submit the same script to go on" >&2
    return
  fi
  if [ -n "${2:-}" ]; then
    requeue_without "$2" "$1" "$shown" && exit 0
  else
    say "$1; requeued"
    patiently scontrol requeue "$job" && exit 0
  fi
  say "$1, but Slurm refused to requeue it: submit the same script to go on" >&2
}

leave_out() { scontrol update JobId="$job" ExcNodeList="$1"; }

# requeue_without NODES WHY SHOWN: a job can leave nodes out only while it waits, so it is held
# meanwhile. Slurm ends this script for it: at first by TERM, which a shell of its own ignores.
requeue_without() (
  trap '' TERM USR1 HUP
  excluded="${3##* ExcNodeList=}"
  excluded="${excluded%% *}"
  # Those that were left out before stay so: an update replaces the list.
  [[ "$3" == *" ExcNodeList="* && "$excluded" != "(null)" ]] && all="$excluded,$1" || all="$1"
  say "$2; requeueing without them; if the job stays held: 'scontrol release $job'"
  patiently scontrol requeuehold "$job" || exit 1
  # Twice and not for long: this must come to the release before Slurm kills it.
  if leave_out "$all" || leave_out "$all"; then
    say "$2; requeued without $all"
  else
    say "$2; requeued, but Slurm did not leave them out: 'scontrol update JobId=$job" \
      "ExcNodeList=$all' does it while the job waits" >&2
  fi
  patiently scontrol release "$job" ||
    say "the job is held: 'scontrol release $job' lets it start again" >&2
)

check_nodes() {
  local answer broken code=0
  # One line of each broken node: its name.
  answer="$(srun "${one_each[@]}" bash -c \
    '"$0" -m dist_ft doctor --node >&2 || echo "$SLURMD_NODENAME"' "$PYTHON")" || code=$?
  broken="$(sort -u <<<"$answer" | sed '/^$/d' | paste -sd, -)"
  if [ -n "$broken" ]; then
    requeue "broken nodes: $broken" "$broken"
    exit 1
  fi
  [ "$code" = 0 ] && return
  # Pre-empted meanwhile; Slurm signals the step alone.
  [ "$code" = 143 ] && asked_to_stop=yes
  if [ -n "$asked_to_stop" ]; then
    requeue "asked to stop before it began"
    exit 75
  fi
  say "the nodes could not be looked at, srun ended with $code: mend what it says above, or submit" \
    "without CHECK_NODES=1" >&2
  exit 1
}

[ "${CHECK_NODES:-0}" != 1 ] || check_nodes

code=0
"$PYTHON" -m dist_ft slurm-start --job "$job" --max-idle "${MAX_IDLE_REQUEUES:-3}" "$@" || code=$?
if [ "$code" != 0 ]; then
  say "$([ "$code" = 2 ] && echo "bad recipe" || echo "not started")"
  exit "$code"
fi
if [ -n "$asked_to_stop" ]; then
  requeue "asked to stop before it began"
  exit 75
fi

options=(--nnodes "$SLURM_JOB_NUM_NODES" --head-node "$HEAD_NODE" --port "$port"
  --max-restarts "${MAX_RESTARTS:-3}" --grace-s "${GRACE_S:-120}")
[ -n "${NPROC:-}" ] && options+=(--nproc "$NPROC")
say "on $SLURM_JOB_NODELIST: train $*"

# When launchers listen. Not by this shell's clock, which may jump.
sleep "${LISTEN_S:-10}" >/dev/null 2>&1 &
listening=$!

stop() {
  asked_to_stop=yes
  say "asked to stop: the ranks save"
  wait "$listening"
  # To every process of the step: launchers and ranks take it as one request.
  scancel --quiet --signal=USR1 "$job"
}
trap stop USR1 TERM

# A launcher ignores USR1 until it listens; --resume starts from nothing if there is no checkpoint.
srun "${one_each[@]}" --kill-on-bad-exit=0 --wait="${WAIT_KILL_S:-60}" bash -c \
  'trap "" USR1; exec "$0" -m dist_ft launch --node-rank "$SLURM_NODEID" "$@"' \
  "$PYTHON" "${options[@]}" train "$@" --resume &
step=$!
wait "$step"
# A trapped signal ends `wait` early; the ranks are still saving.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step" || code=$?

case $code in
  75) requeue "saved" ;;
  143) requeue "asked to stop, and not all was saved" ;;
  0) say "done" ;;
  2) say "bad recipe" ;;
  *) [ -z "$asked_to_stop" ] || requeue "stopped" ;;
esac
exit "$code"
