#!/usr/bin/env bash
# Makes .venv with the tested versions and looks at the machine; quick if it is there.
#
#   bash launch/install.sh          then: source .venv/bin/activate
#
# Settings: PYTHON (default python3), VENV (default .venv), TORCH_INDEX_URL (an index with another
# build of torch, for example the CPU one).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

make_environment base
say "ready: source $VENV/bin/activate, then dist-ft --help"
