"""How often a token is sent to a rank that holds several of its experts: once for each expert, or once.

'once-per-node' sends it once to each node that holds some, and inside the node once to each rank. 'static' sends it
once to every rank, whether it holds some of its experts or not: then sizes follow from shapes alone, and no rank waits
to be told them. E experts, K experts of a token, P expert-parallel ranks. The choice is a function of these, of the
nodes and of the configuration, which are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from megatron.core.transformer.transformer_config import TransformerConfig

from fluid_npu.comm.transports.nodes import FLAG, Nodes, nodes_of
from fluid_npu.device.choice import Choice

#: What ``dispatch`` may be.
DISPATCHES = ("plain", "once-per-rank", "once-per-node", "static", "auto")
#: Those of layers that can be recorded.
RECORDED_DISPATCHES = ("static", "once-per-rank")

_UNKNOWN = Choice[Nodes | None](None, f"how many ranks a node has is not known; give {FLAG}")

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


def extra_rows_of_chunks(experts: int, topk: int, ranks: int, chunks: int) -> float:
    """How many times the rows of one piece once-per-rank has in so many chunks of a rank's experts, as above."""
    return chunks * expected_coverage(experts, topk, ranks * chunks) / expected_coverage(experts, topk, ranks)


def nodes_for(dispatch: str, ranks: Sequence[int], node_size: int, *, coded: bool = False) -> Choice[Nodes | None]:
    """The nodes of an expert-parallel group of global ranks; None, and why, where no dispatch may go by them.

    ``node_size``: ranks of the job on each, 0 where that is not known. ``coded``: an fp8 payload, which is not relayed:
    ValueError where 'once-per-node' asks for it.
    """
    if coded and dispatch == "once-per-node":
        raise ValueError(
            "--a2a-payload-dtype fp8: dispatch='once-per-node' sends received rows on, which is not coded; use "
            "dispatch='once-per-rank' or --a2a-payload-dtype same"
        )
    if coded or not node_size:
        return _UNKNOWN
    return nodes_of(ranks, node_size)


def choose_dispatch(
    dispatch: str,
    config: TransformerConfig,
    ranks: int,
    etp: int,
    device: str = "",
    nodes: Choice[Nodes | None] = _UNKNOWN,
) -> Choice[str]:
    """'plain', 'once-per-rank', 'once-per-node' or 'static', and why.

    Args:
        dispatch: one of ``DISPATCHES``.
        config: Megatron's configuration.
        ranks: P.
        etp: expert-tensor-parallel ranks.
        device: where grouped experts are ('cuda'); "" where they are not ours, which 'static' needs.
        nodes: of the expert-parallel group, for 'once-per-node' and 'auto'.

    Raises:
        ValueError: another word, 'once-per-rank', 'once-per-node' or 'static' with padding to capacity, whose rows have
            no probability to tell which are padding, 'static' or 'once-per-node' with expert tensor parallelism,
            'static' with experts of others, or 'once-per-node' without ranks inside and across nodes.
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
    if dispatch == "once-per-node":
        _check_nodes(etp, nodes)
        return Choice(dispatch, f"as asked; {nodes.reason}")
    static, known = device == "cuda" and etp == 1, nodes.value if etp == 1 else None
    return form_by_rows(config.num_moe_experts, config.moe_router_topk, ranks, static=static, nodes=known)


def _check_nodes(etp: int, nodes: Choice[Nodes | None]) -> None:
    if etp > 1:
        raise ValueError(
            f"dispatch='once-per-node': expert_tensor_parallel_size={etp} sends received rows on too; use "
            "expert_tensor_parallel_size=1 or dispatch='once-per-rank'"
        )
    missing = lacks_nodes(nodes)
    if missing:
        raise ValueError(f"dispatch='once-per-node': {missing}; or use dispatch='once-per-rank'")


def lacks_nodes(nodes: Choice[Nodes | None]) -> str:
    """Why tokens cannot go by these nodes; empty when they can."""
    found = nodes.value
    if found is None:
        return nodes.reason
    if found.two_levels:
        return ""
    return (
        f"the expert-parallel group has {found.count} node(s) of {found.size} rank(s) ({FLAG}), and there must be "
        "ranks inside and across nodes"
    )


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


def form_by_rows(experts: int, topk: int, ranks: int, static: bool = False, nodes: Nodes | None = None) -> Choice[str]:
    """What 'auto' chooses where nothing but the number of rows speaks.

    ``static``: whether that form can be had; ``nodes``: of the ranks, None where they are not known. Then the rows
    between them count, and not those inside.
    """
    if nodes is not None and nodes.two_levels:
        per_node = _form_by_nodes(experts, topk, nodes)
        if per_node.value:
            return Choice("once-per-node", per_node.reason)
    factor = expected_factor(experts, topk, ranks)
    said = f"{experts} experts, top-{topk}, {ranks} ranks: {factor:.2f} times fewer rows under even random routing"
    if factor < WORTH_IT:
        return Choice("plain", f"{said}, less than {WORTH_IT}")
    if static and expected_coverage(experts, topk, ranks) >= WANTED:
        return Choice("static", f"{said}; {_coverage(experts, topk, ranks)}, and the host waits for no sizes")
    return Choice("once-per-rank", said)


def rows_of_a_token(experts: int, topk: int, nodes: Nodes, by_node: bool) -> tuple[float, float]:
    """(across, inside): rows that a token is to other ranks under routing that is even and random.

    ``by_node``: sent once to each node, and from each of them inside; else once to each rank.
    """
    wanted = expected_coverage(experts, topk, nodes.count * nodes.size)
    others = nodes.size - 1
    if by_node:
        return (nodes.count - 1) * expected_coverage(experts, topk, nodes.count), nodes.count * others * wanted
    return (nodes.count - 1) * nodes.size * wanted, others * wanted


def _form_by_nodes(experts: int, topk: int, nodes: Nodes) -> Choice[bool]:
    """Whether clearly fewer rows cross between nodes than with a row for each rank."""
    (across, inside), (per_rank, inside_before) = (
        rows_of_a_token(experts, topk, nodes, by_node) for by_node in (True, False)
    )
    factor = per_rank / across
    said = (
        f"{experts} experts, top-{topk}, {nodes.count} nodes of {nodes.size} ranks: {factor:.2f} times fewer rows "
        f"between nodes than once-per-rank under even random routing, and {inside / inside_before:.2f} times as many "
        "inside them"
    )
    return Choice(factor >= WORTH_IT, said)


def _coverage(experts: int, topk: int, ranks: int) -> str:
    wanted = expected_coverage(experts, topk, ranks)
    return (
        f"{100 * wanted:.1f} % of all tokens are wanted by a rank, so {1 / wanted:.2f} times the rows of once-per-rank"
    )
