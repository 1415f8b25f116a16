#!/usr/bin/env bash
# Starts the ranks of a run on this node; the only place with rendezvous and thread settings.
#
#   bash launch/torchrun.sh train RECIPE [key=value ...] [--resume]
#
# Ends with the run's own exit code: 0 done, 1 failed, 2 bad recipe, 75 stopped after saving.
# SIGTERM and Ctrl-C ask all ranks to finish the step, save and end with 75.
#
# Settings (environment variables):
#   NPROC            ranks on this node; default: the GPUs, or 2 without one
#   OMP_NUM_THREADS  threads of a rank; default: cores / ranks
#   GRACE_S          seconds that ranks get to save before torchrun ends them, default 120
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface, for several nodes
#   NNODES, HEAD_NODE, MASTER_PORT, RUN_ID   several nodes: how many, the first one's name, a free
#                    port there, an id that all share (slurm/train.sbatch sets all four)
#   PYTHON           interpreter; default: .venv's, if it is there
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "${VENV:-$ROOT/.venv}/bin/python" ] && PYTHON="${VENV:-$ROOT/.venv}/bin/python"
fi
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit $(($# == 0 ? 2 : 0))
fi

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[^ ]'
  elif command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi -L 2>/dev/null | grep -c GPU
  else
    echo 0
  fi
}

GPUS="$(count_gpus)"
NNODES="${NNODES:-1}"
NPROC="${NPROC:-$((GPUS > 0 ? GPUS : 2))}"
CORES="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
for setting in NPROC NNODES; do
  case "${!setting}" in
    '' | *[!0-9]* | 0)
      echo "error: $setting must be a whole number above 0, got '${!setting}'" >&2
      exit 2
      ;;
  esac
done
if [ "$GPUS" -gt 0 ] && [ "$NPROC" -gt "$GPUS" ]; then
  echo "error: NPROC is $NPROC but there are $GPUS GPUs: a GPU holds one rank" >&2
  exit 2
fi

# A bad recipe ends here, before any rank starts.
if [ "$1" = train ]; then
  words=()
  for word in "${@:2}"; do [[ "$word" == --* ]] || words+=("$word"); done
  if ! report="$("$PYTHON" -m dist_ft check ${words[@]+"${words[@]}"} 2>&1)"; then
    printf '%s\n' "$report" >&2
    exit 2
  fi
fi

# All ranks' threads together are as many as the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES / NPROC > 0 ? CORES / NPROC : 1))}"
# torch 2.13: a restarted rank would read the addresses of the attempt before (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
if [ "$GPUS" -eq 0 ]; then
  # DeepSpeed guesses by installed packages, not by devices.
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

if [ "$NNODES" -eq 1 ]; then
  # Port 0: a free one, so that several runs share a machine.
  meeting=(--rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 --rdzv-id "${RUN_ID:-$$}")
else
  : "${HEAD_NODE:?several nodes need HEAD_NODE, the name of the first one}"
  meeting=(--rdzv-endpoint "$HEAD_NODE:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-dist_ft}")
fi

exit_file="$(mktemp)"
export DIST_FT_EXIT_FILE="$exit_file"
# USR1 asks the ranks to save and end; torchrun, which would die of it, inherits that it's ignored.
# (Slurm sends it to every process of a step: then it comes to the ranks without us.)
trap '' USR1
# A process group of its own: Ctrl-C comes to this script alone, and each rank is asked once.
set -m
"$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" \
  --rdzv-backend c10d "${meeting[@]}" --max-restarts 0 --shutdown-timeout "${GRACE_S:-120}" \
  -m dist_ft "$@" &
agent=$!
set +m

watchdog=""
ask_to_stop() {
  # torchrun's children are the ranks. Without pkill torchrun passes a TERM on, less quietly.
  pkill -USR1 -P "$agent" 2>/dev/null || kill -TERM "$agent" 2>/dev/null
  # A rank that didn't hear it (it was still starting) or hangs is told by torchrun.
  [ -n "$watchdog" ] || { sleep "${GRACE_S:-120}" && kill -TERM "$agent"; } 2>/dev/null &
  watchdog="${watchdog:-$!}"
}
trap ask_to_stop TERM INT HUP
trap 'rm -f "$exit_file"; [ -z "$watchdog" ] || pkill -P "$watchdog" 2>/dev/null' EXIT

code=0
wait "$agent" || code=$?
# A trapped signal ends `wait` early; the ranks are still saving.
while kill -0 "$agent" 2>/dev/null; do
  code=0
  wait "$agent" || code=$?
done
written="$(cat "$exit_file")"
case "$written" in
  2 | 75) exit "$written" ;;
  *) exit $((code == 0 ? 0 : 1)) ;;
esac
