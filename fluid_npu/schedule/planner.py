"""Which schedule of an MoE layer is fastest, from measured costs: nothing overlapped, dW, dW carried over, chunks,
chunks with local rows first, or two halves of a micro-batch interleaved.

An exchange takes ``alpha + bytes * beta``. Two resources, communication and compute, each take what they are given in
order; what runs on both at once is credited only with the share that was measured to hide (``hiding``): on a link that
needs the multiprocessors of a GEMM that is next to nothing, and the plan is then 'plain'. All times are milliseconds
of one layer, forward and backward, of the slowest rank; the table must be the same on all ranks, and so is the plan.
What the layer has around its experts (attention) counts in no plan, but two halves compute it beside exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

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
    rows_of_chunks: tuple[tuple[int, float], ...] = ()
    """Numbers of chunks that share no experts, though ``join_ms`` is there, and how many times the rows they send."""
    local_share: float = 0.0
    """Of the experts' rows those whose token is on the same rank; 0: local rows first is not considered."""
    local_join_ms: float = 0.0
    """What local rows first adds to dW: the rows of all chunks are put together."""
    around_forward_ms: float = 0.0
    """Attention and what else is between two MoE layers; with ``around_backward_ms`` beside the exchanges of halves."""
    around_backward_ms: float = 0.0

    def transfer_ms(self, mib: float) -> float:
        """Of one exchange."""
        return self.alpha_ms + self.beta_ms_per_mib * mib

    def weights_ms(self, plan: Plan) -> float:
        """All weight gradients of a layer."""
        share = plan.chunks > 1 and plan.chunks not in dict(self.rows_of_chunks)
        joined = (self.join_ms if share else 0.0, self.local_join_ms if plan.local_first else 0.0)
        return self.dw_ms + max(joined)

    def rows(self, chunks: int) -> float:
        """How many times the rows of one piece."""
        return dict(self.rows_of_chunks).get(chunks, 1.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``train`` and a Layer Spec take: ``chunks`` and ``local_first`` belong to overlap 'full'."""

    overlap: str = "off"
    carry_over: bool = False
    chunks: int = 1
    local_first: bool = False
    interleave_batches: bool = False

    @property
    def pieces(self) -> int:
        """In how many parts the experts' rows are computed."""
        return 2 if self.interleave_batches else self.chunks + self.local_first

    def __str__(self) -> str:
        if self.interleave_batches:
            return "two halves interleaved"
        if self.overlap == "full":
            chunks = f"full in {self.chunks} chunk{'s' if self.chunks > 1 else ''}"
            return f"{chunks}{', local rows first' * self.local_first}{' with carry-over' * self.carry_over}"
        return {"off": "plain", "dw": "dw with carry-over" if self.carry_over else "dw"}[self.overlap]


PLAIN = Plan()
_FC2 = 1 / 3  # of the experts' forward, with a gate


def choose_plan(
    costs: Costs, chunk_numbers: Sequence[int], carry_over: bool = True, halves: bool = False
) -> Choice[Plan]:
    """The plan with the shortest expected step; plain where no other is clearly shorter.

    Args:
        costs: the same on all ranks.
        chunk_numbers: numbers of chunks that the layer can have.
        carry_over: whether dW may wait for the layer below.
        halves: whether the layer may run in two halves of a micro-batch.
    """
    plans = _plans(chunk_numbers, carry_over, costs.local_share > 0, halves)
    expected = {plan: expected_ms(costs, plan) for plan in plans}
    best = min(expected, key=lambda plan: expected[plan])
    if expected[PLAIN] - expected[best] <= costs.spread_ms:
        best = PLAIN
    told = ", ".join(f"{plan} {ms:.2f} ms" for plan, ms in expected.items())
    noise = f"; less than {costs.spread_ms:.2f} ms cannot be told from plain" if costs.spread_ms else ""
    return Choice(best, f"expected of a layer: {told}; {costs.hiding:.0%} of an exchange hides beside a GEMM{noise}")


def expected_ms(costs: Costs, plan: Plan) -> float:
    """Forward and backward of a layer that has another one below it."""
    serial = _serial_ms(costs, plan)
    if plan.overlap == "off":
        return serial
    both = _halves_ms(costs) if plan.interleave_batches else _forward_ms(costs, plan) + _backward_ms(costs, plan)
    return serial - costs.hiding * (serial - both)


def _plans(chunk_numbers: Sequence[int], carry_over: bool, local: bool, halves: bool) -> Iterator[Plan]:
    yield PLAIN
    for carried in (False, True)[: 1 + carry_over]:
        yield Plan(overlap="dw", carry_over=carried)
        for chunks, first in product(chunk_numbers, (False, True)[: 1 + local]):
            if chunks > 1 or first:
                yield Plan(overlap="full", carry_over=carried, chunks=chunks, local_first=first)
    if halves:
        yield Plan(overlap="dw", interleave_batches=True)


def _serial_ms(costs: Costs, plan: Plan) -> float:
    exchanges = 2 if plan.interleave_batches else plan.chunks
    there, back = _transfers(costs, 2) if plan.interleave_batches else _of_chunks(costs, plan.chunks)
    compute = costs.forward_ms + costs.dx_ms + costs.weights_ms(plan)
    return 2 * exchanges * (there + back) + compute + 2 * (plan.pieces - 1) * costs.chunk_ms


def _transfers(costs: Costs, exchanges: int, rows: float = 1.0) -> tuple[float, float]:
    """Of one dispatch and one combine of so many, with so many times the rows in all."""
    part = rows / exchanges
    return costs.transfer_ms(costs.dispatch_mib * part), costs.transfer_ms(costs.combine_mib * part)


def _of_chunks(costs: Costs, chunks: int) -> tuple[float, float]:
    return _transfers(costs, chunks, costs.rows(chunks))


def _each(costs: Costs, plan: Plan, compute_ms: float) -> tuple[float, float]:
    """Of the local rows, and of each chunk after them."""
    local = costs.local_share * compute_ms if plan.local_first else 0.0
    more = costs.chunk_ms * (plan.pieces - 1) / plan.pieces
    return local + more * plan.local_first, (compute_ms - local) / plan.chunks + more


def _forward_ms(costs: Costs, plan: Plan) -> float:
    """FC1 of local rows comes before the chunks, their FC2 after them, beside the last combine."""
    there, back = _of_chunks(costs, plan.chunks)
    local, compute = _each(costs, plan, costs.forward_ms)
    computed, landed = _pipeline(there, back, compute, plan.chunks, busy_ms=(1.0 - _FC2) * local)
    return max(landed, computed + _FC2 * local)


def _backward_ms(costs: Costs, plan: Plan) -> float:
    """With carry-over half of dW (FC2's) comes from the layer above, beside the first exchange."""
    weights = costs.weights_ms(plan)
    carried = weights / 2 if plan.carry_over else 0.0
    there, back = _of_chunks(costs, plan.chunks)
    local, compute = _each(costs, plan, costs.dx_ms)
    computed, landed = _pipeline(back, there, compute, plan.chunks, busy_ms=carried + local)
    return max(computed + weights - carried, landed)


def _halves_ms(costs: Costs) -> float:
    """Two halves, A and B, without what is around the experts: ``mcore.interleave`` has the order.

    Forward: attention A, attention B beside dispatch A, experts A beside dispatch B, experts B beside combine A.
    Backward: both combines are launched, then experts and dW of B beside combine A, of A beside dispatch B; attention B
    beside dispatch A.
    """
    there, back = _transfers(costs, 2)
    around, experts = costs.around_forward_ms / 2, (costs.forward_ms + costs.chunk_ms) / 2
    first = around + there
    second = max(first, 2 * around) + there
    computed_a = max(first, 2 * around) + experts
    landed_a = max(second, computed_a) + back
    computed_b = max(second, computed_a) + experts
    forward = max(landed_a, computed_b) + back
    around, experts, weights = costs.around_backward_ms / 2, (costs.dx_ms + costs.chunk_ms) / 2, costs.dw_ms / 2
    computed_b = back + experts
    landed_b = max(2 * back, computed_b) + there
    computed_a = max(2 * back, computed_b + weights) + experts
    landed_a = max(landed_b, computed_a) + there
    backward = max(landed_a, max(landed_b, computed_a + weights) + around) + around
    return forward + backward - costs.around_forward_ms - costs.around_backward_ms


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
