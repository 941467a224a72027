"""In how many chunks of heads an attention under context parallelism is fastest, from measured costs.

One layer, forward and backward, the slowest rank, milliseconds. Forward: qkv, AllToAll to heads, attention, AllToAll
back to rows, projection. As ``mcore.attention_chunks`` runs it: qkv of all chunks, each sent when it is computed, then
attention of each that has landed, then one projection when all are back. Backward: the projection's input gradient,
once, then attention of each chunk, then qkv's input gradient, once. Link and compute each take what they are given in
order. As in ``planner``, what runs on both at once is credited only with the
share that was measured to hide, and a gain within the spread is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluid_npu.device.choice import Choice


@dataclass(frozen=True, kw_only=True)
class AttentionCosts:
    """Of one layer. Each pair is (forward, input gradients)."""

    qkv_ms: tuple[float, float]
    core_ms: tuple[float, float]
    """Attention itself, over whole sequences, of this rank's heads."""
    proj_ms: tuple[float, float]
    dw_ms: float
    """Weight gradients of qkv and projection; 0 where they are not kept for the exchanges."""
    alpha_ms: float
    """Of an exchange without bytes."""
    beta_ms_per_mib: float
    to_heads_mib: float
    """q, k and v to other ranks."""
    to_rows_mib: float
    chunk_ms: float
    """What one more chunk adds to forward and to backward each: launches, and kernels that fill the device worse."""
    hiding: float
    """Share of the shorter of an exchange and a GEMM that is saved when both run at once, 0 to 1."""
    spread_ms: float = 0.0
    """A gain that is not larger than this is none."""

    def exchanges_ms(self, chunks: int) -> tuple[float, float]:
        """Of one chunk: to heads, to rows."""
        to_heads, to_rows = (mib / chunks * self.beta_ms_per_mib for mib in (self.to_heads_mib, self.to_rows_mib))
        return self.alpha_ms + to_heads, self.alpha_ms + to_rows


def choose_attention_chunks(costs: AttentionCosts, numbers: Sequence[int]) -> Choice[int]:
    """The number of ``numbers`` with the shortest expected layer; 1 where no other is clearly shorter.

    A function of figures that are equal on all ranks, and so is the answer.
    """
    expected = {chunks: expected_attention_ms(costs, chunks) for chunks in sorted({1, *numbers})}
    best = min(expected, key=lambda chunks: expected[chunks])
    if expected[1] - expected[best] <= costs.spread_ms:
        best = 1
    told = ", ".join(f"{chunks} {ms:.2f} ms" for chunks, ms in expected.items())
    noise = f"; less than {costs.spread_ms:.2f} ms cannot be told from 1" if costs.spread_ms else ""
    return Choice(best, f"expected of a layer's attention: {told}; {costs.hiding:.0%} of an exchange hides{noise}")


def expected_attention_ms(costs: AttentionCosts, chunks: int) -> float:
    """Forward and backward of a layer's attention."""
    there, back = costs.exchanges_ms(chunks)
    qkv, core, proj = (pair for pair in (costs.qkv_ms, costs.core_ms, costs.proj_ms))
    more = (chunks - 1) * costs.chunk_ms
    compute = sum(sum(pair) for pair in (qkv, core, proj)) + 2 * more
    serial = compute + costs.dw_ms + 2 * chunks * (there + back)
    once = [0.0] * (chunks - 1)
    each = [[ms / chunks] * chunks for ms in (qkv[0], core[0] + more, core[1] + more)]
    forward = _three_stages((each[0], each[1], [*once, proj[0]]), (there, back))
    backward = _three_stages(([proj[1], *once], each[2], [*once, qkv[1]]), (back, there))
    idle = backward - (qkv[1] + core[1] + proj[1] + more)  # dW runs while compute waits for the link, the rest after
    ideal = forward + backward + max(0.0, costs.dw_ms - idle)
    return serial - costs.hiding * (serial - ideal)


def _three_stages(stages: tuple[list[float], list[float], list[float]], exchanges: tuple[float, float]) -> float:
    """When all chunks are through three stages, of so long for each chunk, with an exchange of each between two."""
    computed = link = 0.0
    landed = [0.0] * len(stages[0])
    for number, stage in enumerate(stages):
        for chunk, ms in enumerate(stage):
            computed = max(computed, landed[chunk]) + ms
            if number < len(exchanges):
                link = max(link, computed) + exchanges[number]
                landed[chunk] = link
    return computed
