"""All checks of a job, one after the other: flags, then sizes, memory, environment and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fluid_npu.cluster import environment, files, flags, memory, preset_match, validate
from fluid_npu.cluster.plan import Cluster, Plan
from fluid_npu.cluster.problem import ERROR, Problem
from fluid_npu.train import exit_codes
from fluid_npu.train.presets import Preset, get_preset


class Line(NamedTuple):
    """A Megatron-LM version of ``flags.LINES`` and why it was taken (``Choice`` lives beside torch)."""

    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A job and what was found. ``estimates`` is empty when the sizes contradict each other."""

    plan: Plan
    preset: Preset | None
    megatron: Line
    estimates: Sequence[memory.Estimate]
    problems: Sequence[Problem]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == ERROR]

    @property
    def exit_code(self) -> int:
        if not self.errors:
            return exit_codes.OK
        return exit_codes.DATA if all(problem.kind == "file" for problem in self.errors) else exit_codes.USAGE


def check_job(
    words: Sequence[str],
    cluster: Cluster,
    *,
    preset: str,
    megatron: str,
    version: str,
    env: Mapping[str, str],
    look_for_files: bool = True,
) -> Checked:
    """Checks Megatron-LM's arguments ``words`` for a cluster.

    Args:
        preset: a name of ``PRESETS`` whose figures the flags should describe, or 'none'.
        megatron: the checkout, or ''.
        version: whose flags to expect where the checkout does not say it; '' for the oldest known.
        env: the environment that the job will see.

    Raises:
        PresetError: no such preset.
    """
    known = None if preset == "none" else get_preset(preset)
    line = choose_line(megatron, version)
    args, problems = flags.read(words, line.value)
    plan = Plan(cluster, args, known.vocab_size if known is not None else 1)
    problems += validate.machines(plan) + validate.check(plan)
    estimates: list[memory.Estimate] = []
    if not any(problem.level == ERROR for problem in problems):
        estimates = memory.estimate(plan, env if str(env.get("HCCL_BUFFSIZE", 1)).isdigit() else {})
        problems += memory.check(plan, estimates)
        problems += environment.check(plan, env)
        problems += preset_match.differences(plan, known) if known is not None else []
    if look_for_files:
        problems += files.check(plan, megatron)
    return Checked(plan=plan, preset=known, megatron=line, estimates=estimates, problems=problems)


def choose_line(megatron: str, version: str) -> Line:
    """The known Megatron-LM version whose flags are expected, and why."""
    found = files.version_of(megatron)
    if found is not None:
        return Line(flags.nearest_line(found), f"the checkout is {found}")
    if version:
        return Line(flags.nearest_line(version), f"--megatron-version {version}")
    return Line(flags.LINES[0], "no checkout to ask; this is the version that MindSpeed supports")
