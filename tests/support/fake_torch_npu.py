"""A stand-in for torch_npu that records calls, enforces the documented contracts and computes on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fluid_npu.device.kernels.torch_kernels import TorchKernels
from fluid_npu.ops import reference


class FakeTorchNpu:
    """Records every call; raises where the real operator refuses."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def npu_grouped_matmul(self, x, weight, *, group_list, split_item, group_type, group_list_type):
        self.calls.append(("npu_grouped_matmul", dict(group_list=group_list, group_type=group_type, weight=weight)))
        assert len(x) == len(weight) == 1 and split_item == 3 and group_list_type == 0
        assert group_list.dtype == torch.int64 and 1 < len(group_list) <= 1024
        counts = counts_of_ends(group_list)
        if group_type == 0:
            return [reference.grouped_matmul(x[0], weight[0], counts).to(x[0].dtype)]
        assert group_type == 2 and x[0].stride(0) == 1  # x^T is a view, never a copy
        return [reference.grouped_dw(x[0].t(), weight[0], counts).to(x[0].dtype)]

    def npu_grouped_matmul_add_(
        self,
        self_,
        x,
        weight,
        group_list,
        *,
        transpose_x=True,
        transpose_weight=False,
        group_type=2,
        group_list_type=0,
    ):
        self.calls.append(("npu_grouped_matmul_add_", dict(group_list=group_list)))
        assert self_.dtype == torch.float32 and x.dtype == weight.dtype in (torch.bfloat16, torch.float16)
        assert transpose_x and not transpose_weight and group_type == 2
        assert x.numel() and weight.numel() and group_list.dtype == torch.int64
        # The real operator ignores group_list_type here: the list is always read as ends.
        self_.add_(reference.grouped_dw(x, weight, counts_of_ends(group_list)).float())

    def npu_moe_token_permute(self, tokens, indices, num_out_tokens=None, padded_mode=False):
        self.calls.append(("npu_moe_token_permute", dict(indices=indices)))
        assert indices.dtype in (torch.int32, torch.int64) and indices.shape[1] <= 512 and not padded_mode
        order = torch.argsort(indices.reshape(-1), stable=True)
        return tokens[order // indices.shape[1]], torch.argsort(order).int()

    def npu_moe_token_unpermute(self, permuted, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
        self.calls.append(("npu_moe_token_unpermute", dict(sorted_indices=sorted_indices)))
        assert sorted_indices.dtype == torch.int32 and probs is not None
        tokens, topk = probs.shape
        return (permuted[sorted_indices.long()].view(tokens, topk, -1) * probs.unsqueeze(-1)).sum(1)

    def npu_swiglu(self, x, dim=-1):
        self.calls.append(("npu_swiglu", {}))
        assert x.is_contiguous() and x.numel() and dim == -1
        x0, x1 = x.chunk(2, -1)
        return F.silu(x0) * x1

    def npu_swiglu_backward(self, grad, x, dim=-1):
        self.calls.append(("npu_swiglu_backward", {}))
        assert grad.dtype == x.dtype and x.is_contiguous()
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            x0, x1 = leaf.chunk(2, dim)
            return torch.autograd.grad(F.silu(x0) * x1, leaf, grad)[0]

    def npu_rms_norm(self, x, gamma, epsilon=1e-6):
        self.calls.append(("npu_rms_norm", dict(epsilon=epsilon)))
        return TorchKernels().rms_norm(x, gamma, epsilon)

    def npu_rms_norm_backward(self, dy, x, gamma, rstd):
        self.calls.append(("npu_rms_norm_backward", {}))
        dx, dgamma = TorchKernels().rms_norm_grad(dy, x, gamma, rstd)
        return dx, dgamma.float()

    def npu_rotary_mul(self, x, cos, sin, rotary_mode="half", rotate=None):
        self.calls.append(("npu_rotary_mul", dict(rotary_mode=rotary_mode)))
        assert x.is_contiguous() and cos.dtype == x.dtype and rotate is None
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def npu_rotary_mul_backward(self, grad, x, cos, sin, rotary_mode="half"):
        self.calls.append(("npu_rotary_mul_backward", dict(x=x)))
        a, b = (grad * sin).chunk(2, -1)
        return grad * cos + torch.cat((b, -a), -1), None, None

    def npu_fusion_attention(self, q, k, v, heads, layout, *, scale, **options):
        self.calls.append(("npu_fusion_attention", options))
        assert layout == "SBH" and all(x.is_contiguous() for x in (q, k, v))
        scores, _, values = scores_of(q, k, v, heads, scale, options)
        largest = scores.amax(-1, True)
        total = (scores - largest).exp().sum(-1, True)
        rows = (x.expand(*x.shape[:-1], 8).contiguous() for x in (largest, total))
        seed = int(torch.randint(2**31, ())) if "keep_prob" in options else 0
        weights = scores.softmax(-1) * kept_of(scores, seed, options)
        return heads_last(weights @ values).to(q.dtype), *rows, None, seed, 0, scores.numel()

    def npu_fusion_attention_grad(
        self,
        q,
        k,
        v,
        dy,
        heads,
        layout,
        *,
        softmax_max,
        softmax_sum,
        attention_in,
        scale_value,
        seed=0,
        offset=0,
        numels=0,
        **options,
    ):
        """Reads the softmax from its largest scores and sums, and the output, as the real one: not from the keys."""
        self.calls.append(("npu_fusion_attention_grad", options))
        assert layout == "SBH" and all(x.is_contiguous() for x in (q, k, v, dy, attention_in, softmax_max, softmax_sum))
        assert softmax_max.shape[-1] == softmax_sum.shape[-1] == 8 and softmax_max.dtype == torch.float32
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            scores, _, values = scores_of(*leaves, heads, scale_value, options)
            weights = ((scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]).detach()
            factors = kept_of(scores, seed, options)
            assert "keep_prob" not in options or (offset, numels) == (0, scores.numel())
            gradient, out = (x.float().unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for x in (dy, attention_in))
            dscores = weights * (factors * (gradient @ values.mT) - (gradient * out).sum(-1, True)).detach()
            total = (scores.masked_fill(weights == 0, 0) * dscores).sum() + (
                (weights * factors @ values) * gradient
            ).sum()
        return *torch.autograd.grad(total, leaves), None, None


def scores_of(q, k, v, heads, scale, options):
    """[B, N, S, T] what the softmax reads, and keys and values of each query head: at least in fp32.

    In a mask 1 hides; modes 2 and 4 want the compressed mask and mean causal and a band, 1 means any mask.
    """
    queries, batch, width = q.shape
    keys, size = k.shape[0], width // heads
    shared = k.shape[2] // size
    q, k, v = (
        wide(x).view(len(x), batch, n, -1).permute(1, 2, 0, 3) for x, n in ((q, heads), (k, shared), (v, shared))
    )
    k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    mask = options.get("atten_mask")
    if options.get("sparse_mode") in (2, 4):
        assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        behind = torch.arange(queries)[:, None] - torch.arange(keys)[None] + keys - queries
        mask = behind < 0
        if options["sparse_mode"] == 4:
            mask = (behind > options["pre_tockens"]) | (behind < -options["next_tockens"])
    return scores if mask is None else scores.masked_fill(mask.bool(), -torch.inf), k, v


def plain_attention(q, k, v, heads, scale, options):
    """What the real operator computes, ``[S, B, N * V]``."""
    scores, _, values = scores_of(q, k, v, heads, scale, options)
    return heads_last(scores.softmax(-1) @ values).to(q.dtype)


def kept_of(scores, seed, options):
    """What the probabilities are multiplied by: the same seed, the same of them."""
    keep = options.get("keep_prob", 1.0)
    return torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).lt(keep) / keep


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def heads_last(x_BNSV):
    return x_BNSV.permute(2, 0, 1, 3).flatten(2)


def counts_of_ends(ends: torch.Tensor) -> list[int]:
    given = ends.tolist()
    counts = [end - start for start, end in zip([0, *given], given, strict=False)]
    assert all(count >= 0 for count in counts), "group_list must not decrease: were counts passed?"
    return counts
