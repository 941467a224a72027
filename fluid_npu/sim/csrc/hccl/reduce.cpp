#include "reduce.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "engine.h"

namespace fluidsim {
namespace {

template <class Wide>
Wide combine(Wide a, Wide b, HcclReduceOp op) {
    switch (op) {
        case HCCL_REDUCE_SUM: return a + b;
        case HCCL_REDUCE_PROD: return a * b;
        case HCCL_REDUCE_MAX: return std::max(a, b);
        case HCCL_REDUCE_MIN: return std::min(a, b);
        default: fluidsim_stop("HCCL: unknown reduction");
    }
}

template <class Element, class Wide>
void reduce_as(char* out, const std::vector<char*>& inputs, size_t count, HcclReduceOp op) {
    for (size_t i = 0; i < count; ++i) {
        Wide sum = static_cast<Wide>(reinterpret_cast<Element*>(inputs[0])[i]);
        for (size_t rank = 1; rank < inputs.size(); ++rank)
            sum = combine<Wide>(sum, static_cast<Wide>(reinterpret_cast<Element*>(inputs[rank])[i]), op);
        reinterpret_cast<Element*>(out)[i] = static_cast<Element>(sum);
    }
}

}  // namespace

size_t bytes_of(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_UINT64:
        case HCCL_DATA_TYPE_FP64: return 8;
        default: fluidsim_stop("HCCL: a data type that is not simulated (8-bit floats)");
    }
}

void reduce(char* out, const std::vector<char*>& inputs, size_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_FP32: return reduce_as<float, float>(out, inputs, count, op);
        case HCCL_DATA_TYPE_BFP16: return reduce_as<c10::BFloat16, float>(out, inputs, count, op);
        case HCCL_DATA_TYPE_FP16: return reduce_as<c10::Half, float>(out, inputs, count, op);
        case HCCL_DATA_TYPE_INT64: return reduce_as<int64_t, int64_t>(out, inputs, count, op);
        case HCCL_DATA_TYPE_INT32: return reduce_as<int32_t, int32_t>(out, inputs, count, op);
        case HCCL_DATA_TYPE_INT16: return reduce_as<int16_t, int16_t>(out, inputs, count, op);
        case HCCL_DATA_TYPE_INT8: return reduce_as<int8_t, int8_t>(out, inputs, count, op);
        case HCCL_DATA_TYPE_UINT8: return reduce_as<uint8_t, uint8_t>(out, inputs, count, op);
        default: fluidsim_stop("HCCL: reductions are for int8, int16, int32, int64, fp16, bf16 and fp32");
    }
}

}  // namespace fluidsim
