// npu_fusion_attention and its gradient, as plain softmax attention. B batch, N heads, S queries, T keys, D head size.
//
// In the mask 1 means masked. Modes 2, 3 and 4 take the compressed causal mask of 2048 x 2048, whose upper triangle
// without the diagonal is masked, and know the real one from the sizes. Dropout comes as a bit for each probability, 1
// where it is kept, which the operator of the same call drew from seed and offset.
#include "core.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

using namespace fluidsim;

namespace {

constexpr char kSource[] = "op-plugin docs, torch_npu-npu_fusion_attention";
constexpr int64_t kCompressed = 2048, kMaxHead = 768, kMaxHeads = 256, kMaxLength = 1 << 20, kMaxBatch = 2 << 20;
enum Mode : int64_t { kDefault = 0, kAll = 1, kLeftUp = 2, kRightDown = 3, kBand = 4 };

struct Call {
    at::Tensor q, k, v, mask, drop;
    double scale, keep;
    int64_t before, after, heads, mode;
    std::string layout;

    bool compressed() const { return mode == kLeftUp || mode == kRightDown || mode == kBand; }
};

// Any layout to [B, N, S, D] and back, as views.
at::Tensor heads_first(const at::Tensor& x, const std::string& layout, int64_t heads) {
    if (layout == "BSH") return x.unflatten(2, {heads, -1}).transpose(1, 2);
    if (layout == "SBH") return x.unflatten(2, {heads, -1}).permute({1, 2, 0, 3});
    return layout == "BSND" ? x.transpose(1, 2) : x;
}

// Heads of keys: for layouts without a head dimension it follows from the head size of the queries.
int64_t key_heads(const Call& c, const at::Tensor& q) {
    if (c.layout == "BNSD") return c.k.size(1);
    if (c.layout == "BSND") return c.k.size(2);
    return c.k.size(2) / q.size(3);
}

struct Parts {
    at::Tensor q, k, v;
    int64_t groups;  // query heads that share a key head
};

Parts parts(const Call& c) {
    auto q = heads_first(c.q, c.layout, c.heads);
    int64_t shared = key_heads(c, q);
    return {q, heads_first(c.k, c.layout, shared), heads_first(c.v, c.layout, shared), q.size(1) / std::max<int64_t>(shared, 1)};
}

void check_mask(const Call& c, int64_t batch, int64_t queries, int64_t keys) {
    require(c.mode >= kDefault && c.mode <= kBand, "sparse_mode 5 to 8 (prefix, varlen) is not simulated", std::to_string(c.mode), "fluid-sim");
    if (!c.mask.defined()) return;
    bool kind = c.mask.scalar_type() == at::kBool || c.mask.scalar_type() == at::kByte;
    require(kind, "atten_mask is bool or uint8", show(c.mask), kSource);
    if (c.compressed()) {
        bool square = c.mask.dim() >= 2 && c.mask.numel() == kCompressed * kCompressed && c.mask.size(-1) == kCompressed;
        require(square, "sparse_mode 2, 3 and 4 want the compressed mask [2048, 2048]", show(c.mask), kSource);
        return;
    }
    auto s = c.mask.sizes();
    bool whole = s.size() >= 2 && s[s.size() - 2] == queries && s[s.size() - 1] == keys;
    if (s.size() == 4) whole = whole && (s[0] == batch || s[0] == 1) && (s[1] == c.heads || s[1] == 1);
    require(whole && (s.size() == 2 || s.size() == 4), "atten_mask is [B, N, S, T], [B, 1, S, T], [1, 1, S, T] or [S, T]", show(c.mask), kSource);
}

void check(const Call& c, const aclTensor* pse, const aclTensor* padding) {
    require(c.layout != "TND", "layout TND is not simulated", c.layout, "fluid-sim");
    require(!pse && !padding, "pse and padding_mask are not simulated", "a tensor", "fluid-sim");
    require(c.keep > 0.0 && c.keep <= 1.0, "keep_prob is above 0 and at most 1", std::to_string(c.keep), kSource);
    // No caller can break this and the size of the generated mask: torch_npu makes both from keep_prob.
    TORCH_CHECK(c.drop.defined() == (c.keep < 1.0), "[fluid-sim] a mask of dropout and keep_prob ", c.keep);
    require(is_half_or_float(c.q), "query is fp32, fp16 or bf16", show(c.q), kSource);
    bool same = c.q.scalar_type() == c.k.scalar_type() && c.q.scalar_type() == c.v.scalar_type();
    std::string given = show(c.q) + ", " + show(c.k) + ", " + show(c.v);
    require(same, "query, key and value have one dtype", given, kSource);
    auto p = parts(c);
    require(p.q.size(1) <= kMaxHeads && p.q.size(1) % p.k.size(1) == 0, "query heads are at most 256 and a multiple of key heads", given, kSource);
    require(p.q.size(3) == p.k.size(3), "query and key have one head size", given, kSource);
    require(p.q.size(3) <= kMaxHead && p.k.size(3) >= p.v.size(3), "the head size is at most 768 and the value's no larger", given, kSource);
    require(p.q.size(2) <= kMaxLength && p.k.size(2) <= kMaxLength && p.q.size(0) <= kMaxBatch, "S is at most 1M, B at most 2M", given, kSource);
    check_mask(c, p.q.size(0), p.q.size(2), p.k.size(2));
    if (!c.drop.defined()) return;
    bool fits = c.drop.scalar_type() == at::kByte && c.drop.numel() * 8 >= p.q.size(0) * p.q.size(1) * p.q.size(2) * p.k.size(2);
    require(fits, "the mask of dropout is uint8, a bit for each of [B, N, S, T]", show(c.drop), kSource);
}

at::Tensor eight() { return at::arange(8, at::kByte); }

// What probabilities [B, N, S, T] are multiplied by; undefined without dropout.
at::Tensor kept(const Call& c, const Parts& p) {
    if (!c.drop.defined()) return {};
    std::vector<int64_t> sizes = {p.q.size(0), p.q.size(1), p.q.size(2), p.k.size(2)};
    auto bits = at::bitwise_and(at::bitwise_right_shift(c.drop.flatten().unsqueeze(1), eight()), 1).flatten();
    return bits.narrow(0, 0, sizes[0] * sizes[1] * sizes[2] * sizes[3]).view(sizes).to(at::kFloat) / c.keep;
}

// [S, T] of the positions that a band around the diagonal leaves out; the diagonal ends at the corner of mode 3.
at::Tensor outside_band(int64_t queries, int64_t keys, int64_t before, int64_t after, int64_t shift) {
    auto row = at::arange(queries).unsqueeze(1) + shift, column = at::arange(keys).unsqueeze(0);
    return (column > row + after) | (column < row - before);
}

at::Tensor masked(const Call& c, int64_t queries, int64_t keys) {
    if (!c.mask.defined()) return {};  // without a mask the sparse mode is ignored
    constexpr int64_t kFar = int64_t(1) << 40;
    int64_t before = std::min(c.before, kFar), after = std::min(c.after, kFar);
    if (c.mode == kDefault) return c.mask.to(at::kBool) | outside_band(queries, keys, before, after, 0);
    if (c.mode == kAll) return c.mask.to(at::kBool);
    auto compressed = c.mask.reshape({kCompressed, kCompressed}).to(at::kBool);
    bool causal = !compressed[0][0].item<bool>() && compressed[0][1].item<bool>() && !compressed[1][0].item<bool>() &&
        compressed[kCompressed - 2][kCompressed - 1].item<bool>();
    require(causal, "the compressed mask has 1 above the diagonal and 0 elsewhere (1 means masked)", "another", kSource);
    if (c.mode == kLeftUp) return outside_band(queries, keys, kFar, 0, 0);
    if (c.mode == kRightDown) return outside_band(queries, keys, kFar, 0, keys - queries);
    return outside_band(queries, keys, before, after, keys - queries);
}

at::Tensor repeat_heads(const at::Tensor& x, int64_t times) { return wide(x).repeat_interleave(times, 1); }
at::Tensor sum_heads(const at::Tensor& x, int64_t times) { return x.unflatten(1, {-1, times}).sum(2); }

at::Tensor scores(const Call& c, const Parts& p, const at::Tensor& k) {
    auto raw = at::matmul(wide(p.q), k.transpose(-1, -2)) * c.scale;
    auto hidden = masked(c, p.q.size(2), p.k.size(2));
    return hidden.defined() ? raw.masked_fill(hidden, -std::numeric_limits<float>::infinity()) : raw;
}

}  // namespace

// A bit for each number of the shape, in bytes that make whole 128 bits; the same seed and offset, the same bits.
ACLNN(DropoutGenMaskV2,
      (const aclIntArray* shape, double dropped, int64_t seed, int64_t offset, int type, const aclTensor* out),
      (shape, dropped, seed, offset, type, out)) {
    int64_t numbers = 1;
    for (auto size : shape->values) numbers *= size;
    auto bytes = tensor(out);
    int64_t wanted = (numbers + 127) / 128 * 16;
    (void)type;  // of the probability, which comes as a double
    TORCH_CHECK(bytes.scalar_type() == at::kByte && bytes.numel() >= wanted, "[fluid-sim] a mask of dropout in ", show(bytes));
    return [=] {
        auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(offset));
        auto bits = at::zeros({wanted * 8}).bernoulli_(1.0 - dropped, generator).to(at::kByte).view({-1, 8});
        bytes.flatten().narrow(0, 0, wanted).copy_((bits * at::bitwise_left_shift(at::ones({8}, at::kByte), eight())).sum(1).to(at::kByte));
    };
}

#define ATTENTION_OPTIONS                                                                                              \
    const aclIntArray *prefix, double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout,   \
        int64_t inner_precise, int64_t mode

ACLNN(FlashAttentionScore,
      (const aclTensor* q, const aclTensor* k, const aclTensor* v, const aclTensor* pse, const aclTensor* drop,
       const aclTensor* padding, const aclTensor* mask, ATTENTION_OPTIONS, const aclTensor* largest,
       const aclTensor* total, const aclTensor* softmax, const aclTensor* out),
      (q, k, v, pse, drop, padding, mask, prefix, scale, keep, before, after, heads, layout, inner_precise, mode,
       largest, total, softmax, out)) {
    Call c{tensor(q), tensor(k), tensor(v), tensor(mask), tensor(drop), scale, keep, before, after, heads, mode, layout};
    check(c, pse, padding);
    return [c, largest = tensor(largest), total = tensor(total), out = tensor(out)] {
        auto p = parts(c);
        auto s = scores(c, p, repeat_heads(p.k, p.groups));
        auto top = s.amax(-1, true);
        auto weights = (s - top).exp();
        auto sum = weights.sum(-1, true);
        largest.copy_(top.expand_as(largest));  // the 8 columns of both hold one value
        total.copy_(sum.expand_as(total));
        auto left = weights / sum, factors = kept(c, p);
        if (factors.defined()) left = left * factors;
        heads_first(out, c.layout, c.heads).copy_(at::matmul(left, repeat_heads(p.v, p.groups)));
    };
}

ACLNN(FlashAttentionScoreGrad,
      (const aclTensor* q, const aclTensor* k, const aclTensor* v, const aclTensor* dy, const aclTensor* pse,
       const aclTensor* drop, const aclTensor* padding, const aclTensor* mask, const aclTensor* largest,
       const aclTensor* total, const aclTensor* softmax, const aclTensor* out, ATTENTION_OPTIONS, const aclTensor* dq,
       const aclTensor* dk, const aclTensor* dv, const aclTensor* dpse),
      (q, k, v, dy, pse, drop, padding, mask, largest, total, softmax, out, prefix, scale, keep, before, after, heads,
       layout, inner_precise, mode, dq, dk, dv, dpse)) {
    Call c{tensor(q), tensor(k), tensor(v), tensor(mask), tensor(drop), scale, keep, before, after, heads, mode, layout};
    check(c, pse, padding);
    return [c, dy = tensor(dy), largest = tensor(largest), total = tensor(total), out = tensor(out), dq = tensor(dq),
            dk = tensor(dk), dv = tensor(dv)] {
        auto p = parts(c);
        int64_t shared = p.k.size(1);
        auto k = repeat_heads(p.k, p.groups), v = repeat_heads(p.v, p.groups);
        auto weights = (scores(c, p, k) - largest.narrow(-1, 0, 1)).exp() / total.narrow(-1, 0, 1);
        auto gradient = wide(heads_first(dy, c.layout, c.heads)), y = wide(heads_first(out, c.layout, c.heads));
        auto dweights = at::matmul(gradient, v.transpose(-1, -2)), left = weights, factors = kept(c, p);
        if (factors.defined()) {
            left = weights * factors;
            dweights = dweights * factors;
        }
        auto dscores = weights * (dweights - (gradient * y).sum(-1, true)) * c.scale;
        heads_first(dq, c.layout, c.heads).copy_(at::matmul(dscores, k));
        heads_first(dk, c.layout, shared).copy_(sum_heads(at::matmul(dscores.transpose(-1, -2), wide(p.q)), p.groups));
        heads_first(dv, c.layout, shared).copy_(sum_heads(at::matmul(left.transpose(-1, -2), gradient), p.groups));
    };
}
