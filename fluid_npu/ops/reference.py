"""Independent references in float64: plain loops over groups, tokens and rows, differentiated by autograd.

Nothing here calls the operators or kernels under test. For tests only: slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def grouped_matmul(x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int]) -> Tensor:
    """[R, N] in float64: every row by itself times the weight of its group."""
    x_RK, w_LKN = x_RK.double(), w_LKN.double()
    group_of_row = [group for group, count in enumerate(counts_L) for _ in range(count)]
    rows = [x_RK[row] @ w_LKN[group] for row, group in enumerate(group_of_row)]
    return torch.stack(rows) if rows else x_RK.new_zeros(0, w_LKN.shape[2]) + 0 * (x_RK.sum() + w_LKN.sum())


def grouped_dw(x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> Tensor:
    """[L, K, N] in float64: the sum over each group's rows of their outer products."""
    dw = torch.zeros(len(counts_L), x_RK.shape[1], dy_RN.shape[1], dtype=torch.float64)
    row = 0
    for group, count in enumerate(counts_L):
        for _ in range(count):
            dw[group] += torch.outer(x_RK[row].double(), dy_RN[row].double())
            row += 1
    return dw


def routed_rows(map_TE: Tensor) -> list[tuple[int, int]]:
    """(token, expert) of each row, by expert and then token."""
    tokens, experts = map_TE.shape
    return [(t, e) for e in range(experts) for t in range(tokens) if bool(map_TE[t, e])]


def permute(x_TH: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """[N, H] in float64: the token of each row."""
    x_TH = x_TH.double()
    return torch.stack([x_TH[token] for token, _ in rows]) if rows else x_TH[:0]


def unpermute(x_NH: Tensor, rows: Sequence[tuple[int, int]], num_tokens: int) -> Tensor:
    """[T, H] in float64: the sum of each token's rows."""
    x_NH = x_NH.double()
    zero = 0 * x_NH.sum() + torch.zeros(x_NH.shape[1], dtype=torch.float64)
    sums = [zero] * num_tokens
    for row, (token, _) in enumerate(rows):
        sums[token] = sums[token] + x_NH[row]
    return torch.stack(sums)


def swiglu_probs(h_R2F: Tensor, p_R: Tensor) -> Tensor:
    """[R, F] in float64."""
    return activation_probs(h_R2F, p_R, "silu", True)


def activation_probs(h: Tensor, p_R: Tensor, form: str, gated: bool) -> Tensor:
    """[R, F] in float64: f(h) * p, or f(gate) * value * p with gate and value as halves of h."""
    h, p = h.double(), p_R.double()
    half = h.shape[1] // 2
    x, value = (h[:, :half], h[:, half:]) if gated else (h, h.new_ones(()))
    return _ACTIVATIONS[form](x) * value * p[:, None]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / 2**0.5)),
    "gelu tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "squared relu": lambda x: (x * (x > 0)) ** 2,
}


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gamma in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gamma.double()


def relative_error(got: Tensor, reference: Tensor) -> float:
    """||got - reference|| / ||reference||; where the reference is 0, 0 if got is exactly 0, else infinity."""
    got, reference = got.cpu().double(), reference.cpu().double()
    difference = (got - reference).norm().item()
    size = reference.norm().item()
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size
