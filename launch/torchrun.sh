#!/usr/bin/env bash
# Starts the ranks of a run on this node, and starts them again when one dies or hangs.
#
#   bash launch/torchrun.sh train RECIPE [key=value ...] [--resume]
#
# Ends with the run's own exit code: 0 done, 1 failed, 2 bad recipe, 75 stopped after saving.
# SIGTERM and Ctrl-C ask all ranks to finish the step, save and end with 75; a second one ends them.
# The ranks find RANK, WORLD_SIZE, MASTER_ADDR, ... as torchrun would set them. torchrun itself is
# not used: it keeps one store for all attempts, loses exit codes and leaves ranks behind.
#
# Settings (environment variables):
#   NPROC            ranks on this node; default: the GPUs, or 2 without one
#   MAX_RESTARTS     how often failed or hung ranks are started again, default 3
#   OMP_NUM_THREADS  threads of a rank; default: cores / ranks
#   GRACE_S          seconds that ranks get to save before they are ended, default 120
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface, for several nodes
#   NNODES, NODE_RANK, HEAD_NODE, MASTER_PORT   several nodes: how many, which one this is (from 0;
#                    Slurm says it), the first one's name and a free port there
#   PYTHON           interpreter; default: .venv's, if it is there
set -uo pipefail
# USR1 asks the ranks to save and end (Slurm sends it to every process of a step): it must find
# nobody here who would die of it before the launcher listens.
trap '' USR1

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "${VENV:-$ROOT/.venv}/bin/python" ] && PYTHON="${VENV:-$ROOT/.venv}/bin/python"
fi
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit $(($# == 0 ? 2 : 0))
fi

NNODES="${NNODES:-1}"
for setting in NPROC NNODES MAX_RESTARTS; do
  case "${!setting-1}" in
    '' | *[!0-9]*)
      echo "error: $setting must be a whole number above 0, got '${!setting}'" >&2
      exit 2
      ;;
  esac
done
options=(--nnodes "$NNODES" --max-restarts "${MAX_RESTARTS:-3}" --grace-s "${GRACE_S:-120}")
[ -n "${NPROC:-}" ] && options+=(--nproc "$NPROC")
if [ "$NNODES" -gt 1 ]; then
  : "${HEAD_NODE:?several nodes need HEAD_NODE, the name of the first one}"
  node="${NODE_RANK:-${SLURM_NODEID:-}}"
  : "${node:?several nodes need NODE_RANK, 0 on the first one}"
  options+=(--node-rank "$node" --head-node "$HEAD_NODE" --port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m dist_ft launch "${options[@]}" "$@"
