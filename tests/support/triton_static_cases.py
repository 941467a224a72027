"""Checks of the Triton kernels for dispatch='static' and of experts over rows that only the device knows.

Part of ``triton_cases``, whose helpers they use: imported inside, because that module may run as a program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tokens_that_go_to_every_rank_are_those_of_plain_torch(device: str) -> None:
    """Arrival, experts' buffers and gradients beside plain torch on the CPU; slots for all, for some and for none."""
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from tests.support.triton_cases import close, random

    sizes = ((7, 6, 3, 3, torch.float16), (5, 8, 8, 2, torch.float32), (3, 40, 20, 2, torch.float32))
    kept = seam._kernels.get(device)
    for tokens, experts, topk, groups, dtype in sizes:
        routed = torch.zeros(tokens, experts, dtype=torch.bool)
        routed.scatter_(1, (random(tokens, experts, seed=tokens) + torch.arange(experts) / 3).topk(topk).indices, True)
        x, p = random(tokens, 24, dtype=dtype), random(tokens, experts, seed=1)
        wanted = static_round(routed, x, p, topk, groups)
        seam._kernels[device] = CudaKernels()
        try:
            found = static_round(routed.to(device), x.to(device), p.to(device), topk, groups)
        finally:
            seam._kernels.pop(device, None) if kept is None else seam._kernels.update({device: kept})
        for name, got in found.items():
            if name in ("ends", "p", "x", "spread"):
                assert torch.equal(got.cpu(), wanted[name]), (tokens, name)
            else:
                close(got, wanted[name].double(), dtype)


def more_rows_than_there_is_room_for_write_nothing_outside(device: str) -> None:
    """Buffers of every size up to what is asked for: the first rows are right, and what lies behind keeps its bits."""
    from fluid_npu.device.kernels.routed import Slots
    from fluid_npu.device.kernels.triton_payload import bits
    from fluid_npu.device.kernels.triton_static import _launch_spread, place_rows, reduce_rows, sum_rows
    from fluid_npu.ops.payload_once import SlotRow
    from tests.support.triton_cases import random

    received, local, hidden = 40, 5, 24
    chosen_ML = random(received, local, seed=3) > 0.2  # three slots are enough for two of five, and too few for more
    chosen_ML &= chosen_ML.cumsum(1) <= 3
    expert_MS = torch.where(chosen_ML, torch.arange(local), local).sort(1)[0][:, :3]
    row, slots = SlotRow(hidden=hidden, slots=3, wire=torch.float32), Slots(3, 8, torch.float32, local)
    payload, p_MS = random(received, row.width(torch.float32), seed=1), random(received, 3, seed=2)
    row.write(payload, p_MS, expert_MS)
    asked = int(chosen_ML.sum())
    order = [(m, int(chosen_ML[m, :e].sum())) for e in range(local) for m in range(received) if chosen_ML[m, e]]
    tokens, inside = (torch.tensor(each) for each in zip(*order, strict=True))
    ends = chosen_ML.sum(0).cumsum(0)
    payload = payload.to(device)
    for capacity in (0, 1, 16, 31, asked - 1, asked, asked + 16):
        place_MS, ends_L = place_rows(payload, slots, capacity)
        used = min(capacity, asked)
        assert ends_L.tolist() == ends.clamp(max=capacity).tolist(), capacity
        found, filled = place_MS.cpu(), (place_MS.cpu() >= 0)
        assert found.max() < capacity and torch.equal(filled.long().cummin(1)[0].bool(), filled), "not the first ones"
        assert found[tokens[:used], inside[:used]].tolist() == list(range(used)) and int(filled.sum()) == used
        x, p = torch.full((asked + 32, hidden), 7.0, device=device), torch.full((asked + 32,), 7.0, device=device)
        _launch_spread(payload, bits(payload, torch.float32), place_MS, x[:capacity], bits(p)[:capacity], hidden, 1)
        assert torch.equal(x[:used].cpu(), payload.cpu()[tokens[:used], :hidden]), capacity
        assert torch.equal(p[:used].cpu(), p_MS[tokens[:used], inside[:used]]), capacity
        assert (x[used:] == 7.0).all() and (p[used:] == 7.0).all(), (capacity, "written behind the buffer")
        x[used:], p[used:] = float("nan"), float("nan")
        wanted = torch.zeros(received, hidden).index_add_(0, tokens[:used], x[:used].cpu())
        summed = [sum_rows(x[:capacity], place_MS), reduce_rows(x[:capacity], p[:capacity], place_MS, slots)]
        for got in summed:
            assert torch.allclose(got[:, :hidden].cpu(), wanted, atol=1e-6), (capacity, "read behind the buffer")
        dp_MS = row.read_probs(summed[1]).cpu()
        assert torch.equal(dp_MS, torch.where(filled, p_MS, 0.0)), (capacity, "read behind the buffer")


def static_round(routed: Tensor, x: Tensor, p: Tensor, topk: int, groups: int) -> dict[str, Tensor]:
    """One dispatch whose rows for the last group arrive here twice, as from two ranks; gradients come back."""
    from fluid_npu.device.kernels.groups import DeviceRows
    from fluid_npu.ops.once import every_group
    from fluid_npu.ops.payload_once import PackOnce, SlotRow
    from fluid_npu.ops.payload_static import ExpandStatic, ReduceStatic, StaticArrival

    layout, tokens = every_group(routed, topk, groups), x.shape[0]
    row = SlotRow(hidden=x.shape[1], slots=layout.num_slots, wire=torch.float32)
    pack = PackOnce(layout, row)
    payload = pack.load(x, p)
    arrived = payload[-tokens:].repeat(2, 1)
    rows = DeviceRows(layout.local, 2 * tokens * layout.num_slots, tokens * topk)
    arrival = StaticArrival(experts=rows)
    expand, reduce = ExpandStatic(row, arrival), ReduceStatic(arrival)
    x_C, p_C = expand.unload(arrived)
    used = sum(rows.on_host())
    x_C[used:], p_C[used:] = float("nan"), float("inf")
    back = expand.load_grad(x_C, p_C)
    (spread,) = reduce.unload_grad(arrived[:, : x.shape[1]])
    dx, dp = pack.unload_grad(torch.cat([payload[:-tokens], back[:tokens]]))
    return {
        "ends": rows.ends(x.device, torch.int32),
        "x": x_C[:used],
        "p": p_C[:used],
        "spread": spread[:used],
        "back": back[:, : x.shape[1]],
        "sum": reduce.load(x_C),
        "dx": dx,
        "dp": dp,
    }


def experts_over_rows_that_only_the_device_knows(device: str) -> None:
    """CudaKernels, forward and backward, in buffers whose end is NaN: the results of the rows in use, by their bits."""
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.activations import ActivationProbs
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.device.kernels.groups import DeviceRows, GroupRows
    from fluid_npu.ops.expert_mlp import ExpertMLP, mlp_backward, mlp_forward
    from tests.support.triton_cases import COUNTS, ends_of, random

    kept, gelu = seam._kernels.get(device), ActivationProbs(function=F.gelu)
    seam._kernels[device] = CudaKernels()
    try:
        tries = [(counts, activation) for counts in (COUNTS, [0, 0, 0, 0]) for activation in (None, gelu)]
        # What has no launch of its own computes rows that are not in use too, and waits for nobody.
        tries += [(COUNTS, ActivationProbs(function=f, gated=f is F.relu)) for f in (torch.tanh, F.relu)]
        for counts, activation in tries:
            used, room = sum(counts), 60
            rows = DeviceRows(4, room, 42)
            rows.settle(ends_of(counts, device).int())
            x, dy = (random(room, 32, dtype=torch.float16, seed=s).to(device) for s in (0, 1))
            p = random(room, seed=2).to(device)
            up = 48 if activation is None or activation.gated else 24
            w1, w2 = (random(4, *shape, dtype=torch.float16, seed=3).to(device) for shape in ((32, up), (24, 32)))
            x[used:], dy[used:], p[used:] = float("nan"), float("inf"), float("nan")
            results = []
            for given, end in ((rows, room), (GroupRows(counts), used)):
                mlp = ExpertMLP(counts=given, activation=activation)
                if not end:
                    continue
                y, saved = mlp_forward(x[:end], p[:end], w1, w2, mlp)
                dx, dp, dw1, dw2 = mlp_backward(dy[:end], saved, mlp, (True, True))
                results.append([*(t[:used] for t in (y, dx, dp)), dw1, dw2])
            assert rows._host is None, "the host asked for the counts"
            assert all(t.isfinite().all() for t in results[0])
            assert used == 0 or all(map(torch.equal, *results))
    finally:
        seam._kernels.pop(device, None) if kept is None else seam._kernels.update({device: kept})


STATIC_CASES: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        tokens_that_go_to_every_rank_are_those_of_plain_torch,
        more_rows_than_there_is_room_for_write_nothing_outside,
        experts_over_rows_that_only_the_device_knows,
    )
}
