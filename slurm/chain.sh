#!/usr/bin/env bash
# Submits a long run as several jobs, one after the other; each goes on where the last one ended,
# whatever became of it, and ends at once when the run is done. For clusters without requeue.
#
#   bash slurm/chain.sh JOBS [sbatch options] slurm/train.sbatch RECIPE [key=value ...]
set -euo pipefail

if [ $# -lt 3 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
jobs="$1"
shift
previous=""
for _ in $(seq "$jobs"); do
  previous="$(MAX_REQUEUES=0 sbatch --parsable ${previous:+--dependency=afterany:$previous} "$@")"
  previous="${previous%%;*}"
  echo "submitted $previous"
done
