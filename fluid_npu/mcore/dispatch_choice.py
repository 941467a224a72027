"""How often a token is sent to a rank that holds several of its experts: once for each expert, or once.

'static' sends it once to every rank, whether it holds some of its experts or not: then sizes follow from shapes alone,
and no rank waits to be told them. E experts, K experts of a token, P expert-parallel ranks. The choice is a function of
these and of the configuration, which are equal on all ranks.
"""

from __future__ import annotations

from math import comb

from megatron.core.transformer.transformer_config import TransformerConfig

from fluid_npu.device.choice import Choice

#: What ``dispatch`` may be.
DISPATCHES = ("plain", "once-per-rank", "static", "auto")

#: Fewer rows than this factor do not pay for expanding and adding up in 'auto': a figure to be measured, not yet one.
WORTH_IT = 1.2

#: 'auto' sends every token to every rank only where at least this share of them is wanted there.
WANTED = 0.95


def check_dispatch(dispatch: str) -> str:
    """The word itself. Raises ValueError for another one."""
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch={dispatch!r}: allowed are {', '.join(map(repr, DISPATCHES))}")
    return dispatch


def expected_factor(experts: int, topk: int, ranks: int) -> float:
    """How many times fewer rows once-per-rank has than plain, under routing that is even and random.

    A rank is chosen by none of a token's K experts with probability C(E - E/P, K) / C(E, K).
    """
    return topk / (ranks * expected_coverage(experts, topk, ranks))


def expected_coverage(experts: int, topk: int, ranks: int) -> float:
    """The share of a rank's tokens that another rank's experts want, under routing that is even and random."""
    return 1.0 - comb(experts - experts // ranks, topk) / comb(experts, topk)


def choose_dispatch(dispatch: str, config: TransformerConfig, ranks: int, etp: int, device: str = "") -> Choice[str]:
    """'plain', 'once-per-rank' or 'static', and why.

    Args:
        dispatch: one of ``DISPATCHES``.
        config: Megatron's configuration.
        ranks: P.
        etp: expert-tensor-parallel ranks.
        device: where grouped experts are ('cuda'); "" where they are not ours, which 'static' needs.

    Raises:
        ValueError: another word, 'once-per-rank' or 'static' with padding to capacity, whose rows have no probability
            to tell which are padding, or 'static' with expert tensor parallelism or experts of others.
    """
    check_dispatch(dispatch)
    if dispatch == "plain":
        return Choice("plain", "as asked")
    if config.moe_pad_expert_input_to_capacity:
        if dispatch == "auto":
            return Choice("plain", "moe_pad_expert_input_to_capacity gives every expert its own fixed rows")
        raise ValueError(
            f"dispatch={dispatch!r}: moe_pad_expert_input_to_capacity=True gives every expert its own fixed rows; "
            "unset --moe-pad-expert-input-to-capacity or use dispatch='plain'"
        )
    if dispatch == "static":
        _check_static(etp, device)
        return Choice(dispatch, f"as asked; {_coverage(config.num_moe_experts, config.moe_router_topk, ranks)}")
    if ranks * etp == 1:
        return Choice("plain", "one rank has all experts: no row is sent")
    if dispatch == "once-per-rank":
        return Choice(dispatch, "as asked")
    return form_by_rows(config.num_moe_experts, config.moe_router_topk, ranks, static=device == "cuda" and etp == 1)


def _check_static(etp: int, device: str) -> None:
    if etp > 1:
        raise ValueError(
            f"dispatch='static': expert_tensor_parallel_size={etp} exchanges rows again, with sizes on the host; "
            "use expert_tensor_parallel_size=1 or dispatch='once-per-rank'"
        )
    if not device:
        raise ValueError(
            "dispatch='static': the number of rows of each expert stays on the device, which FluidGroupedMLP in "
            "FluidMoELayer alone takes; set moe_grouped_gemm=True there, or use dispatch='once-per-rank'"
        )


def form_by_rows(experts: int, topk: int, ranks: int, static: bool = False) -> Choice[str]:
    """What 'auto' chooses where nothing but the number of rows speaks; ``static``: whether that form can be had."""
    factor = expected_factor(experts, topk, ranks)
    said = f"{experts} experts, top-{topk}, {ranks} ranks: {factor:.2f} times fewer rows under even random routing"
    if factor < WORTH_IT:
        return Choice("plain", f"{said}, less than {WORTH_IT}")
    if static and expected_coverage(experts, topk, ranks) >= WANTED:
        return Choice("static", f"{said}; {_coverage(experts, topk, ranks)}, and the host waits for no sizes")
    return Choice("once-per-rank", said)


def _coverage(experts: int, topk: int, ranks: int) -> str:
    wanted = expected_coverage(experts, topk, ranks)
    return (
        f"{100 * wanted:.1f} % of all tokens are wanted by a rank, so {1 / wanted:.2f} times the rows of once-per-rank"
    )
