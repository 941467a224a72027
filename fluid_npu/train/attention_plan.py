"""What ``--attention-chunks auto`` makes of a run: by rule where there is nothing to gain, else from measured costs."""

from __future__ import annotations

from dataclasses import replace

from fluid_npu.device import Choice
from fluid_npu.mcore.chunk_choice import AUTO
from fluid_npu.mcore.context import choose_algorithm
from fluid_npu.mcore.head_chunks import HeadChunks
from fluid_npu.schedule.attention_planner import choose_attention_chunks
from fluid_npu.train.attention_costs import measure_attention
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

_NUMBERS = (2, 4, 8)


def settle_attention(config: TrainConfig, overlap: str, place: Place) -> TrainConfig:
    """The configuration with a number of attention chunks, the same on all ranks; what 'auto' chose is printed.

    ``overlap`` is what was settled. Collective.
    """
    if config.attention_chunks != AUTO:
        return config
    chosen = _choose(config, overlap, place).announce("--attention-chunks auto")
    return replace(config, attention_chunks=chosen.value)


def _choose(config: TrainConfig, overlap: str, place: Place) -> Choice[int]:
    numbers, why_none = possible_chunks(config)
    if not numbers:
        return Choice(1, why_none)
    if overlap == "off":
        return Choice(1, "no AllToAll of this run is overlapped")
    if config.plant_delay_ms > 0:
        return Choice(1, "the planted delay is no cost of an exchange")
    if config.a2a_transport != "collective":
        return Choice(1, f"costs are measured for the collective, not for --a2a-transport {config.a2a_transport}")
    costs, why_not = measure_attention(config, place)
    return Choice(1, why_not) if costs is None else choose_attention_chunks(costs, numbers)


def possible_chunks(config: TrainConfig) -> Choice[list[int]]:
    """Numbers of chunks above 1 that the attention of this model can have; none with the reason. Equal on all ranks."""
    preset = config.model()
    heads, keys = preset.heads // config.tp, preset.kv_heads // config.tp
    if config.impl == "stock":
        return Choice([], "stock Megatron's attention has no chunks")
    if config.cp == 1:
        return Choice([], "with --cp 1 no heads are exchanged")
    if preset.mla is not None:
        return Choice([], f"the multi-latent attention of preset {preset.name} has none")
    if keys == 0:
        return Choice([], f"tensor ranks share key heads (--tp {config.tp}, {preset.kv_heads} key heads)")
    algorithm, why = choose_algorithm(None, heads, config.cp)
    if algorithm != "ulysses":
        return Choice([], f"a ring passes keys, it does not exchange heads: {why}")
    found = [number for number in _NUMBERS if _fits(heads, keys, config.cp, number)]
    return Choice(found, "" if found else f"{heads // config.cp} query heads of a rank make no equal chunks")


def _fits(heads: int, keys: int, ranks: int, number: int) -> bool:
    try:
        HeadChunks.of(heads, keys, ranks, number)
    except ValueError:
        return False
    return True


def attention_obstacle(config: TrainConfig, number: int) -> str | None:
    """Why the model's attention cannot run in so many chunks, or None."""
    numbers, why = possible_chunks(config)
    if number == 1 or number in numbers:
        return None
    return why or f"its heads make no {number} chunks; allowed are {', '.join(map(str, [1, *numbers]))}"
