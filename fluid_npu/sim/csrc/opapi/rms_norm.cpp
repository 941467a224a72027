// npu_rms_norm and npu_rms_norm_backward over the trailing dimensions that gamma has; the mean square is in fp32.
#include "core.h"

#include <ATen/ops/rsqrt.h>

using namespace fluidsim;

namespace {

constexpr char kSource[] = "op-plugin docs, torch_npu-npu_rms_norm";

void check(const at::Tensor& x, const at::Tensor& gamma) {
    require(x.dim() >= 2 && x.dim() <= 8, "the input has 2 to 8 dimensions", show(x), kSource);
    require(is_half_or_float(x), "the input is fp32, fp16 or bf16", show(x), kSource);
    bool pair = gamma.scalar_type() == x.scalar_type() || gamma.scalar_type() == at::kFloat;
    require(pair, "gamma has the input's dtype or fp32", show(x) + " and " + show(gamma), kSource);
    bool trailing = gamma.dim() <= x.dim() && gamma.sizes() == x.sizes().slice(x.dim() - gamma.dim());
    require(trailing, "gamma has the input's trailing sizes", show(x) + " and " + show(gamma), kSource);
}

// The dimensions that gamma covers, and those before them.
std::vector<int64_t> normalised(const at::Tensor& x, const at::Tensor& gamma) {
    std::vector<int64_t> dims;
    for (int64_t dim = x.dim() - gamma.dim(); dim < x.dim(); ++dim) dims.push_back(dim);
    return dims;
}

std::vector<int64_t> leading(const at::Tensor& x, const at::Tensor& gamma) {
    std::vector<int64_t> dims;
    for (int64_t dim = 0; dim < x.dim() - gamma.dim(); ++dim) dims.push_back(dim);
    return dims;
}

}  // namespace

ACLNN(RmsNorm, (const aclTensor* x, const aclTensor* gamma, double epsilon, const aclTensor* y, const aclTensor* rstd),
      (x, gamma, epsilon, y, rstd)) {
    check(tensor(x), tensor(gamma));
    return [x = tensor(x), gamma = tensor(gamma), epsilon, y = tensor(y), rstd = tensor(rstd)] {
        auto values = wide(x);
        auto scale = at::rsqrt(values.square().mean(normalised(x, gamma), true) + epsilon);
        rstd.copy_(scale);
        y.copy_(values * scale * wide(gamma));
    };
}

ACLNN(RmsNormGrad,
      (const aclTensor* dy, const aclTensor* x, const aclTensor* rstd, const aclTensor* gamma, const aclTensor* dx,
       const aclTensor* dgamma),
      (dy, x, rstd, gamma, dx, dgamma)) {
    check(tensor(x), tensor(gamma));
    require(tensor(rstd).scalar_type() == at::kFloat, "rstd is fp32", show(tensor(rstd)), kSource);
    return [dy = tensor(dy), x = tensor(x), rstd = tensor(rstd), gamma = tensor(gamma), dx = tensor(dx),
            dgamma = tensor(dgamma)] {
        auto gradient = wide(dy), unit = wide(x) * rstd, scaled = gradient * wide(gamma);
        dx.copy_(rstd * (scaled - unit * (scaled * unit).mean(normalised(x, gamma), true)));
        dgamma.copy_((gradient * unit).sum(leading(x, gamma)));
    };
}
