"""What one MoE layer of a run costs here: a short measurement before the model is built, for ``schedule.planner``.

Even routing, weights of the layer's shapes, the collective AllToAll on the job's group, with the rows of the dispatch's
form; and attention, as two products and the device's fused operator where it has one. Each figure is the median of a
few rounds on the slowest rank, so the table is the same on all ranks. T tokens of a rank, R rows of its experts,
H hidden, F ffn, L local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.comm.transports.nodes import nodes_of
from fluid_npu.device import Choice, kernels_of
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.mcore.chunk_choice import AUTO, choose_chunks_of, divisors
from fluid_npu.mcore.dispatch_choice import expected_factor, extra_rows_of_chunks, form_by_rows
from fluid_npu.ops.attention import fused_attention, fuses_attention
from fluid_npu.ops.expert_mlp import ExpertMLP, mlp_backward, mlp_forward
from fluid_npu.schedule.planner import Costs
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.halves import halves_are_the_same
from fluid_npu.train.measured import FEWER, MIB, everywhere, exchange_ms, link_costs, slowest, timed
from fluid_npu.train.model import TORCH_DTYPES
from fluid_npu.train.parallel import Place


def dispatch_form(config: TrainConfig, place: Place) -> str:
    """What a layer of this run sends, as ``mcore.dispatch_choice``: 'plain', whose chunks are of experts,
    'once-per-rank', whose are of tokens or of experts, or 'once-per-node' or 'static', which have none."""
    preset = config.model()
    if config.ep == 1:
        return "plain"
    if config.dispatch == "auto":
        size, in_pieces = config.a2a_node_size, config.overlap == "full"
        ranks = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
        nodes = nodes_of(ranks, size).value if size and not in_pieces and config.a2a_payload_dtype == "same" else None
        static = place.device.name == "cuda"
        return form_by_rows(preset.experts, preset.topk, config.ep, static=static, nodes=nodes).value
    return config.dispatch


def measure_costs(config: TrainConfig, place: Place, transport: Transport | None = None) -> Choice[Costs | None]:
    """The costs, the same on all ranks; None with the reason where a rank had no memory for it. Collective."""
    layer: _Layer | None = None
    around = 0.0, 0.0
    try:
        made = _Layer(config, place)
        compute, layer = made.compute_ms(), made
        around = attention_ms(config, place) if halves_are_the_same(config).value else (0.0, 0.0)
    except torch.OutOfMemoryError:
        compute, layer = [], None
    if not everywhere(place, layer is not None):
        return Choice(None, "a rank had no memory for a measurement of the layer")
    assert layer is not None
    exchange = layer.exchange_ms(transport if transport is not None else CollectiveTransport())
    return Choice(_costs(layer, *slowest(place, [*compute, *exchange, *around])), "measured")


def _costs(
    layer: _Layer,
    forward: float,
    part: float,
    dx: float,
    dw: float,
    join: float,
    whole: float,
    small: float,
    beside: float,
    spread: float,
    around_forward: float,
    around_backward: float,
) -> Costs:
    link = link_costs(whole, small, beside, dw, layer.mib)
    return Costs(
        alpha_ms=link.alpha_ms,
        beta_ms_per_mib=link.beta_ms_per_mib,
        dispatch_mib=layer.mib,
        combine_mib=layer.mib,
        forward_ms=forward,
        dx_ms=dx,
        dw_ms=dw,
        chunk_ms=max(0.0, layer.parts * part - forward) / max(layer.parts - 1, 1),
        hiding=link.hiding,
        spread_ms=spread,
        join_ms=join if layer.once else 0.0,
        rows_of_chunks=layer.rows_of_chunks,
        local_share=1.0 / layer.ranks,
        local_join_ms=join,
        around_forward_ms=around_forward,
        around_backward_ms=around_backward,
    )


def _chunks_of_experts(experts: int, topk: int, ranks: int) -> Iterator[tuple[int, float]]:
    """Numbers of chunks, and how many times the rows of one piece they have."""
    for chunks in divisors(experts // ranks)[1:]:
        if choose_chunks_of(AUTO, chunks, "once-per-rank", experts, topk, ranks).value == "experts":
            yield chunks, extra_rows_of_chunks(experts, topk, ranks, chunks)


class _Layer:
    """Operands of one layer of this rank."""

    def __init__(self, config: TrainConfig, place: Place) -> None:
        preset, self._place = config.model(), place
        self._group = parallel_state.get_expert_model_parallel_group()
        local, hidden = preset.experts // config.ep, preset.hidden
        tokens = preset.micro_batch_size * preset.seq_length // (config.tp * config.cp)
        each = max(config.ep * FEWER, tokens * preset.topk // local // (config.ep * FEWER) * config.ep * FEWER)
        self._counts, rows = [each] * local, each * local
        self.once, self.ranks = dispatch_form(config, place) == "once-per-rank", config.ep
        #: Of chunks that 'auto' makes of experts though tokens are sent once per rank.
        self.rows_of_chunks = tuple(_chunks_of_experts(preset.experts, preset.topk, config.ep)) if self.once else ()
        #: Chunks of one layer: two, or one where a rank has a single expert, which is not split.
        self.parts = 2 if self.once or local % 2 == 0 else 1
        made: dict[str, Any] = {
            "dtype": TORCH_DTYPES[config.dtype or "fp32"],
            "device": place.device.torch_device(place.local_rank),
        }
        self._x = torch.full((rows, hidden), 0.01, **made)
        self._p = torch.full((rows,), 0.5, **made)
        self._w1 = torch.full((local, hidden, 2 * preset.moe_ffn), 0.01, **made)
        self._w2 = torch.full((local, preset.moe_ffn, hidden), 0.01, **made)
        fewer = expected_factor(preset.experts, preset.topk, config.ep) if self.once else 1.0
        unit = config.ep * FEWER
        self._sent = self._x[: max(unit, int(rows / fewer) // unit * unit)]
        self.mib = self._sent.nbytes * (config.ep - 1) / config.ep / MIB

    def compute_ms(self) -> list[float]:
        """Forward, forward of one part of the experts or the rows, dX, dW, what rows in two pieces add to dW."""
        counts = GroupRows(self._counts)
        mlp = ExpertMLP(counts=counts, activation=None)
        _, kept = mlp_forward(self._x, self._p, self._w1, self._w2, mlp)
        h, a = kept[4], kept[5]

        def run_part() -> None:
            experts = slice(0, len(self._counts) if self.once else len(self._counts) // self.parts)
            own = GroupRows([rows // self.parts if self.once else rows for rows in self._counts[experts]])
            rows = slice(0, sum(own))
            some = ExpertMLP(counts=own, activation=None)
            mlp_forward(self._x[rows], self._p[rows], self._w1[experts], self._w2[experts], some)

        into = [torch.zeros(w.shape, device=w.device) for w in (self._w1, self._w2)]
        self._dw: Callable[[], Any] = lambda: (
            kernels_of(a).grouped_dw_add_(into[1], a, self._x, counts),
            kernels_of(a).grouped_dw_add_(into[0], self._x, h, counts),
        )
        dw = timed(self._place, self._dw)[0]
        in_pieces = timed(self._place, lambda: self._dw_in_pieces(into, a, h))[0]
        return [
            timed(self._place, lambda: mlp_forward(self._x, self._p, self._w1, self._w2, mlp))[0],
            timed(self._place, run_part)[0],
            timed(self._place, lambda: mlp_backward(self._x, kept, mlp))[0],
            dw,
            max(0.0, in_pieces - dw),
        ]

    def _dw_in_pieces(self, into: list[torch.Tensor], a: torch.Tensor, h: torch.Tensor) -> None:
        """The dW of rows in two pieces, as chunks of tokens and local rows first have it."""
        half = [rows // 2 for rows in self._counts]
        rows = PieceRows([half, half], torch.tensor([half, half], device=a.device))
        for main_grad, x, dy in ((into[1], a, self._x), (into[0], self._x, h)):
            pairs = zip(x.chunk(2), dy.chunk(2), strict=True)
            kernels_of(a).grouped_dw_pieces_add_(main_grad, [DWPart(*pair, half) for pair in pairs], rows)

    def exchange_ms(self, transport: Transport) -> list[float]:
        """As ``measured.exchange_ms``, of the dispatch's rows. Collective."""

        def dw() -> None:
            with beside_exchange():
                self._dw()

        return exchange_ms(self._place, transport, self._group, self._sent, dw)


def attention_ms(config: TrainConfig, place: Place) -> tuple[float, float]:
    """Forward and backward of what a layer has besides its experts, about: two products and attention.

    For the planner's halves. Queries and keys of equal number, whatever the model has; without attention itself where
    the device has no fused one.
    """
    preset = config.model()
    heads, size = preset.heads // config.tp, preset.channels
    made: dict[str, Any] = {
        "dtype": TORCH_DTYPES[config.dtype or "fp32"],
        "device": place.device.torch_device(place.local_rank),
        "requires_grad": True,
    }
    x_SBH = torch.full((preset.seq_length // config.cp, preset.micro_batch_size, preset.hidden), 0.01, **made)
    qkv = torch.full((3 * heads * size, preset.hidden), 0.01, **made)
    proj = torch.full((preset.hidden, heads * size), 0.01, **made)
    call = AttentionCall(heads=heads, scale=size**-0.5, causal=True)

    def forward() -> torch.Tensor:
        q, k, v = (x_SBH @ qkv.t()).unflatten(-1, (3, heads, size)).unbind(2)
        attended = fused_attention(q, k, v, call) if fuses_attention(q, k, v, call).value else v.flatten(2)
        return attended @ proj.t()

    alone = timed(place, forward, rounds=3)[0]
    both = timed(place, lambda: torch.autograd.grad(forward().sum(), (x_SBH, qkv, proj)), rounds=3)[0]
    return alone, max(both - alone, 0.0)
