#!/usr/bin/env bash
# Makes the virtual environment that a lock describes: scripts/setup.sh PYTHON VENV LOCK [packages]. `make setup`
# calls it. With `packages` the project itself is left out: images install it in a layer of its own.
set -euo pipefail
python=$1 venv=$2 lock=$3 what=${4:-all}
pytorch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
  echo "setup: $1" >&2
  exit 1
}

# Locks are complete, so nothing is resolved: a resolve on a CPU machine would take the CUDA build of torch.
install() {
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile "$@"
}

command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or 3.12, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old: name a Python 3.11 or 3.12 with PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)"

"$python" -m venv --clear "$venv"

torch=$(grep '^torch==' "$lock")
if [[ $torch == *+cpu ]] && ! install "$torch" 2>/dev/null; then
  echo "setup: $torch is not on the configured package index, taking it from $pytorch_cpu_index"
  install --index-url "$pytorch_cpu_index" "$torch" ||
    fail "no $torch for $("$venv/bin/python" --version) there: see pip's words above"
fi
install --requirement "$lock"
[[ $what == packages ]] || install --no-build-isolation --editable .

# All cores compile at once, where pip uses one. Some packages ship files for newer Pythons only, which pip
# passes over as well; hence no failure.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
echo "setup: $venv holds $("$venv/bin/python" --version) and $lock"
