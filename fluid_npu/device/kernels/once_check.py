"""Does ``triton_once`` compute here what a loop over tokens says, on a few rows? Two ranks' worth of one dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluid_npu.device.kernels.routed import RoutedRows, Slots
from fluid_npu.device.kernels.triton_support import load

_TOKENS, _GROUPS, _LOCAL, _TOPK, _HIDDEN = 9, 3, 2, 3, 24

Random = Callable[[int, int, torch.dtype, torch.device], Tensor]


def pairs_of_once(dtype: torch.dtype, device: torch.device, random: Random) -> list[tuple[Tensor, Tensor]]:
    """(what the kernels gave, what it should be) for each tensor, all on the CPU."""
    module, slots = load("triton_once"), Slots(2, 4, torch.float32, _LOCAL)
    map_TE = _map().to(device)
    x, p = random(_TOKENS, _HIDDEN, dtype, device), random(_TOKENS, _GROUPS * _LOCAL, torch.float32, device)
    wanted_rows = [(g, t) for g in range(_GROUPS) for t in range(_TOKENS) if _members(g, t)]
    room: RoutedRows = module.once_rows(map_TE, _GROUPS, _TOPK)
    found = room._replace(**{name: getattr(room, name)[: len(wanted_rows)] for name in _INDICES})
    payload = module.pack_once(x, p, map_TE, found, slots)
    pairs = [(found.pair_index, torch.tensor([t * _GROUPS + g for g, t in wanted_rows]))]
    pairs += [(found.token_of_row, torch.tensor([t for _, t in wanted_rows]))]
    pairs += [(payload[:, :_HIDDEN], torch.stack([x[t] for _, t in wanted_rows]))]
    dx, dp = module.sum_once(payload, map_TE, found, slots, _TOPK)
    of_token = [[row for row, (_, t) in enumerate(wanted_rows) if t == token] for token in range(_TOKENS)]
    sums = torch.stack([payload[rows, :_HIDDEN].float().sum(0) for rows in of_token])
    pairs += [(dx.float(), sums.to(dtype).float()), (dp, torch.where(map_TE, p, 0.0))]
    return [(got.cpu(), wanted.cpu()) for got, wanted in [*pairs, *_arrival(module, payload, slots, wanted_rows, x, p)]]


_INDICES = ("token_of_row", "row_of_pair", "pair_index")


def _arrival(
    module: object, payload: Tensor, slots: Slots, sent: list[tuple[int, int]], x: Tensor, p: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The rows of one group arrive: they become rows of experts, and gradients of those become rows again."""
    tokens = [t for g, t in sent if g == 1]
    first = sum(g == 0 for g, _ in sent)
    arrived = payload[first : first + len(tokens)]
    wanted = [(e, m) for e in range(_LOCAL) for m, t in enumerate(tokens) if e in _members(1, t)]
    rows: RoutedRows = module.arrived_rows(arrived, slots, len(wanted))  # type: ignore[attr-defined]
    x_R, p_R = module.expand_rows(arrived, rows, slots)  # type: ignore[attr-defined]
    back = module.reduce_rows(x_R, p_R, rows, slots)  # type: ignore[attr-defined]
    index = torch.tensor([tokens[m] for _, m in wanted])
    experts = torch.tensor([_LOCAL + e for e, _ in wanted])
    times = torch.tensor([len(_members(1, t)) for t in tokens], device=x.device).unsqueeze(1)
    tails = arrived[:, _HIDDEN:].view(torch.float32)[:, :2], back[:, _HIDDEN:].view(torch.float32)[:, :2]
    return [
        (rows.token_of_row, torch.tensor([m for _, m in wanted])),
        (x_R, x[index.to(x.device)]),
        (p_R, p.cpu()[index, experts]),
        (back[:, :_HIDDEN].float(), (arrived[:, :_HIDDEN].float() * times).to(x.dtype).float()),
        (tails[1], tails[0]),
    ]


def _map() -> Tensor:
    """[T, E]: token t chooses up to three of six experts, some of them of one group, the last one none."""
    chosen = torch.zeros(_TOKENS, _GROUPS * _LOCAL, dtype=torch.bool)
    for token in range(_TOKENS - 1):
        chosen[token, [token % 6, (2 * token + 1) % 6, (token // 2 + 3) % 6]] = True
    return chosen


def _members(group: int, token: int) -> list[int]:
    return [e for e in range(_LOCAL) if bool(_map()[token, group * _LOCAL + e])]
