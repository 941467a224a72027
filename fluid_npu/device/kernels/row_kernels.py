"""Operators on rows, such as permute, routing and activations, in Triton where they passed a check, else plain torch.

The check runs when a kernel first meets a dtype, on a few rows. T tokens, N rows, H hidden, F ffn, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.base import DeviceUnavailable
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.activations import FORMS, ActivationProbs
from fluid_npu.device.kernels.agreement import Agreement, of_this_job
from fluid_npu.device.kernels.base import Kernels, RowLayout
from fluid_npu.device.kernels.bounded_check import pairs_of_bounded
from fluid_npu.device.kernels.once_check import pairs_of_once
from fluid_npu.device.kernels.static_check import pairs_of_static
from fluid_npu.device.kernels.triton_support import ROW_KERNELS, load, setting, triton_on

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the largest entry
_ROWS, _WIDTH = 24, 72
_MAX_EXPERTS, _MAX_CHUNKS = 1024, 8192  # what one program of the routing kernels holds
#: torch's own is one launch too, and the host launches it faster: 44 us against 60 for 8192 rows of 4096 on an H200.
_ONE_LAUNCH = ("permute",)


class RowKernels:
    """Decides for each kernel and dtype whether Triton's form is used, once for all ranks of the job.

    Args:
        plain: what is right by definition and used where Triton is not.
        agreement: how the ranks agree; None takes the job's.
    """

    def __init__(self, plain: Kernels, agreement: Agreement | None = None) -> None:
        self._plain = plain
        self._agreement = agreement
        self._decided: dict[tuple[str, torch.dtype], bool] = {}

    def takes(self, kernel: str, x: Tensor, *more: Tensor) -> bool:
        """Whether Triton's ``kernel`` computes this call; the first call of a dtype checks it.

        Raises DeviceUnavailable when the environment forces Triton and it does not work.
        """
        if any(t.dim() == 0 or t.stride(-1) != 1 for t in (x, *more)) or x.dtype not in _TOLERANCE:
            return False
        return self._known(kernel, x)

    def packs(self, hidden: int, wire: torch.dtype, x: Tensor) -> bool:
        """Whether Triton moves payload rows of ``hidden`` columns of the dtype of x, with tails of dtype ``wire``."""
        return (
            wire.itemsize >= x.element_size()
            and hidden * x.element_size() % wire.itemsize == 0
            and (self.takes("payload", x))
        )

    def activates(self, activation: ActivationProbs, h: Tensor, *more: Tensor) -> bool:
        """Whether Triton computes this activation times probability, and its gradients."""
        if activation.form is None:
            _announce_unknown(activation.title)
            return False
        return self.takes(activation.title, h, *more)

    def routes(self, map_TE: Tensor) -> bool:
        """Whether Triton finds the rows of this routing map."""
        return _is_plain_map(map_TE) and self._known("routed rows", map_TE)

    def bounds(self, map_TE: Tensor) -> bool:
        """Whether Triton finds the rows of this routing map in blocks of a fixed size."""
        return _is_plain_map(map_TE) and self._known("bounded rows", map_TE)

    def orders(self, counts_CL: Tensor) -> bool:
        """Whether Triton finds the order of these chunks."""
        fits = counts_CL.dtype == torch.int64 and counts_CL.numel() <= _MAX_CHUNKS
        return fits and self._known("chunk order", counts_CL)

    def _known(self, kernel: str, x: Tensor) -> bool:
        known = self._decided.get((kernel, x.dtype))
        if known is None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return False  # a check would synchronise; asked again after the capture
            known = self._decided[kernel, x.dtype] = self._decide(kernel, x)
        return known

    def _decide(self, kernel: str, x: Tensor) -> bool:
        wanted = setting(ROW_KERNELS, ("auto", "torch", "triton"))
        if wanted == "torch" or (wanted == "auto" and kernel in _ONE_LAUNCH):
            return False
        what = f"{kernel} of {str(x.dtype).removeprefix('torch.')}"
        answer = (self._agreement or of_this_job())(what, lambda: _answer(self._check(kernel, x)))
        chosen = _choice(answer)
        if wanted == "triton" and not chosen.value:
            raise DeviceUnavailable(f"{ROW_KERNELS}=triton: {chosen.reason}; unset it to use plain torch there")
        Choice("triton" if chosen.value else "torch", chosen.reason).announce(what)
        return chosen.value

    def _check(self, kernel: str, x: Tensor) -> Choice[bool]:
        found = triton_on(x.device)
        if not found.value:
            return found
        try:
            worst = _CHECKS[kernel](self._plain, x.dtype, x.device)
        except Exception as error:  # a kernel that does not compile here must not end the training
            return Choice(False, f"its check failed with {type(error).__name__}: {str(error)[:300]}")
        if not worst <= _TOLERANCE.get(x.dtype, 0.0):
            return Choice(False, f"its check was off by {worst:.1e} of the largest entry")
        return Choice(True, f"one launch, {found.reason}, off by {worst:.0e} in its check")


def _is_plain_map(map_TE: Tensor) -> bool:
    return map_TE.dtype == torch.bool and map_TE.is_contiguous() and map_TE.shape[1] <= _MAX_EXPERTS


def gather(x_TH: Tensor, layout: RowLayout) -> Tensor:
    """``Kernels.permute``."""
    return load("triton_permute").gather_rows(x_TH, layout.token_of_row)


def gathered_sum(x_NH: Tensor, layout: RowLayout) -> Tensor:
    """``Kernels.unpermute``."""
    module = load("triton_permute")
    most = getattr(layout, "most_rows", None)  # a layout need not know it
    return module.sum_rows(x_NH, layout.row_of_pair, layout.bag_offsets, layout.pairs_per_token, most)


def summed_payload(payload_NW: Tensor, hidden: int, wire: torch.dtype, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """``Kernels.sum_payload``."""
    shape = (hidden, layout.num_experts, layout.pairs_per_token)
    sums: tuple[Tensor, Tensor] = load("triton_payload").sum_payload(
        payload_NW, wire, layout.row_of_pair, layout.bag_offsets, layout.pair_index, shape
    )
    return sums


def activated(activation: ActivationProbs, h: Tensor, p_R: Tensor, ends_L: Tensor | None = None) -> Tensor:
    """``Kernels.activation_probs`` of an activation that has a form; ``ends_L`` where the last rows are not in use."""
    module = load("triton_activations")
    a_RF: Tensor = module.activation_probs(h, p_R, activation.form, activation.gated, ends_L)
    return a_RF


def activated_grad(
    activation: ActivationProbs, da_RF: Tensor, h: Tensor, p_R: Tensor, ends_L: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``Kernels.activation_probs_grad``, as ``activated``."""
    grads: tuple[Tensor, Tensor]
    grads = load("triton_activations").activation_probs_grad(da_RF, h, p_R, activation.form, activation.gated, ends_L)
    return grads


@cache
def _announce_unknown(title: str) -> None:
    reason = f"fused launches are for {', '.join(FORMS)}, known by the function object; this is another"
    Choice("torch, by autograd", reason).announce(f"{title} times probability")


def _answer(choice: Choice[bool]) -> str:
    return f"{'yes' if choice.value else 'no'} {choice.reason}"


def _choice(answer: str) -> Choice[bool]:
    value, _, reason = answer.partition(" ")
    return Choice(value == "yes", reason)


class _Layout:
    """Two rows a token, the last token's last."""

    def __init__(self, uniform: bool, device: torch.device) -> None:
        tokens = torch.arange(_ROWS // 2, device=device)
        self.num_tokens = _ROWS // 2
        self.num_experts = 2
        self.pairs_per_token = 2 if uniform else None
        self.token_of_row = torch.cat([tokens.flip(0), tokens])
        self.row_of_pair = torch.sort(self.token_of_row, stable=True)[1]
        self.bag_offsets = 2 * tokens
        self.pair_index = 2 * self.token_of_row + torch.arange(_ROWS, device=device) // self.num_tokens
        self.experts_TK = None


def _check_permute(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    layout = _Layout(True, device)
    x = _random(layout.num_tokens, _WIDTH, dtype, device)
    return worst_error([gather(x, layout)], [plain.permute(x, layout)])


def _check_unpermute(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    x = _random(_ROWS, _WIDTH, dtype, device)
    layouts = [_Layout(uniform, device) for uniform in (True, False)]
    return worst_error([gathered_sum(x, y) for y in layouts], [plain.unpermute(x, y) for y in layouts])


def _check_activation(activation: ActivationProbs, plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    """Forward and gradients."""
    with torch.inference_mode(False):  # plain torch's gradients are autograd's, which a first call may have off
        h, p = _random(_ROWS, _WIDTH, dtype, device), _random(_ROWS, 1, torch.float32, device).view(-1)
        da = _random(_ROWS, _WIDTH // 2 if activation.gated else _WIDTH, dtype, device)
        got = [activated(activation, h, p), *activated_grad(activation, da, h, p)]
        wanted = [plain.activation_probs(h, p, activation), *plain.activation_probs_grad(da, h, p, activation)]
    return worst_error(got, wanted)


def _check_norm(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    x, dy = (_random(_ROWS, _WIDTH, dtype, device) for _ in range(2))
    gamma, module = _random(1, _WIDTH, dtype, device).view(-1), load("triton_rms_norm")
    y, rstd = module.rms_norm(x, gamma, 1e-5)
    wanted, wanted_rstd = plain.rms_norm(x, gamma, 1e-5)
    grads = module.rms_norm_grad(dy, x, gamma, rstd)
    return worst_error([y, rstd, *grads], [wanted, wanted_rstd, *plain.rms_norm_grad(dy, x, gamma, wanted_rstd)])


def _check_payload(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    """All four directions, with probabilities in fp32."""
    module, order = load("triton_payload"), torch.arange(_ROWS, device=device).flip(0)
    got: list[Tensor] = []
    wanted: list[Tensor] = []
    for layout in (_Layout(True, device), _Layout(False, device)):
        x, p = _random(layout.num_tokens, _WIDTH, dtype, device), _random(layout.num_tokens, 2, torch.float32, device)
        payload = plain.pack_tokens(x, p, layout)
        got += [module.pack_tokens(x, p, layout.token_of_row, layout.pair_index)]
        got += summed_payload(payload, _WIDTH, torch.float32, layout)
        wanted += [payload, *plain.sum_payload(payload, _WIDTH, torch.float32, layout)]
        for rows in (order, None):
            unpacked = plain.unpack_rows(payload, _WIDTH, torch.float32, rows)
            got += [*module.unpack_rows(payload, _WIDTH, torch.float32, rows), module.pack_rows(*unpacked, rows)]
            wanted += [*unpacked, payload]
    return worst_error(got, wanted)


def _check_e4m3(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    """Coded and decoded rows bit by bit: as numbers coded rows mean nothing."""
    module, x = load("triton_e4m3"), _random(_ROWS, _WIDTH, dtype, device)
    coded = plain.to_e4m3(x)
    got, wanted = [module.to_e4m3(x), module.from_e4m3(coded, _WIDTH)], [coded, plain.from_e4m3(coded, _WIDTH)]
    return _unequal([rows.view(torch.uint8) for rows in got], [rows.view(torch.uint8) for rows in wanted])


def _check_once(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    got, wanted = zip(*pairs_of_once(dtype, device, _random), strict=True)
    return worst_error(got, wanted)


def _check_static(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    got, wanted = zip(*pairs_of_static(dtype, device, _random), strict=True)
    return worst_error(got, wanted)


def _check_routed_rows(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    chosen = torch.sin(torch.arange(_ROWS * 5, device=device) * 0.7).view(_ROWS, 5) > 0.3
    counts = chosen.sum(0)
    found = load("triton_routing").routed_rows(chosen, int(counts.sum()))
    return _unequal(found, plain.routed_rows(chosen, int(counts.sum()), None)._replace(counts_E=counts))


def _check_bounded_rows(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    return _unequal(*zip(*pairs_of_bounded(device), strict=True))


def _check_chunk_order(plain: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    counts = torch.tensor([[3, 0, 5], [1, 2, 0]], device=device)
    wanted = plain.chunk_order(counts, counts.cpu())._replace(ends_L=counts.sum(0).cumsum(0).int())
    return _unequal(load("triton_routing").chunk_order(counts, 11), wanted)


def _unequal(got: Sequence[Tensor], wanted: Sequence[Any]) -> float:
    return 0.0 if all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)) else float("inf")


#: Every form by its own function, not by a caller's, which may be one that torch.compile has yet to compile.
_ACTIVATIONS = [
    ActivationProbs(function=function, gated=gated, known_as=form)
    for form, function in FORMS.items()
    for gated in (False, True)
]

_CHECKS: dict[str, Callable[[Kernels, torch.dtype, torch.device], float]] = {
    "permute": _check_permute,
    "unpermute": _check_unpermute,
    "payload": _check_payload,
    "once": _check_once,
    "static": _check_static,
    "e4m3": _check_e4m3,
    "routed rows": _check_routed_rows,
    "bounded rows": _check_bounded_rows,
    "chunk order": _check_chunk_order,
    "rms_norm": _check_norm,
    **{activation.title: partial(_check_activation, activation) for activation in _ACTIVATIONS},
}


def _random(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not random numbers: a check must not move the generators of a training run.
    return torch.sin(torch.arange(rows * width, device=device, dtype=torch.float32) * 0.7).view(rows, width).to(dtype)


def worst_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference as a share of the largest entry, over all tensors; infinite for a wrong shape."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        size: Any = b.double().abs().max().clamp_min(1e-30)
        error = float((a.double() - b.double()).abs().max() / size)
        worst = max(worst, error if error == error else float("inf"))
    return worst
