"""What the pages show works today: snippets run, command lines parse, named files exist, tables are current."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.snippets import blocks, commands, named_files, run_snippets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "patches" / "README.md"]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, run_ranks: Callable[..., list[Any]]) -> None:
    snippets = blocks(page, "python")
    on_ranks = [snippet for snippet in snippets if "run_ranks" not in snippet.text]
    if on_ranks:
        run_ranks(2, run_snippets, on_ranks, sizes={"expert_model_parallel_size": 2})
    for snippet in snippets:
        if snippet not in on_ranks:
            exec(compile(snippet.text, snippet.where, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_command_lines_are_accepted_by_the_command_line(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fluid_npu.cli import build_parser
    from fluid_npu.train.cli import config_of

    for command in commands(page):
        words = [word for word in shlex.split(command) if word not in ("...", "PREFIX", "NAME")]
        if len(words) < len(shlex.split(command)) or set(words) & {"--help", "--version"}:
            continue
        try:
            args = build_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{name_of(page)}: fluid-npu {command}\n{capsys.readouterr().err}")
        if words[0] == "train":
            config_of(args)  # values too


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    gone = sorted(name for name in named_files(page) if not (ROOT / name).exists())
    assert not gone


@pytest.mark.parametrize("script", ["scripts/generate_tables.py", "scripts/generate_patch_docs.py"])
def test_generated_pages_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_names_of_the_pages_exist() -> None:
    import fluid_npu

    for page in PAGES:
        for snippet in blocks(page, "python"):
            for node in ast.walk(ast.parse(snippet.text)):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "fluid_npu"
                ):
                    assert node.attr in fluid_npu.__all__, snippet.where


def test_both_readmes_give_the_same_commands_and_code() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert set(commands(chinese)) <= set(commands(english))
    code = [[re.sub(r"#.*", "#", block.text) for block in blocks(page, "python")] for page in (english, chinese)]
    assert code[0] == code[1]


def test_the_example_script_trains_under_torchrun() -> None:
    losses, output = train_example("--steps", "6")
    assert losses[-1] < losses[0] - 0.3
    assert "decoder.layers.1.mlp" in output
    assert re.search(r"dW tasks +(\d+) of \1 done", output)


def train_example(*words: str) -> tuple[list[float], str]:
    """Losses and output of ``scripts/pretrain_moe.py`` on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "scripts/pretrain_moe.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step \d+ loss ([\d.]+)", done.stdout, re.M)], done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=name_of)
def test_shell_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
