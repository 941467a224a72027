"""Does ``triton_bounded`` compute here what a loop over tokens says, on a small map?"""

from __future__ import annotations

import torch
from torch import Tensor

from fluid_npu.device.kernels.triton_support import load

_TOKENS, _LOCAL = 19, 3
#: Of four groups: more rows than are wanted, too few, a closed group, and none.
_ROOMS = (17, 4, -1, 0)


def pairs_of_bounded(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(what the kernel gave, what it should be) for each tensor, all on the CPU."""
    module, groups = load("triton_bounded"), len(_ROOMS)
    chosen = torch.sin(torch.arange(_TOKENS * groups * _LOCAL) * 0.7).view(_TOKENS, -1) > 0.6
    told = torch.full((1 + groups,), -1, dtype=torch.int32, device=device)
    room_G, total = torch.tensor(_ROOMS, device=device), sum(max(room, 0) for room in _ROOMS)
    rows, seen = module.bounded_rows(chosen.to(device), room_G, total, told, True)
    _, whole = module.bounded_rows(chosen.to(device), room_G.clamp(min=0), total, told.clone(), False)
    kept = chosen.clone()
    for group, room in enumerate(_ROOMS):
        if room < 0:
            kept[:, group * _LOCAL : (group + 1) * _LOCAL] = False
    wanted = kept.view(_TOKENS, groups, _LOCAL).any(2).tolist()
    found: list[tuple[int, int]] = []
    for group, room in enumerate(_ROOMS):
        order = sorted(range(_TOKENS), key=lambda token, group=group: not wanted[token][group])
        found += [(token, group) for token in order[: max(room, 0)]]
    by_token = sorted(range(total), key=lambda row: (not wanted[found[row][0]][found[row][1]], found[row]))
    starts = [sum(t < token and wanted[t][g] for t, g in found) for token in range(_TOKENS)]
    short = any(sum(of[group] for of in wanted) > max(room, 0) for group, room in enumerate(_ROOMS))
    pairs = kept.view(_TOKENS, groups, _LOCAL).sum((0, 2)).tolist()
    results = [
        (rows.token_of_row, torch.tensor([token for token, _ in found])),
        (rows.pair_index, torch.tensor([token * groups + group for token, group in found])),
        (rows.row_of_pair, torch.tensor(by_token)),
        (rows.bag_offsets, torch.tensor(starts)),
        (told, torch.tensor([int(short), *pairs], dtype=torch.int32)),
        (seen, kept),
        (whole, chosen),
    ]
    return [(got.cpu(), should_be) for got, should_be in results]
