"""What one MoE layer of a run costs here: a short measurement before the model is built, for ``schedule.planner``.

Even routing, weights of the layer's shapes, the collective AllToAll on the job's group, with the rows of the dispatch's
form. Each figure is the median of a few rounds on the slowest rank, so the table is the same on all ranks. T tokens of
a rank, R rows of its experts, H hidden, F ffn, L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.device import Choice, kernels_of
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.mcore.dispatch_choice import expected_factor, form_by_rows
from fluid_npu.ops.expert_mlp import ExpertMLP, mlp_backward, mlp_forward
from fluid_npu.schedule.planner import Costs
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import TORCH_DTYPES
from fluid_npu.train.parallel import Place

_ROUNDS, _WARM_UP = 7, 2
_MIB = 2**20
_FEWER = 8  # the small exchange of the fit has this part of the rows


def dispatch_form(config: TrainConfig, place: Place) -> str:
    """What a layer of this run sends, as ``mcore.dispatch_choice``: 'plain', whose chunks are of experts,
    'once-per-rank', whose are of tokens, or 'static', which has none."""
    preset = config.model()
    if config.ep == 1:
        return "plain"
    if config.dispatch == "auto":
        return form_by_rows(preset.experts, preset.topk, config.ep, static=place.device.name == "cuda").value
    return config.dispatch


def measure_costs(config: TrainConfig, place: Place, transport: Transport | None = None) -> Choice[Costs | None]:
    """The costs, the same on all ranks; None with the reason where a rank had no memory for it. Collective."""
    layer: _Layer | None = None
    try:
        made = _Layer(config, place)
        compute, layer = made.compute_ms(), made
    except torch.OutOfMemoryError:
        compute = []
    ready: list[Any] = [None] * place.world
    dist.all_gather_object(ready, layer is not None)
    if not all(ready):
        return Choice(None, "a rank had no memory for a measurement of the layer")
    assert layer is not None
    exchange = layer.exchange_ms(transport if transport is not None else CollectiveTransport())
    return Choice(_costs(layer, *_slowest(place, [*compute, *exchange])), "measured")


def _slowest(place: Place, figures: list[float]) -> list[float]:
    table = torch.tensor(figures, dtype=torch.float32, device=place.device.torch_device(place.local_rank))
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [float(ms) for ms in table]


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
) -> Costs:
    beta = max(0.0, (whole - small) / (layer.mib - layer.mib / _FEWER))
    saved = (whole + dw - beside) / max(min(whole, dw), 1e-6)
    return Costs(
        alpha_ms=max(0.0, small - beta * layer.mib / _FEWER),
        beta_ms_per_mib=beta,
        dispatch_mib=layer.mib,
        combine_mib=layer.mib,
        forward_ms=forward,
        dx_ms=dx,
        dw_ms=dw,
        chunk_ms=max(0.0, layer.parts * part - forward) / max(layer.parts - 1, 1),
        hiding=min(max(saved, 0.0), 1.0),
        spread_ms=spread,
        join_ms=join,
    )


class _Layer:
    """Operands of one layer of this rank."""

    def __init__(self, config: TrainConfig, place: Place) -> None:
        preset, self._place = config.model(), place
        self._group = parallel_state.get_expert_model_parallel_group()
        local, hidden = preset.experts // config.ep, preset.hidden
        tokens = preset.micro_batch_size * preset.seq_length // (config.tp * config.cp)
        each = max(config.ep * _FEWER, tokens * preset.topk // local // (config.ep * _FEWER) * config.ep * _FEWER)
        self._counts, rows = [each] * local, each * local
        self._once = dispatch_form(config, place) == "once-per-rank"
        #: Chunks of one layer: two, or one where a rank has a single expert, which is not split.
        self.parts = 2 if self._once or local % 2 == 0 else 1
        made: dict[str, Any] = {
            "dtype": TORCH_DTYPES[config.dtype or "fp32"],
            "device": place.device.torch_device(place.local_rank),
        }
        self._x = torch.full((rows, hidden), 0.01, **made)
        self._p = torch.full((rows,), 0.5, **made)
        self._w1 = torch.full((local, hidden, 2 * preset.moe_ffn), 0.01, **made)
        self._w2 = torch.full((local, preset.moe_ffn, hidden), 0.01, **made)
        fewer = expected_factor(preset.experts, preset.topk, config.ep) if self._once else 1.0
        unit = config.ep * _FEWER
        self._sent = self._x[: max(unit, int(rows / fewer) // unit * unit)]
        self.mib = self._sent.nbytes * (config.ep - 1) / config.ep / _MIB

    def compute_ms(self) -> list[float]:
        """Forward, forward of one part of the experts or the rows, dX, dW, joining rows for dW."""
        counts = GroupRows(self._counts)
        mlp = ExpertMLP(counts=counts, activation=None)
        _, kept = mlp_forward(self._x, self._p, self._w1, self._w2, mlp)
        h, a = kept[4], kept[5]

        def run_part() -> None:
            experts = slice(0, len(self._counts) if self._once else len(self._counts) // self.parts)
            own = GroupRows([rows // self.parts if self._once else rows for rows in self._counts[experts]])
            rows = slice(0, sum(own))
            some = ExpertMLP(counts=own, activation=None)
            mlp_forward(self._x[rows], self._p[rows], self._w1[experts], self._w2[experts], some)

        self._dw: Callable[[], Any] = lambda: (
            kernels_of(a).grouped_dw(a, self._x, counts),
            kernels_of(a).grouped_dw(self._x, h, counts),
        )
        return [
            self._ms(lambda: mlp_forward(self._x, self._p, self._w1, self._w2, mlp))[0],
            self._ms(run_part)[0],
            self._ms(lambda: mlp_backward(self._x, kept, mlp))[0],
            self._ms(self._dw)[0],
            self._ms(lambda: self._join(a, h))[0] if self._once else 0.0,
        ]

    def _join(self, a: torch.Tensor, h: torch.Tensor) -> None:
        """The copies that chunks of tokens need before dW: each operand's rows, by expert."""
        places = torch.arange(self._x.shape[0], device=self._x.device)
        for rows in (a, self._x, self._x, h):
            torch.empty_like(rows).index_copy_(0, places, rows)

    def exchange_ms(self, transport: Transport) -> list[float]:
        """The whole exchange, a small one, the whole one beside dW, and the spread of these. Collective."""
        sent = self._sent
        small = sent[: sent.shape[0] // _FEWER]

        def exchange(rows: torch.Tensor, beside: Callable[[], Any] = lambda: None) -> None:
            work = transport.start(torch.empty_like(rows), rows, None, None, self._group)
            beside()
            work.wait()

        found = [
            self._ms(lambda: exchange(sent), together=True),
            self._ms(lambda: exchange(small), together=True),
            self._ms(lambda: exchange(sent, self._dw), together=True),
        ]
        return [*(ms for ms, _ in found), max(spread for _, spread in found)]

    def _ms(self, call: Callable[[], Any], together: bool = False) -> tuple[float, float]:
        """Median and spread (between the quartiles) of a call; ``together``: ranks start each round at once."""
        times = []
        for _ in range(_WARM_UP + _ROUNDS):
            self._place.device.synchronize()
            if together:
                dist.barrier(group=self._group)
            start, end = self._place.device.event(), self._place.device.event()
            start.record()
            call()
            end.record()
            times.append(end.elapsed_ms(start))
        kept = sorted(times[_WARM_UP:])
        return median(kept), kept[3 * len(kept) // 4] - kept[len(kept) // 4]
