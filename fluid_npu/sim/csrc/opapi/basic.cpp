// Operators that torch_npu's own C++ calls without the dispatcher, so that the aten bridge never sees them.
#include "core.h"

#include <ATen/ops/constant_pad_nd.h>

using fluidsim::tensor;

ACLNN(InplaceCopy, (const aclTensor* to, const aclTensor* from), (to, from)) {
    return [to = tensor(to), from = tensor(from)] { to.copy_(from); };
}

ACLNN(Cast, (const aclTensor* x, int type, const aclTensor* out), (x, type, out)) {
    return [x = tensor(x), out = tensor(out)] { out.copy_(x); };
}

ACLNN(ConstantPadNd, (const aclTensor* x, const aclIntArray* pad, const aclScalar* value, const aclTensor* out),
      (x, pad, value, out)) {
    return [x = tensor(x), pad = pad->values, value = value->scalar, out = tensor(out)] {
        out.copy_(at::constant_pad_nd(x, pad, value));
    };
}
