#!/usr/bin/env bash
# Makes the environment with the dev extras and runs the tests: all of them, or those named.
#
#   bash launch/test.sh [pytest arguments]        TEST_WORKERS=2 test processes by default
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

make_environment dev
# Tests that need ranks start them themselves; one thread each keeps two cores from thrashing.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
has_gpu || export DS_ACCELERATOR=cpu
say "run the tests"
code=0
"$VENV/bin/python" -m pytest -q -rs -n "${TEST_WORKERS:-2}" --dist worksteal "$@" </dev/null || code=$?
if [ "$code" -ne 0 ]; then
  fail "run the tests (pytest ended with $code)" \
    "the summary above names the tests; run one alone: bash launch/test.sh -n 0 tests/FILE.py"
fi
say "all tests passed in $SECONDS s"
