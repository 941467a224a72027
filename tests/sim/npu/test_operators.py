"""Every simulated operator, forward and backward, against float64 references that share no code with it."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error
from fluid_npu.sim.info import operators
from tests.sim.npu import clibrary


@pytest.fixture(scope="module", autouse=True)
def log_before(operator_log):
    """What had run before this module's tests."""
    return operator_log.now()


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, times: int = 1) -> None:
    assert got.device.type == "npu"
    assert relative_error(got.detach().cpu(), wanted.detach()) <= times * TOLERANCE[dtype]


def leaf(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One tensor on the NPU and its float64 twin on the host, of the same values."""
    rounded = x.to(dtype)
    return rounded.npu().requires_grad_(), rounded.double().requires_grad_()


@DTYPES
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 4], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("as_counts", [False, True], ids=["totals", "counts"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_grouped_matmul_by_rows(torch_npu, counts, dtype, as_counts, transposed):
    x = torch.randn(sum(counts), 8).to(dtype)
    weight = torch.randn(len(counts), 8, 5).to(dtype)
    given = weight.transpose(1, 2).contiguous().npu().transpose(1, 2) if transposed else weight.npu()
    groups = torch.tensor(counts if as_counts else list(accumulate(counts))).npu()
    y = torch_npu.npu_grouped_matmul(
        [x.npu()], [given], group_list=groups, split_item=3, group_type=0, group_list_type=int(as_counts)
    )[0]
    assert y.dtype == dtype
    close(y, reference.grouped_matmul(x, weight, counts), dtype)


@DTYPES
def test_grouped_matmul_by_the_inner_dimension(torch_npu, dtype):
    counts = [3, 0, 5]
    x, dy = torch.randn(8, 6).to(dtype), torch.randn(8, 4).to(dtype)
    ends = torch.tensor(list(accumulate(counts))).npu()
    dw = torch_npu.npu_grouped_matmul([x.npu().t()], [dy.npu()], group_list=ends, split_item=3, group_type=2)[0]
    close(dw, reference.grouped_dw(x, dy, counts), dtype)


def test_grouped_matmul_with_a_bias_and_several_weights(torch_npu):
    x, counts = torch.randn(7, 4).half(), [3, 4]
    weights, biases = [torch.randn(4, 5).half() for _ in counts], [torch.randn(5).half() for _ in counts]
    y = torch_npu.npu_grouped_matmul(
        [x.npu()],
        [weight.npu() for weight in weights],
        bias=[bias.npu() for bias in biases],
        group_list=torch.tensor(counts).npu(),
        split_item=3,
        group_type=0,
        group_list_type=1,
    )[0]
    parts = zip(x.double().split(counts), weights, biases, strict=True)
    close(y, torch.cat([part @ weight.double() + bias.double() for part, weight, bias in parts]), torch.float16)


def test_grouped_matmul_with_the_groups_as_a_list(torch_npu):
    x, weights = torch.randn(7, 4).half(), [torch.randn(4, 5).half() for _ in range(2)]
    y = torch_npu.npu_grouped_matmul([x.npu()], [w.npu() for w in weights], group_list=[3, 7], split_item=3)[0]
    close(y, torch.cat([x[:3].double() @ weights[0].double(), x[3:].double() @ weights[1].double()]), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_grouped_matmul_adds_into_fp32(torch_npu, dtype, flat):
    counts = [4, 0, 1, 6]
    x, dy = torch.randn(11, 8).to(dtype), torch.randn(11, 12).to(dtype)
    total = torch.ones(4, 8, 12).npu()
    ends = torch.tensor(list(accumulate(counts))).npu()
    for _ in range(2):
        torch_npu.npu_grouped_matmul_add_(total.view(32, 12) if flat else total, x.npu(), dy.npu(), ends)
    close(total, 1 + 2 * reference.grouped_dw(x, dy, counts), torch.float32)


def test_grouped_matmul_add_reads_counts_as_totals_on_the_910b(torch_npu):
    """op-plugin calls the first version there, which has no group_list_type: a call with counts is wrong or refused."""
    x, dy, total = torch.randn(3, 4).half(), torch.randn(3, 5).half(), torch.zeros(2, 4, 5).npu()
    torch_npu.npu_grouped_matmul_add_(total, x.npu(), dy.npu(), torch.tensor([1, 2]).npu(), group_list_type=1)
    with pytest.raises(RuntimeError, match="aclnnGroupedMatmulAdd refuses: group_list ends at the number of rows"):
        torch.npu.synchronize()


@DTYPES
@pytest.mark.parametrize("dim, shape", [(-1, (3, 8)), (1, (2, 6, 3))])
def test_swiglu(torch_npu, dtype, dim, shape):
    x, x64 = leaf(torch.randn(shape), dtype)
    y = torch_npu.npu_swiglu(x, dim=dim)
    first, second = x64.chunk(2, dim)
    y64 = first / (1 + torch.exp(-first)) * second
    dy = torch.randn(y64.shape).to(dtype)
    y.backward(dy.npu())
    y64.backward(dy.double())
    close(y, y64, dtype)
    close(x.grad, x64.grad, dtype)


@DTYPES
@pytest.mark.parametrize("gamma_is_float", [False, True])
def test_rms_norm(torch_npu, dtype, gamma_is_float):
    gamma_dtype = torch.float32 if gamma_is_float else dtype
    x, x64 = leaf(torch.randn(3, 4, 16), dtype)
    gamma, gamma64 = leaf(torch.rand(16) + 0.5, gamma_dtype)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 1e-5)
    y64 = reference.rms_norm(x64, gamma64, 1e-5)
    dy = torch.randn(3, 4, 16).to(dtype)
    y.backward(dy.npu())
    y64.backward(dy.double())
    close(y, y64, dtype)
    close(rstd, (x64.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), torch.float32)
    close(x.grad, x64.grad, dtype)
    close(gamma.grad, gamma64.grad, dtype)


@DTYPES
@pytest.mark.parametrize("topk", [1, 3])
def test_permute_and_unpermute(torch_npu, dtype, topk):
    tokens, experts = 9, 5
    indices = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
    x, x64 = leaf(torch.randn(tokens, 6), dtype)
    probs, probs64 = leaf(torch.rand(tokens, topk), dtype)
    pairs = sorted(
        (int(indices[t, k]), t, k) for t in range(tokens) for k in range(topk)
    )  # rows: by expert, then token
    rows, order = torch_npu.npu_moe_token_permute(x, indices.int().npu())
    assert torch.equal(rows.cpu(), x.detach().cpu()[[t for _, t, _ in pairs]])
    assert [pairs[row][1:] for row in order.tolist()] == [(t, k) for t in range(tokens) for k in range(topk)]
    y = torch_npu.npu_moe_token_unpermute(2 * rows, order, probs)
    y64 = (2 * x64.unsqueeze(1) * probs64.unsqueeze(-1)).sum(1)
    dy = torch.randn(tokens, 6).to(dtype)
    y.backward(dy.npu())
    y64.backward(dy.double())
    close(y, y64, dtype)
    close(x.grad, x64.grad, dtype)
    close(probs.grad, probs64.grad, dtype)


def test_permute_drops_the_rows_beyond_num_out_tokens(torch_npu):
    x, x64 = leaf(torch.randn(4, 3), torch.float32)
    indices = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    rows, order = torch_npu.npu_moe_token_permute(x, indices.npu(), num_out_tokens=5)
    kept = [0, 1, 3, 1, 2]  # tokens of expert 0, then the first two of expert 1
    assert torch.equal(rows.cpu(), x.detach().cpu()[kept])
    y = torch_npu.npu_moe_token_unpermute(rows, order, torch.ones(4, 2).npu())
    y.sum().backward()
    times = torch.tensor([kept.count(token) for token in range(4)], dtype=torch.float64).unsqueeze(1)
    close(y, times * x64, torch.float32)
    close(x.grad, times.expand(4, 3), torch.float32)


def turn(x: torch.Tensor, mode: str) -> torch.Tensor:
    """Each pair (a, b) becomes (-b, a), element by element."""
    out, width = torch.empty_like(x), x.shape[-1]
    for column in range(width):
        if mode == "half":
            partner = column + width // 2 if column < width // 2 else column - width // 2
            sign = -1 if column < width // 2 else 1
        else:
            partner, sign = column + 1 - 2 * (column % 2), -1 if column % 2 == 0 else 1
        out[..., column] = sign * x[..., partner]
    return out


@DTYPES
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("cos_grad", [False, True])
def test_rotary_mul(torch_npu, dtype, mode, cos_grad):
    x, x64 = leaf(torch.randn(2, 3, 5, 8), dtype)
    cos, cos64 = leaf(torch.randn(1, 1, 5, 8), dtype)
    sin, sin64 = leaf(torch.randn(1, 1, 5, 8), dtype)
    if not cos_grad:
        cos, sin = cos.detach(), sin.detach()
    y = torch_npu.npu_rotary_mul(x, cos, sin, mode)
    y64 = x64 * cos64 + turn(x64, mode) * sin64
    dy = torch.randn(2, 3, 5, 8).to(dtype)
    y.backward(dy.npu())
    y64.backward(dy.double())
    close(y, y64, dtype)
    close(x.grad, x64.grad, dtype)
    if cos_grad:
        close(cos.grad, cos64.grad, dtype)
        close(sin.grad, sin64.grad, dtype)


LAYOUTS = {  # from [B, N, S, D]
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2).contiguous(),
    "BSH": lambda x: x.transpose(1, 2).flatten(2).contiguous(),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2).contiguous(),
}


def plain_attention(q, k, v, hidden):
    """[B, N, S, D] in float64, one query at a time."""
    groups, rows = q.shape[1] // k.shape[1], []
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    for row in range(q.shape[2]):
        scores = (q[:, :, row : row + 1] * k).sum(-1) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden[row], -math.inf)
        rows.append((torch.softmax(scores, -1).unsqueeze(-1) * v).sum(2))
    return torch.stack(rows, 2)


def hidden_positions(mask: str, queries: int, keys: int) -> torch.Tensor | None:
    """[S, T], True where a key is hidden from a query, by the definition of each mode."""
    if mask in ("none", "ignored"):
        return None
    if mask == "all":  # no triangle: a key of one query in three
        return torch.tensor([[(s + 2 * t) % 3 == 0 for t in range(keys)] for s in range(queries)])
    shift = keys - queries if mask in ("right_down", "band") else 0
    far = [[t > s + shift or (mask == "band" and t < s + shift - 2) for t in range(keys)] for s in range(queries)]
    return torch.tensor(far)


@DTYPES
@pytest.mark.parametrize(
    "layout, mask, kv_heads",
    [
        *(("BNSD", mask, 2) for mask in ("none", "ignored", "full", "all", "left_up", "right_down", "band")),
        *((layout, "left_up", 4) for layout in LAYOUTS),
        *((layout, "none", 2) for layout in LAYOUTS),
    ],
)
def test_fusion_attention(torch_npu, dtype, layout, mask, kv_heads):
    batch, heads, queries, keys, width = 2, 4, 5, 7, 8
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    pairs = [leaf(torch.randn(batch, n, s, width), dtype) for n, s in sizes]
    hidden = hidden_positions(mask, queries, keys)
    compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    options = {
        "none": {},
        "ignored": dict(sparse_mode=2, next_tockens=0),  # without a mask the mode is ignored
        "full": dict(atten_mask=hidden.npu() if hidden is not None else None),
        "all": dict(atten_mask=hidden.npu() if hidden is not None else None, sparse_mode=1, next_tockens=0),
        "left_up": dict(atten_mask=compressed, sparse_mode=2),
        "right_down": dict(atten_mask=compressed, sparse_mode=3),
        "band": dict(atten_mask=compressed, sparse_mode=4, pre_tockens=2, next_tockens=0),
    }[mask]
    q, k, v = (LAYOUTS[layout](x) for x, _ in pairs)
    out = torch_npu.npu_fusion_attention(q, k, v, heads, layout, scale=1 / math.sqrt(width), **options)[0]
    out64 = plain_attention(*(x64 for _, x64 in pairs), hidden)
    dy = torch.randn(out64.shape).to(dtype)
    out.backward(LAYOUTS[layout](dy).npu())
    out64.backward(dy.double())
    close(out, LAYOUTS[layout](out64), dtype)
    for x, x64 in pairs:
        close(x.grad, x64.grad, dtype, times=2)  # the backward reads the rounded output


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_fusion_attention_with_dropout(torch_npu, dtype, causal):
    """Values that are the identity show which probabilities are kept; the generator's state says which."""
    heads, rows, keep = 4, 16, 0.7
    pairs = [leaf(torch.randn(2, n, rows, rows), dtype) for n in (heads, 2, 2)]
    options = dict(atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu(), sparse_mode=2) if causal else {}
    state = torch.npu.get_rng_state()

    def attend(v, share=keep, begin=True):
        if begin:
            torch.npu.set_rng_state(state)
        q, k = (x for x, _ in pairs[:2])
        return torch_npu.npu_fusion_attention(q, k, v, heads, "BNSD", scale=0.25, keep_prob=share, **options)[0]

    identity = torch.eye(rows, dtype=dtype).expand(2, 2, rows, rows).contiguous().npu()
    whole, kept = (attend(identity, share).detach().cpu() != 0 for share in (1.0, keep))
    assert abs(float(kept.sum() / whole.sum()) - keep) < 0.06
    assert not torch.equal(attend(identity, begin=False).detach().cpu() != 0, kept), "the next call draws others"
    out = attend(pairs[2][0])
    q, k, v = (x64.repeat_interleave(heads // x64.shape[1], 1) for _, x64 in pairs)
    scores = q @ k.mT * 0.25
    scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -math.inf) if causal else scores
    out64 = (scores.softmax(-1) * kept / keep) @ v
    dy = torch.randn(out64.shape).to(dtype)
    out.backward(dy.npu())
    out64.backward(dy.double())
    close(out, out64, dtype)
    for x, x64 in pairs:
        close(x.grad, x64.grad, dtype, times=2)


def test_attention_of_torch_reaches_the_fused_operator(torch_npu):
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    out = F.scaled_dot_product_attention(q.half().npu(), k.half().npu(), v.half().npu())
    close(out, plain_attention(q.half().double(), k.half().double(), v.half().double(), None), torch.float16)


def test_padding_copying_and_casting_inside_torch_npu(torch_npu):
    x = torch.randn(3, 5)
    close(F.pad(x.npu(), (1, 2, 0, 1), value=2.5), F.pad(x.double(), (1, 2, 0, 1), value=2.5), torch.float32)
    close(torch_npu.npu_dtype_cast(x.npu(), torch.float16), x.half(), torch.float16)
    close(x.npu().t().contiguous(), x.t(), torch.float32)


def test_padding_as_the_process_group_does_it(torch_npu):
    x, out = torch.randn(3, 5), torch.empty(4, 8, device="npu")
    torch.npu.synchronize()
    given = x.npu()
    torch.npu.synchronize()
    code = clibrary.run(
        *("ConstantPadNd", clibrary.handle(given), clibrary.integers(1, 2, 0, 1), clibrary.scalar(2.5)),
        clibrary.handle(out),
    )
    torch.npu.synchronize()
    wanted = torch.full((4, 8), 2.5)
    wanted[:3, 1:6] = x
    assert code == 0 and torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize(
    "a, b",
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((4,), (4, 5)), ((2, 3, 4), (4,)), ((4,), (4,))],
    ids=str,
)
def test_gradients_of_matmul_which_torch_npu_makes_one_operator(a, b):
    x, x64 = leaf(torch.randn(a), torch.float32)
    y, y64 = leaf(torch.randn(b), torch.float32)
    (x @ y).square().sum().backward()
    (x64 @ y64).square().sum().backward()
    close(x.grad, x64.grad, torch.float32)
    close(y.grad, y64.grad, torch.float32)


def test_no_simulated_operator_is_without_a_value_test(operator_log, log_before):
    """Must stay the last test of this module: the log of its tests holds every operator that the sources define."""
    ran = {name for kind, name in operator_log.now() - log_before if kind == "aclnn"}
    # op-plugin asks whether the fourth version is there and then calls the fifth.
    assert ran >= set(operators()) - {"aclnnGroupedMatmulV4"}
