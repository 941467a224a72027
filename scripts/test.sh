#!/usr/bin/env bash
# Installs what is missing, then runs the linter, the formatter's check, the type checker and the tests.
# Arguments go to pytest: bash scripts/test.sh tests/ops -k permute
# Uses the active virtual environment, else .venv, which is made if it is not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
    python_fits "$python" || fail "the active virtual environment $VIRTUAL_ENV has no Python 3.10 to 3.12; deactivate it and run this again"
else
    found="$(find_python)"
    make_venv .venv "$found"
    python="$PWD/.venv/bin/python"
fi
install_into "$python" dev

say "versions"
"$python" - <<'PY'
import platform
from importlib.metadata import version

print("python", platform.python_version(), "on", platform.machine())
for name in ("torch", "megatron-core", "numpy", "pytest", "ruff", "mypy"):
    print(name, version(name))
PY

say "ruff check"
"$python" -m ruff check .
say "ruff format --check"
"$python" -m ruff format --check .
say "mypy"
"$python" -m mypy
say "the other lines of megatron-core, for tests/lines"
"$python" scripts/megatron_lines.py install
if "$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")'; then
    say "the simulated NPU, for tests/sim"
    "$python" -m fluid_npu sim build
else
    say "tests/sim is left out: the simulated NPU is built for torch 2.13.0 alone"
    set -- "${without_simulator[@]}" "$@"
fi
say "pytest"
# A test that was skipped tested nothing: it fails here. Tests for other hardware are deselected and counted instead.
export FLUID_FORBID_SKIPS=1
exec "$python" -m pytest --durations=15 "$@"
