// npu_rotary_mul and its gradient: y = x * cos + rotate(x) * sin. mode 0 rotates halves, mode 1 neighbours.
#include "core.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

using namespace fluidsim;

namespace {

constexpr char kSource[] = "op-plugin docs, torch_npu-npu_rotary_mul";
constexpr int64_t kHalf = 0, kInterleave = 1;

// (a, b) -> (-b, a), where a and b are the halves or the even and odd columns.
at::Tensor rotate(const at::Tensor& x, int64_t mode) {
    if (mode == kHalf) {
        auto halves = x.chunk(2, -1);
        return at::cat({-halves[1], halves[0]}, -1);
    }
    auto pairs = x.unflatten(-1, {-1, 2});
    return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
}

at::Tensor rotate_back(const at::Tensor& x, int64_t mode) { return -rotate(x, mode); }

void check(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t mode) {
    require(is_half_or_float(x), "x is fp32, fp16 or bf16", show(x), kSource);
    require(x.dim() == 3 || x.dim() == 4, "x is [B, N, S, D], [B, S, N, D], [S, B, N, D] or [T, N, D]", show(x), kSource);
    require(x.size(-1) % 2 == 0 && x.size(-1) < 896, "D is even and below 896", show(x), kSource);
    require(mode == kHalf || mode == kInterleave, "rotary_mode is half or interleave", std::to_string(mode), kSource);
    require(cos.sizes() == sin.sizes(), "cos and sin have one shape", show(cos) + " and " + show(sin), kSource);
    bool fits = cos.dim() == x.dim() && cos.size(-1) == x.size(-1);
    for (int64_t dim = 0; fits && dim < x.dim() - 1; ++dim) fits = cos.size(dim) == 1 || cos.size(dim) == x.size(dim);
    require(fits, "cos and sin have x's dimensions, each of x's size or 1", show(cos) + " for " + show(x), kSource);
    int64_t batch_and_heads = 1;  // the dimensions along which cos is broadcast
    for (int64_t dim = 0; dim < x.dim() - 1; ++dim) {
        if (cos.size(dim) != 1) continue;
        require(x.size(dim) < 1000, "B and N are below 1000", show(x), kSource);
        batch_and_heads *= x.size(dim);
    }
    require(mode == kHalf || batch_and_heads < 1000, "interleave wants B * N below 1000", show(x), kSource);
}

Kernel forward(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t mode, const at::Tensor& y) {
    check(x, cos, sin, mode);
    return [=] { y.copy_(wide(x) * wide(cos) + rotate(wide(x), mode) * wide(sin)); };
}

}  // namespace

ACLNN(RotaryPositionEmbedding,
      (const aclTensor* x, const aclTensor* cos, const aclTensor* sin, int64_t mode, const aclTensor* y),
      (x, cos, sin, mode, y)) {
    return forward(tensor(x), tensor(cos), tensor(sin), mode, tensor(y));
}

ACLNN(RotaryPositionEmbeddingGrad,
      (const aclTensor* dy, const aclTensor* cos, const aclTensor* sin, const aclTensor* x, int64_t mode,
       const aclTensor* dx, const aclTensor* dcos, const aclTensor* dsin),
      (dy, cos, sin, x, mode, dx, dcos, dsin)) {
    check(tensor(dy), tensor(cos), tensor(sin), mode);
    if (x) {
        int64_t times = tensor(dy).numel() / std::max<int64_t>(tensor(cos).numel(), 1);
        require(times <= 1024, "B * N is at most 1024 when cos and sin need gradients", show(tensor(dy)), kSource);
    }
    return [dy = tensor(dy), cos = tensor(cos), sin = tensor(sin), x = tensor(x), mode, dx = tensor(dx),
            dcos = tensor(dcos), dsin = tensor(dsin)] {
        auto gradient = wide(dy);
        dx.copy_(gradient * wide(cos) + rotate_back(gradient * wide(sin), mode));
        if (!x.defined()) return;  // the outputs of cos and sin stay as they were, as nobody reads them
        dcos.copy_((gradient * wide(x)).sum_to_size(cos.sizes()));
        dsin.copy_((gradient * rotate(wide(x), mode)).sum_to_size(sin.sizes()));
    };
}
