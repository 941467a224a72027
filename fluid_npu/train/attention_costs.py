"""What the attention of one layer of a run costs here under context parallelism, for ``schedule.attention_planner``.

Measured before the model is built, on the job's context-parallel group, with operands of the layer's shapes. Each
figure is the median of a few rounds on the slowest rank, so the table is the same on all ranks. T rows of this rank,
S of the sequence, B batch, N query and M key heads of a tensor-parallel rank, P context-parallel ranks, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.device import Choice
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.ops.attention import fused_attention, fuses_attention
from fluid_npu.schedule.attention_planner import AttentionCosts
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.measured import FEWER, MIB, everywhere, exchange_ms, link_costs, slowest, timed
from fluid_npu.train.model import TORCH_DTYPES
from fluid_npu.train.parallel import Place


def measure_attention(
    config: TrainConfig, place: Place, transport: Transport | None = None
) -> Choice[AttentionCosts | None]:
    """The costs, the same on all ranks; None with the reason where a rank had no memory for it. Collective."""
    made: _Attention | None = None
    try:
        attention = _Attention(config, place)
        compute, made = attention.compute_ms(), attention
    except torch.OutOfMemoryError:
        compute = []
    if not everywhere(place, made is not None):
        return Choice(None, "a rank had no memory for a measurement of the layer's attention")
    assert made is not None
    exchange = made.exchange_ms(transport if transport is not None else CollectiveTransport())
    return Choice(_costs(made, slowest(place, [*compute, *exchange])), "measured")


def _costs(made: _Attention, figures: list[float]) -> AttentionCosts:
    qkv, qkv_dx, core, core_both, half, proj, proj_dx, dw, whole, small, beside, spread = figures
    link = link_costs(whole, small, beside, dw, made.to_heads_mib)
    return AttentionCosts(
        qkv_ms=(qkv, qkv_dx),
        core_ms=(core, max(0.0, core_both - core)),
        proj_ms=(proj, proj_dx),
        dw_ms=dw,
        alpha_ms=link.alpha_ms,
        beta_ms_per_mib=link.beta_ms_per_mib,
        to_heads_mib=made.to_heads_mib,
        to_rows_mib=made.to_rows_mib,
        chunk_ms=max(0.0, 2 * half - core) if made.halves else 0.0,
        hiding=link.hiding,
        spread_ms=spread,
    )


class _Attention:
    """Operands of one layer's attention of this rank."""

    def __init__(self, config: TrainConfig, place: Place) -> None:
        preset, self._place = config.model(), place
        self._group, ranks = parallel_state.get_context_parallel_group(), config.cp
        heads, keys = preset.heads // config.tp, max(1, preset.kv_heads // config.tp)
        self._heads, self._keys = heads // ranks, lcm(keys, ranks) // ranks
        self.size, batch, total = preset.channels, preset.micro_batch_size, preset.seq_length
        #: Whether this rank's heads make two chunks, from which the cost of one more is taken.
        self.halves = self._heads % 2 == 0
        columns, rows = (heads + 2 * keys) * self.size, total // ranks * batch
        made: dict[str, Any] = {
            "dtype": TORCH_DTYPES[config.dtype or "fp32"],
            "device": place.device.torch_device(place.local_rank),
        }
        self._x, self._mixed = (
            torch.full((rows, preset.hidden), 0.01, **made),
            torch.full((rows, columns), 0.01, **made),
        )
        self._qkv = torch.full((columns, preset.hidden), 0.01, **made)
        self._out = torch.full((rows, heads * self.size), 0.01, **made)
        self._proj = torch.full((preset.hidden, heads * self.size), 0.01, **made)
        self._q = torch.full((total, batch, self._heads, self.size), 0.01, **made)
        self._k = torch.full((total, batch, self._keys, self.size), 0.01, **made)
        sent = (heads + 2 * lcm(keys, ranks)) * self.size
        self._sent = torch.full((max(1, rows // (ranks * FEWER)) * ranks * FEWER, sent), 0.01, **made)
        self.to_heads_mib = self._sent.nbytes * (ranks - 1) / ranks / MIB
        self.to_rows_mib = self.to_heads_mib * heads * self.size / sent

    def compute_ms(self) -> list[float]:
        """qkv and its dX, attention, forward with backward, of half the heads, projection and its dX, all dW."""
        x, mixed, out, q, k = self._x, self._mixed, self._out, self._q, self._k
        self._dw: Callable[[], Any] = lambda: (mixed.t() @ x, x.t() @ out)
        halves = (q[:, :, : max(1, self._heads // 2)], k[:, :, : max(1, self._keys // 2)])
        calls: tuple[Callable[[], Any], ...] = (
            lambda: x @ self._qkv.t(),
            lambda: mixed @ self._qkv,
            lambda: _attend(q, k),
            lambda: _attend_and_back(q, k),
            lambda: _attend(*halves),
            lambda: out @ self._proj.t(),
            lambda: x @ self._proj,
            self._dw,
        )
        return [timed(self._place, call)[0] for call in calls]

    def exchange_ms(self, transport: Transport) -> list[float]:
        """As ``measured.exchange_ms``, of the rows that go to heads. Collective."""
        return exchange_ms(self._place, transport, self._group, self._sent, self._dw)


def _attend(q_SBND: Tensor, k_SBMD: Tensor) -> Tensor:
    """Causal attention as a layer would compute it: the device's fused one, else products and a softmax."""
    call = AttentionCall(heads=q_SBND.shape[2], scale=q_SBND.shape[3] ** -0.5, causal=True)
    if fuses_attention(q_SBND, k_SBMD, k_SBMD, call).value:
        return fused_attention(q_SBND, k_SBMD, k_SBMD, call)
    q, k = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBMD))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    return F.softmax((q @ k.transpose(-1, -2) * call.scale).masked_fill(hidden, float("-inf")), -1) @ k


def _attend_and_back(q_SBND: Tensor, k_SBMD: Tensor) -> None:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q_SBND, k_SBMD)]
        out = _attend(*leaves)
        torch.autograd.grad(out, leaves, out.detach())
