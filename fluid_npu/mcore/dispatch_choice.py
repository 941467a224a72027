"""How often a token is sent to a rank that holds several of its experts: once for each expert, or once.

E experts, K experts of a token, P expert-parallel ranks. The choice is a function of these and of the configuration,
which are equal on all ranks.
"""

from __future__ import annotations

from math import comb

from megatron.core.transformer.transformer_config import TransformerConfig

from fluid_npu.device.choice import Choice

#: What ``dispatch`` may be.
DISPATCHES = ("plain", "once-per-rank", "auto")

#: Fewer rows than this factor do not pay for expanding and adding up in 'auto': a figure to be measured, not yet one.
WORTH_IT = 1.2


def check_dispatch(dispatch: str) -> str:
    """The word itself. Raises ValueError for another one."""
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch={dispatch!r}: allowed are {', '.join(map(repr, DISPATCHES))}")
    return dispatch


def expected_factor(experts: int, topk: int, ranks: int) -> float:
    """How many times fewer rows once-per-rank has than plain, under routing that is even and random.

    A rank is chosen by none of a token's K experts with probability C(E - E/P, K) / C(E, K).
    """
    missed = comb(experts - experts // ranks, topk) / comb(experts, topk)
    return topk / (ranks * (1.0 - missed))


def choose_dispatch(dispatch: str, config: TransformerConfig, ranks: int, etp: int) -> Choice[str]:
    """'plain' or 'once-per-rank', and why.

    Args:
        dispatch: one of ``DISPATCHES``.
        config: Megatron's configuration.
        ranks: P.
        etp: expert-tensor-parallel ranks.

    Raises:
        ValueError: another word, or 'once-per-rank' with padding to capacity, whose rows have no probability to tell
            which are padding.
    """
    check_dispatch(dispatch)
    if dispatch == "plain":
        return Choice("plain", "as asked")
    if config.moe_pad_expert_input_to_capacity:
        if dispatch == "auto":
            return Choice("plain", "moe_pad_expert_input_to_capacity gives every expert its own fixed rows")
        raise ValueError(
            "dispatch='once-per-rank': moe_pad_expert_input_to_capacity=True gives every expert its own fixed rows; "
            "unset --moe-pad-expert-input-to-capacity or use dispatch='plain'"
        )
    if ranks * etp == 1:
        return Choice("plain", "one rank has all experts: no row is sent")
    if dispatch == "once-per-rank":
        return Choice(dispatch, "as asked")
    return form_by_rows(config.num_moe_experts, config.moe_router_topk, ranks)


def form_by_rows(experts: int, topk: int, ranks: int) -> Choice[str]:
    """What 'auto' chooses where nothing but the number of rows speaks."""
    factor = expected_factor(experts, topk, ranks)
    said = f"{experts} experts, top-{topk}, {ranks} ranks: {factor:.2f} times fewer rows under even random routing"
    if factor >= WORTH_IT:
        return Choice("once-per-rank", said)
    return Choice("plain", f"{said}, less than {WORTH_IT}")
