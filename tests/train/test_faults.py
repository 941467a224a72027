"""A rank that dies or hangs ends the run in time, by name; the run then continues as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from fluid_npu.train.checkpoint_files import latest_checkpoint
from fluid_npu.train.config import TrainConfig
from tests.support.training import flags, start_cli, tiny

COMMON = {"steps": 40, "checkpoint_every": 8}
# Delayed exchanges, so that a kill at any moment hits the wait for one, and long before the last step.
DELAY_MS = 25.0


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has recorded that step."""
    path = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-3000:]}")


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The worker of that rank."""
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process of rank {rank}")


def run_to_end(config: TrainConfig) -> dict[str, object]:
    process = start_cli("train", *flags(config), "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-3000:]
    assert f"step {config.steps}/{config.steps}" in err
    summary: dict[str, object] = json.loads(out)  # nothing else is on standard output
    return summary


def losses(config: TrainConfig) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, int, str, float]:
    """A run whose rank 1 was killed after its first checkpoint: configuration, exit code, errors, seconds."""
    config = tiny(tmp_path_factory.mktemp("killed"), **COMMON, plant_delay_ms=DELAY_MS)
    process = start_cli("train", *flags(config))
    wait_for_step(config, 10, process)
    workers = psutil.Process(process.pid).children()
    rank_process(process, 1).send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, err = process.communicate(timeout=120)
    seconds = time.monotonic() - start
    assert not any(worker.is_running() for worker in workers)
    return config, process.returncode, err, seconds


def test_the_others_stop_in_time_and_name_what_they_waited_for(killed: tuple[TrainConfig, int, str, float]) -> None:
    config, code, err, seconds = killed
    assert code == 4
    assert seconds < config.timeout
    assert "rank 1 (pid" in err and "SIGKILL" in err
    complaint = next(line for line in err.splitlines() if "waited for rank 1" in line)
    # The kill may fall on any exchange of a step, so each must name itself and not only the phase that it is part of.
    found = re.search(
        r"rank 0: (.+) \(collective \d+\) failed after .*waited for rank 1: rank 1 \(pid \d+\) has not", complaint
    )
    assert found is not None, complaint
    assert found.group(1) not in ("forward and backward", "text generation"), complaint
    assert "Traceback" not in err


def test_resuming_a_killed_run_equals_an_unbroken_one(
    killed: tuple[TrainConfig, int, str, float], tmp_path: Path
) -> None:
    config = killed[0]
    unbroken = tiny(tmp_path, **COMMON)
    expected = run_to_end(unbroken)
    resumed = run_to_end(tiny(config.out, **COMMON, resume=True))
    assert resumed["loss_last"] == expected["loss_last"]
    assert losses(config) == losses(unbroken)
    last = [latest_checkpoint(Path(c.out) / "checkpoints") for c in (config, unbroken)]
    assert last[0] is not None and last[1] is not None
    shards = sorted(last[0].glob("*.distcp"))
    assert shards
    for file in shards:
        assert file.read_bytes() == (last[1] / file.name).read_bytes()


def test_a_stuck_rank_is_named_and_ended(tmp_path: Path) -> None:
    # So long may one rank come later than the other at the start too.
    process = start_cli("train", *flags(tiny(tmp_path, steps=5000, timeout=8.0)))
    wait_for_step(tiny(tmp_path), 2, process)
    workers = psutil.Process(process.pid).children()
    rank_process(process, 1).send_signal(signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "waited for rank 1: rank 1 (pid" in err
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: int, code: int) -> None:
    process = start_cli("train", *flags(tiny(tmp_path, steps=5000)))
    launcher = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while len(launcher.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    workers = launcher.children()
    assert len(workers) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    psutil.wait_procs(workers, timeout=60)
    assert process.returncode == code, err
    assert not any(worker.is_running() for worker in workers)
