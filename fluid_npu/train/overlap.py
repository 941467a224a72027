"""Whether AllToAll is overlapped with dW, decided equally by all ranks."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from fluid_npu.device import Choice
from fluid_npu.mcore.chunk_choice import divisors
from fluid_npu.schedule.planner import choose_plan
from fluid_npu.train.config import ConfigError, TrainConfig
from fluid_npu.train.costs import dispatch_form, measure_costs
from fluid_npu.train.halves import halves_are_the_same
from fluid_npu.train.parallel import Place
from fluid_npu.train.profile import SETTINGS, Profile, key_of

#: What the planner tries where tokens are sent once per rank, which could be in any number of chunks.
_CHUNKS_OF_TOKENS = (1, 2, 4, 8)


def choose_overlap(config: TrainConfig, place: Place) -> Choice[str]:
    """'dw' or 'off' by rule, and why. Collective: host names are gathered, so that no rank decides alone."""
    if config.impl == "stock":
        return Choice("off", "stock Megatron has no overlap")
    if config.overlap != "auto":
        return Choice(config.overlap, "as asked")
    if config.ep == 1 and config.cp == 1:
        return Choice("off", "with --ep 1 there is no AllToAll")
    hosts = _host_names(place)
    if place.device.name != "cpu":
        return Choice("dw", f"the {place.device.name} computes dW while the AllToAll flies")
    if config.plant_delay_ms > 0:
        return Choice("dw", f"every AllToAll is delayed by {config.plant_delay_ms:g} ms")
    if len(set(hosts)) > 1:
        return Choice("dw", f"the ranks are on {len(set(hosts))} machines, a network lies between them")
    return Choice("off", "on one machine's loopback the copy itself is CPU work, so nothing can hide")


def plan_overlap(config: TrainConfig, place: Place) -> tuple[TrainConfig, Choice[str]]:
    """``choose_overlap``'s answer; where that is an automatic 'dw' for the collective, the planner's. Collective.

    The planner decides from costs that are measured here, and may turn on carry-over and chunks.
    """
    ruled = choose_overlap(config, place)
    planned = config.overlap == "auto" and ruled.value == "dw" and config.plant_delay_ms == 0
    other = config.a2a_transport != "collective" or config.a2a_payload_dtype != "same"
    form = dispatch_form(config, place)
    if not planned or config.ep == 1 or other or form in ("static", "once-per-node"):
        return config, ruled
    costs, why_not = measure_costs(config, place)
    if costs is None:
        return config, Choice(ruled.value, f"{ruled.reason}; not planned from costs: {why_not}")
    of_experts = divisors(config.model().experts // config.ep)
    numbers = of_experts if form == "plain" else _CHUNKS_OF_TOKENS
    halves = halves_are_the_same(config)
    plan, reason = choose_plan(costs, numbers, carry_over=has_layer_below(config), halves=halves.value)
    if not halves.value:
        reason = f"{reason}; two halves interleaved were not considered: {halves.reason}"
    own: dict[str, Any] = {"carry_over": plan.carry_over or (config.carry_over and plan.overlap != "off")}
    if plan.overlap == "full":
        own.update(moe_chunks=plan.chunks, local_first=plan.local_first)
    if plan.interleave_batches:
        own["interleave_batches"] = True
    return replace(config, **own), Choice(plan.overlap, reason)


def has_layer_below(config: TrainConfig) -> bool:
    """Whether some MoE layer has another below it on its rank, whose combine its dW could hide."""
    return config.model().layers // (config.pp * config.vpp) > 1


def settle(config: TrainConfig, place: Place) -> tuple[TrainConfig, Choice[str]]:
    """The configuration with the settings of its profile or its plan, and the overlap with its reason.

    Collective. Raises ConfigError on every rank alike for a profile that cannot be read.
    """
    profile = _shared_profile(config, place)
    if profile is None:
        return plan_overlap(config, place)
    differs = profile.differs(key_of(config, place, hosts=len(set(_host_names(place)))))
    if differs is not None:
        config, (value, reason) = plan_overlap(config, place)
        return config, Choice(value, f"{reason}; --profile {config.profile} is not used: {differs}")
    settings = profile.settings
    reason = f"--profile {config.profile}: {profile.reason}"
    own = {name: settings[name] for name in SETTINGS if name != "overlap"}
    if own["moe_cuda_graph"]:
        own["moe_cuda_graph"] = "auto"  # flags that the profile says nothing of may be in the way, such as --pp
    return replace(config, **own), Choice(settings["overlap"], reason)


def _shared_profile(config: TrainConfig, place: Place) -> Profile | None:
    """The first rank's reading for all, so that no rank decides alone; None without the flag."""
    if config.profile is None:
        return None
    found: list[Any] = [None]
    if place.first:
        try:
            found = [Profile.read(config.profile)]
        except ConfigError as error:
            found = [str(error)]
    dist.broadcast_object_list(found, src=0, device=place.device.torch_device(place.local_rank))
    if isinstance(found[0], str):
        raise ConfigError(found[0])
    profile: Profile = found[0]
    return profile


def _host_names(place: Place) -> list[str]:
    names: list[Any] = [None] * place.world
    dist.all_gather_object(names, platform.node())
    return names


def as_dict(choice: Choice[str]) -> dict[str, Any]:
    """For summary.json."""
    return {"value": choice.value, "reason": choice.reason}
