// npu_swiglu and npu_swiglu_backward: silu of the first half along a dimension, times the second half.
#include "core.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

using namespace fluidsim;

namespace {

constexpr char kSource[] = "op-plugin docs, torch_npu-npu_swiglu";

void check(const at::Tensor& x, int64_t dim) {
    require(is_half_or_float(x), "the input is fp32, fp16 or bf16", show(x), kSource);
    require(x.dim() >= 1 && x.dim() <= 8, "the input has 1 to 8 dimensions", show(x), kSource);
    require(dim >= -x.dim() && dim < x.dim(), "dim is one of the input's", std::to_string(dim), kSource);
    require(x.numel() > 0, "the input is not empty", show(x), kSource);
    require(x.is_contiguous(), "the input is contiguous", show(x) + " with strides " + show(x.strides()), kSource);
    require(x.size(dim) % 2 == 0, "the input's size along dim is even", show(x), kSource);
}

}  // namespace

ACLNN(SwiGlu, (const aclTensor* x, int64_t dim, const aclTensor* out), (x, dim, out)) {
    check(tensor(x), dim);
    return [x = tensor(x), dim, out = tensor(out)] {
        auto halves = wide(x).chunk(2, dim);
        out.copy_(at::silu(halves[0]) * halves[1]);
    };
}

ACLNN(SwiGluGrad, (const aclTensor* dy, const aclTensor* x, int64_t dim, const aclTensor* dx), (dy, x, dim, dx)) {
    check(tensor(x), dim);
    std::string given = show(tensor(dy)) + " and " + show(tensor(x));
    require(tensor(dy).scalar_type() == tensor(x).scalar_type(), "the gradient has the input's dtype", given, kSource);
    require(tensor(dy).is_contiguous(), "the gradient is contiguous", given, kSource);
    return [dy = tensor(dy), x = tensor(x), dim, dx = tensor(dx)] {
        auto halves = wide(x).chunk(2, dim);
        auto gradient = wide(dy), gate = at::sigmoid(halves[0]);
        auto first = gradient * halves[1] * gate * (1 + halves[0] * (1 - gate));
        auto second = gradient * halves[0] * gate;
        dx.copy_(at::cat({first, second}, dim));
    };
}
