"""Which schedule of an MoE layer is fastest, from measured costs: nothing overlapped, dW, dW carried over, chunks.

An exchange takes ``alpha + bytes * beta``. Two resources, communication and compute, each take what they are given in
order; what runs on both at once is credited only with the share that was measured to hide (``hiding``): on a link that
needs the multiprocessors of a GEMM that is next to nothing, and the plan is then 'plain'. All times are milliseconds
of one layer, forward and backward, of the slowest rank; the table must be the same on all ranks, and so is the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fluid_npu.device.choice import Choice


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One MoE layer of one rank, the slowest."""

    alpha_ms: float
    """Of an exchange without bytes."""
    beta_ms_per_mib: float
    dispatch_mib: float
    """To other ranks."""
    combine_mib: float
    forward_ms: float
    """FC1, activation, FC2."""
    dx_ms: float
    """Their input gradients."""
    dw_ms: float
    """Weight gradients of both."""
    chunk_ms: float
    """What one more chunk adds to forward and to backward each: launches, and GEMMs that fill the device worse."""
    hiding: float
    """Share of the shorter of an exchange and a GEMM that is saved when both run at once, 0 to 1."""
    spread_ms: float = 0.0
    """A gain that is not larger than this is none."""
    join_ms: float = 0.0
    """What more than one chunk adds to dW where chunks share their experts: the rows of all are put together."""

    def transfer_ms(self, mib: float) -> float:
        """Of one exchange."""
        return self.alpha_ms + self.beta_ms_per_mib * mib

    def weights_ms(self, chunks: int) -> float:
        """All weight gradients of a layer in so many chunks."""
        return self.dw_ms + (self.join_ms if chunks > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``train`` and a Layer Spec take: ``chunks`` belongs to overlap 'full'."""

    overlap: str = "off"
    carry_over: bool = False
    chunks: int = 1

    def __str__(self) -> str:
        if self.overlap == "full":
            return f"full in {self.chunks} chunks{' with carry-over' if self.carry_over else ''}"
        return {"off": "plain", "dw": "dw with carry-over" if self.carry_over else "dw"}[self.overlap]


PLAIN = Plan()


def choose_plan(costs: Costs, chunk_numbers: Sequence[int], carry_over: bool = True) -> Choice[Plan]:
    """The plan with the shortest expected step; plain where no other is clearly shorter.

    Args:
        costs: the same on all ranks.
        chunk_numbers: numbers of chunks that the layer can have.
        carry_over: whether dW may wait for the layer below.
    """
    expected = {plan: expected_ms(costs, plan) for plan in _plans(chunk_numbers, carry_over)}
    best = min(expected, key=lambda plan: expected[plan])
    if expected[PLAIN] - expected[best] <= costs.spread_ms:
        best = PLAIN
    told = ", ".join(f"{plan} {ms:.2f} ms" for plan, ms in expected.items())
    noise = f"; less than {costs.spread_ms:.2f} ms cannot be told from plain" if costs.spread_ms else ""
    return Choice(best, f"expected of a layer: {told}; {costs.hiding:.0%} of an exchange hides beside a GEMM{noise}")


def expected_ms(costs: Costs, plan: Plan) -> float:
    """Forward and backward of a layer that has another one below it."""
    serial = _serial_ms(costs, plan.chunks)
    if plan.overlap == "off":
        return serial
    ideal = _forward_ms(costs, plan.chunks) + _backward_ms(costs, plan)
    return serial - costs.hiding * (serial - ideal)


def _plans(chunk_numbers: Sequence[int], carry_over: bool) -> Iterator[Plan]:
    yield PLAIN
    for carried in (False, True)[: 1 + carry_over]:
        yield Plan(overlap="dw", carry_over=carried)
        for chunks in chunk_numbers:
            if chunks > 1:
                yield Plan(overlap="full", carry_over=carried, chunks=chunks)


def _serial_ms(costs: Costs, chunks: int) -> float:
    transfers = (
        2 * chunks * (costs.transfer_ms(costs.dispatch_mib / chunks) + costs.transfer_ms(costs.combine_mib / chunks))
    )
    compute = costs.forward_ms + costs.dx_ms + costs.weights_ms(chunks)
    return transfers + compute + 2 * (chunks - 1) * costs.chunk_ms


def _forward_ms(costs: Costs, chunks: int) -> float:
    compute = costs.forward_ms / chunks + costs.chunk_ms * (chunks - 1) / chunks
    return _pipeline(
        costs.transfer_ms(costs.dispatch_mib / chunks), costs.transfer_ms(costs.combine_mib / chunks), compute, chunks
    )[1]


def _backward_ms(costs: Costs, plan: Plan) -> float:
    """With carry-over half of dW (FC2's) comes from the layer above, beside the first exchange."""
    chunks, weights = plan.chunks, costs.weights_ms(plan.chunks)
    carried = weights / 2 if plan.carry_over else 0.0
    compute = costs.dx_ms / chunks + costs.chunk_ms * (chunks - 1) / chunks
    computed, landed = _pipeline(
        costs.transfer_ms(costs.combine_mib / chunks),
        costs.transfer_ms(costs.dispatch_mib / chunks),
        compute,
        chunks,
        busy_ms=carried,
    )
    return max(computed + weights - carried, landed)


def _pipeline(there: float, back: float, compute: float, chunks: int, busy_ms: float = 0.0) -> tuple[float, float]:
    """When the last chunk is computed, and when the last exchange has landed.

    All exchanges there are launched first; each chunk is computed when it is there, then sent back. ``busy_ms`` of
    other compute comes before the first.
    """
    link, computed = chunks * there, busy_ms
    for number in range(1, chunks + 1):
        computed = max(computed, number * there) + compute
        link = max(link, computed) + back
    return computed, link
