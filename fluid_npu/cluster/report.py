"""A checked job as text for people and as plain data for machines."""

from __future__ import annotations

from typing import Any

from fluid_npu.cluster.checks import Checked
from fluid_npu.cluster.memory import GIB, Estimate
from fluid_npu.cluster.problem import Problem


def as_text(checked: Checked) -> str:
    """Sizes, model, memory of each stage, problems."""
    lines = [_sizes(checked), f"flags of Megatron-LM {checked.megatron.value} ({checked.megatron.reason})"]
    if checked.plan.args.of_mindspeed:
        lines.append(f"flags of MindSpeed, which must be installed: {', '.join(checked.plan.args.of_mindspeed)}")
    if checked.estimates:
        lines += [_model(checked), *_memory(checked)]
    for level in ("warning", "error"):
        lines += [f"{level}: {problem.text()}" for problem in checked.problems if problem.level == level]
    count = len(checked.errors)
    lines.append("check: no errors" if not count else f"check: {count} error{'s' if count > 1 else ''}")
    return "\n".join(lines)


def as_dict(checked: Checked) -> dict[str, Any]:
    """The same as plain data; bytes are whole numbers."""
    plan = checked.plan
    names = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "edp", "micro_batch", "micro_batches", "global_batch")
    return {
        "ranks": plan.cluster.world,
        "sizes": {name: getattr(plan, name) for name in names},
        "megatron": {"line": checked.megatron.value, "reason": checked.megatron.reason},
        "parameters": plan.model.total_params() if checked.estimates else None,
        "published": dict(checked.preset.published) if checked.preset is not None else {},
        "memory": [_estimate(one) for one in checked.estimates],
        "problems": [_problem(problem) for problem in checked.problems],
        "ok": not checked.errors,
    }


def _sizes(checked: Checked) -> str:
    plan, cluster = checked.plan, checked.plan.cluster
    interleaved = f" (VPP {plan.vpp})" if plan.vpp > 1 else ""
    return (
        f"{cluster.nodes} nodes x {cluster.per_node} devices = {cluster.world} ranks: TP {plan.tp}, PP {plan.pp}"
        f"{interleaved}, CP {plan.cp}, DP {plan.dp}; experts: EP {plan.ep}, ETP {plan.etp}, copies {plan.edp}; "
        f"{plan.micro_batches} micro-batches of {plan.micro_batch} x {plan.sequence} tokens, overlap {plan.overlap}"
    )


def _model(checked: Checked) -> str:
    model = checked.plan.model
    text = f"model: {model.total_params() / 1e9:.1f}B parameters, {model.active_params() / 1e9:.1f}B for a token"
    if checked.preset is not None and checked.preset.published:
        published = checked.preset.published
        text += (
            f" ({checked.preset.name} is published as {published['total'] / 1e9:g}B and {published['active'] / 1e9:g}B)"
        )
    return text


def _memory(checked: Checked) -> list[str]:
    plan = checked.plan
    names = list(checked.estimates[0].parts)
    head = ["stage", "layers", "in flight", *names, "total"]
    rows = [
        [str(one.stage), str(len(plan.stages[one.stage])), str(one.in_flight)]
        + [f"{one.parts[name] / GIB:.1f}" for name in names]
        + [f"{one.total / GIB:.1f}"]
        for one in checked.estimates
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    title = (
        f"memory of a device in GiB, estimated, of {plan.cluster.memory_gib:g} "
        f"(the busiest rank has {plan.cluster.imbalance:g} times the mean of rows):"
    )
    return [title, *table]


def _estimate(one: Estimate) -> dict[str, Any]:
    return {
        "stage": one.stage,
        "dense_params": one.dense_params,
        "expert_params": one.expert_params,
        "layers_in_flight": one.in_flight,
        "bytes": dict(one.parts),
        "total_bytes": one.total,
    }


def _problem(problem: Problem) -> dict[str, str]:
    return {
        "kind": problem.kind,
        "level": problem.level,
        "flag": problem.flag,
        "value": problem.value,
        "rule": problem.rule,
        "fix": problem.fix,
    }
