// npu_moe_token_permute and npu_moe_token_unpermute with their gradients.
//
// T tokens, H hidden, K experts of a token, N rows. sorted_indices[t * K + k] is the row of pair (t, k), the inverse of
// the stable sort by expert: row sorted_indices[i] copies token i / K. Rows at or beyond N were dropped.
#include "core.h"

#include <ATen/ops/argsort.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

using namespace fluidsim;

namespace {

constexpr char kPermute[] = "CANN docs, aclnnMoeTokenPermute";
constexpr char kUnpermute[] = "CANN docs, aclnnMoeTokenUnpermute";
constexpr int64_t kMaxTopk = 512;
constexpr int64_t kMaxPairs = 16777215;

int64_t topk_of(const at::Tensor& indices) { return indices.dim() == 2 ? indices.size(1) : 1; }

// [T*K, H] in fp32: the row of each pair, zero where it was dropped.
at::Tensor rows_of_pairs(const at::Tensor& rows, const at::Tensor& sorted_indices) {
    auto index = sorted_indices.to(at::kLong);
    auto kept = index < rows.size(0);
    auto found = wide(rows).index_select(0, at::where(kept, index, at::zeros_like(index)));
    return found * kept.unsqueeze(1);
}

void check_unpermute(const at::Tensor& rows, const at::Tensor& sorted_indices, const at::Tensor& probs, bool padded) {
    require(!padded, "padded_mode is not supported", "True", kUnpermute);
    require(is_half_or_float(rows), "permuted tokens are fp32, fp16 or bf16", show(rows), kUnpermute);
    require(sorted_indices.scalar_type() == at::kInt, "sorted_indices are int32", show(sorted_indices), kUnpermute);
    if (!probs.defined()) return;
    require(is_half_or_float(probs), "probs are fp32, fp16 or bf16", show(probs), kUnpermute);
    require(probs.dim() == 2 && probs.numel() == sorted_indices.numel(), "probs are [T, K] of the sorted indices",
            show(probs) + " and " + show(sorted_indices), kUnpermute);
    require(probs.size(1) <= kMaxTopk, "K is at most 512", show(probs), kUnpermute);
}

}  // namespace

ACLNN(MoeTokenPermute,
      (const aclTensor* tokens, const aclTensor* indices, int64_t rows, bool padded, const aclTensor* permuted,
       const aclTensor* sorted_indices),
      (tokens, indices, rows, padded, permuted, sorted_indices)) {
    auto x = tensor(tokens), index = tensor(indices);
    require(!padded, "padded_mode is not supported", "True", kPermute);
    require(is_half_or_float(x) && x.dim() == 2, "tokens are [T, H] in fp32, fp16 or bf16", show(x), kPermute);
    bool integer = index.scalar_type() == at::kInt || index.scalar_type() == at::kLong;
    require(integer, "indices are int32 or int64", show(index), kPermute);
    require((index.dim() == 1 || index.dim() == 2) && index.size(0) == x.size(0), "indices are [T] or [T, K]",
            show(index) + " for tokens " + show(x), kPermute);
    require(topk_of(index) <= kMaxTopk, "K is at most 512", show(index), kPermute);
    require(index.numel() < kMaxPairs, "there are fewer than 16777215 indices", show(index), kPermute);
    return [x, index, out = tensor(permuted), rank = tensor(sorted_indices)] {
        auto order = at::argsort(index.reshape({-1}), /*stable=*/true, 0, false);
        rank.copy_(at::argsort(order));
        auto token_of_row = at::floor_divide(order, topk_of(index));
        out.copy_(x.index_select(0, token_of_row.narrow(0, 0, out.size(0))));
    };
}

ACLNN(MoeTokenPermuteGrad,
      (const aclTensor* dy, const aclTensor* sorted_indices, int64_t topk, bool padded, const aclTensor* dx),
      (dy, sorted_indices, topk, padded, dx)) {
    require(!padded, "padded_mode is not supported", "True", kPermute);
    require(tensor(sorted_indices).scalar_type() == at::kInt, "sorted_indices are int32", show(tensor(sorted_indices)), kPermute);
    return [dy = tensor(dy), sorted_indices = tensor(sorted_indices), topk, dx = tensor(dx)] {
        dx.copy_(rows_of_pairs(dy, sorted_indices).reshape({-1, topk, dy.size(1)}).sum(1));
    };
}

ACLNN(MoeTokenUnpermute,
      (const aclTensor* permuted, const aclTensor* sorted_indices, const aclTensor* probs, bool padded,
       const aclIntArray* restore_shape, const aclTensor* tokens),
      (permuted, sorted_indices, probs, padded, restore_shape, tokens)) {
    check_unpermute(tensor(permuted), tensor(sorted_indices), tensor(probs), padded);
    return [rows = tensor(permuted), index = tensor(sorted_indices), probs = tensor(probs), out = tensor(tokens)] {
        int64_t topk = probs.defined() ? probs.size(1) : 1;
        auto pairs = rows_of_pairs(rows, index).reshape({-1, topk, rows.size(1)});
        if (probs.defined()) pairs = pairs * wide(probs).unsqueeze(-1);
        out.copy_(pairs.sum(1));
    };
}

ACLNN(MoeTokenUnpermuteGrad,
      (const aclTensor* permuted, const aclTensor* dy, const aclTensor* sorted_indices, const aclTensor* probs,
       bool padded, const aclIntArray* restore_shape, const aclTensor* drows, const aclTensor* dprobs),
      (permuted, dy, sorted_indices, probs, padded, restore_shape, drows, dprobs)) {
    auto weights = tensor(probs);
    require(!padded, "padded_mode is not supported", "True", kUnpermute);
    require(!weights.defined() || tensor(permuted).defined(), "with probs the permuted tokens are given", "None", kUnpermute);
    return [rows = tensor(permuted), dy = tensor(dy), index = tensor(sorted_indices), weights, drows = tensor(drows),
            dprobs = tensor(dprobs)] {
        int64_t topk = weights.defined() ? weights.size(1) : 1, hidden = dy.size(1);
        auto gradient = wide(dy).unsqueeze(1).expand({dy.size(0), topk, hidden});
        if (weights.defined()) {
            auto pairs = rows_of_pairs(rows, index).reshape({-1, topk, hidden});
            dprobs.copy_((pairs * gradient).sum(-1));
            gradient = gradient * wide(weights).unsqueeze(-1);
        }
        auto kept = (index < drows.size(0)).nonzero().view(-1);
        auto target = index.index_select(0, kept).to(at::kLong);
        drows.zero_();
        drows.index_copy_(0, target, gradient.reshape({-1, hidden}).index_select(0, kept).to(drows.scalar_type()));
    };
}
