"""Small changes of the engine's order are noticed: a sample here, all of them nightly (scripts/mutants.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mutation import ROOT, all_mutants, mutated

#: One of each sort, by the text of its line: what is changed, and who must notice.
SAMPLE = {
    "self._source is let go": "checker",
    "all_to_all.py:* wait: flight.land() does not wait": "checker",
    "moe_layer.py:* wait: handle.wait() does not wait": "checker",
    "dispatch_plan.py:* order: host = received.cpu() before work.wait()": "checker",
    "all_to_all.py:* hook: without self.sink.fill": "value",
    "scheduler.py:* queue: no task is carried": "value",
    "router.py:* acknowledgement: without weight.grad_added_to_main_grad": "value",
}


def matching(text: str) -> list:
    parts = text.split("*")
    return [mutant for mutant in all_mutants() if all(part in str(mutant) for part in parts)]


def test_the_list_covers_the_engine() -> None:
    mutants = all_mutants()
    assert len(mutants) >= 30
    assert {mutant.kind for mutant in mutants} >= {
        "wait",
        "event",
        "keep-alive",
        "acknowledgement",
        "hook",
        "queue",
        "order",
    }
    for mutant in mutants:
        original = (ROOT / mutant.path).read_text(encoding="utf-8")
        compile(mutated(mutant), mutant.path, "exec")
        assert (ROOT / mutant.path).read_text(encoding="utf-8") == original


@pytest.fixture(scope="module")
def tool():
    import importlib.util

    spec = importlib.util.spec_from_file_location("mutants_tool", ROOT / "scripts" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants_tool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(tool) -> list:
    """Of the unchanged engine, whose record is clean and which gives the same twice."""
    return tool.baseline()


@pytest.mark.parametrize("text", SAMPLE)
def test_a_mutant_is_noticed(text: str, tool, expected: list) -> None:
    mutant = matching(text)[0]
    verdict = tool.judge(mutant, expected)
    assert verdict.by == SAMPLE[text], verdict


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_no_mutant_survives(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "scripts/mutants.py", "run", "--out", str(tmp_path / "table")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_unknown_text_is_refused() -> None:
    command = [sys.executable, "scripts/mutants.py", "run", "--only", "no such line"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--only 'no such line': no mutant's line contains it" in done.stderr
