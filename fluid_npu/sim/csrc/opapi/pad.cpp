// aclnnConstantPadNd: torch_npu's process group pads with it, without the dispatcher, so that the bridge never sees it.
#include "core.h"

#include <ATen/ops/constant_pad_nd.h>

using fluidsim::tensor;

ACLNN(ConstantPadNd, (const aclTensor* x, const aclIntArray* pad, const aclScalar* value, const aclTensor* out),
      (x, pad, value, out)) {
    return [x = tensor(x), pad = pad->values, value = value->scalar, out = tensor(out)] {
        out.copy_(at::constant_pad_nd(x, pad, value));
    };
}
