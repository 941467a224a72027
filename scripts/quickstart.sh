#!/usr/bin/env bash
# From a fresh clone to a trained model: makes .venv, installs everything, trains mixtral-tiny on two processes.
# Run it again at any time: what is there already is kept. Arguments go to `fluid-npu train`.
#
#   bash scripts/quickstart.sh [--steps 100 ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

say "1/3 Python"
python="$(find_python)"
make_venv .venv "$python"
.venv/bin/python --version

say "2/3 packages"
install_into .venv/bin/python plot
.venv/bin/python -c 'from importlib.metadata import version as v; print("torch", v("torch"), "megatron-core", v("megatron-core"))'

say "3/3 training: fluid-npu train --preset mixtral-tiny $*"
code=0
.venv/bin/fluid-npu train --preset mixtral-tiny "$@" || code=$?
if ((code != 0)); then
    printf '\nerror: the training ended with exit code %s; the reason stands above, the codes in: .venv/bin/fluid-npu --help\n' "$code" >&2
    exit "$code"
fi
printf '\nNext: source .venv/bin/activate, then fluid-npu --help, or docs/QUICKSTART.md.\n'
