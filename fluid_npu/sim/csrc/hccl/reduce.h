// Element types of HCCL, and reductions over the ranks in rank order: every rank gets the same bits.
#pragma once

#include <cstddef>
#include <vector>

#include "acl/acl.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace fluidsim {

size_t bytes_of(HcclDataType type);

// out[i] = op over inputs[rank][i]. Half types are added in float and rounded once. Stops on a type that HCCL refuses.
void reduce(char* out, const std::vector<char*>& inputs, size_t count, HcclDataType type, HcclReduceOp op);

}  // namespace fluidsim
