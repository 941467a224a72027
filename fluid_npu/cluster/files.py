"""Files that a node must have: data, tokenizer, Megatron-LM with its launch line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fluid_npu.cluster.plan import Plan
from fluid_npu.cluster.problem import Problem
from fluid_npu.megatron_lm.checkout import CheckoutError, open_checkout
from fluid_npu.megatron_lm.launch_patch import is_applied, patch_for


def check(plan: Plan, megatron: str) -> list[Problem]:
    """Every file that is missing on this machine."""
    return [*check_checkout(megatron), *_mindspeed(plan, megatron), *_data(plan), *_tokenizer(plan), *_load(plan)]


def version_of(megatron: str) -> str | None:
    """The version of a Megatron-LM checkout, or None where it cannot be read."""
    try:
        return open_checkout(Path(megatron)).version if megatron else None
    except CheckoutError:
        return None


def check_checkout(megatron: str) -> list[Problem]:
    """Whether there is a Megatron-LM that imports our adaptor."""
    return list(_checkout(megatron))


def _checkout(megatron: str) -> Iterator[Problem]:
    if not megatron:
        fix = "git clone https://github.com/NVIDIA/Megatron-LM at tag core_v0.12.1 and set MEGATRON to it"
        yield _problem("MEGATRON", "(not set)", "the Megatron-LM checkout is not named", fix)
        return
    try:
        checkout = open_checkout(Path(megatron))
        applied = is_applied(checkout, patch_for(checkout))
    except CheckoutError as error:
        rule, _, fix = str(error).partition(": ")[2].rpartition(";")
        yield _problem(
            "MEGATRON", megatron, rule or str(error), fix.strip() or "set MEGATRON to a Megatron-LM checkout"
        )
        return
    if not applied:
        rule = "its pretrain_gpt.py does not import fluid_npu.megatron_adaptor: this would be stock Megatron"
        yield _problem("MEGATRON", megatron, rule, f"run: fluid-npu megatron-lm apply {megatron}")


def _mindspeed(plan: Plan, megatron: str) -> Iterator[Problem]:
    """On an NPU something must map torch.cuda to it before Megatron is imported; our adaptor refuses to go without.

    Latent attention needs MindSpeed itself: Megatron's DotProductAttention of --transformer-impl local takes no sizes
    of its own for keys and values (TypeError: k_channels, seen with 0.16.1); MindSpeed's mla_feature.py changes that.
    """
    try:
        text = open_checkout(Path(megatron)).text if megatron else None
    except CheckoutError:
        return
    latent = "--multi-latent-attention" in plan.args and plan.args.get("--transformer-impl") == "local"
    enough = ("mindspeed.megatron_adaptor", *(() if latent else ("torch_npu.contrib.transfer_to_npu",)))
    if text is not None and not any(name in text for name in enough):
        why = "its latent attention is MindSpeed's" if latent else "Megatron calls torch.cuda"
        rule = f"its pretrain_gpt.py does not import mindspeed.megatron_adaptor, and {why}"
        fix = "install MindSpeed, and write `import mindspeed.megatron_adaptor` above our import in it"
        yield _problem("MEGATRON", megatron, rule, fix)


def _data(plan: Plan) -> Iterator[Problem]:
    if "--mock-data" in plan.args:
        return
    given = plan.args.get("--data-path") or []
    # With weights, numbers and prefixes take turns: 0.3 prefix 0.7 prefix.
    prefixes = given[1::2] if len(given) > 1 and _is_number(given[0]) else given
    if not prefixes:
        yield _problem("--data-path", "", "no data set is named", "set DATA to the prefix of its .bin and .idx")
    for prefix in prefixes:
        missing = [prefix + suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
        if missing:
            fix = "set DATA to a prefix made by Megatron-LM's tools/preprocess_data.py"
            yield _problem("--data-path", prefix, f"there is no file {' and no '.join(missing)}", fix)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _tokenizer(plan: Plan) -> Iterator[Problem]:
    kind, model = plan.args.get("--tokenizer-type"), plan.args.get("--tokenizer-model")
    if kind == "NullTokenizer":
        return
    if model is None:
        yield _problem("--tokenizer-model", "", f"--tokenizer-type {kind} needs one", "set TOKENIZER")
    elif not Path(model).exists():
        rule = "there is no such file or folder"
        fix = "set TOKENIZER to a local one: nodes of a cluster rarely reach a model hub"
        yield _problem("--tokenizer-model", model, rule, fix)


def _load(plan: Plan) -> Iterator[Problem]:
    """Megatron starts from random weights where --load has no checkpoint; --exit-on-missing-checkpoint forbids it."""
    load = plan.args.get("--load")
    if load is None or "--exit-on-missing-checkpoint" not in plan.args:
        return
    if not Path(load, "latest_checkpointed_iteration.txt").is_file():
        fix = "set the right folder, or remove --exit-on-missing-checkpoint"
        yield _problem("--load", load, "holds no checkpoint (latest_checkpointed_iteration.txt)", fix)


def _problem(flag: str, value: str, rule: str, fix: str) -> Problem:
    return Problem(kind="file", flag=flag, value=value, rule=rule, fix=fix)
