// NPU tensors seen as CPU tensors: the same memory, another device. Simulated HBM is host memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/function_schema.h>
#include <c10/core/Device.h>

#include <optional>
#include <unordered_map>

#include "order.h"

namespace fluidsim {

inline bool is_npu(const at::Tensor& x) { return x.defined() && x.device().type() == c10::DeviceType::PrivateUse1; }

// The value with `change` applied to every tensor in it; what holds no tensor stays.
template <class Change>
c10::IValue map_tensors(const c10::IValue& value, Change change) {
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& entry : value.toTensorList()) list.push_back(change(entry));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (std::optional<at::Tensor> entry : value.toOptionalTensorList())
            list.push_back(entry ? std::optional<at::Tensor>(change(*entry)) : std::nullopt);
        return list;
    }
    return value;
}

// The aliases of one call. Tensors that share storage on the NPU share it on the CPU, so that views stay views.
//
// An alias does not keep the NPU's storage alive: a kernel on the hardware holds a bare address too, and memory that is
// freed too early must be seen.
class Aliases {
public:
    at::Tensor cpu(const at::Tensor& x);

    // The NPU tensor for a result of a CPU kernel: a view of what it aliases, else a copy in fresh NPU memory.
    at::Tensor npu(const at::Tensor& result, c10::Device device);

private:
    struct Pair {
        at::Tensor npu;       // one of the tensors on the storage
        c10::Storage cpu;
    };
    std::unordered_map<c10::StorageImpl*, Pair> by_npu_;
    std::unordered_map<c10::StorageImpl*, at::Tensor> by_cpu_;
};

// The NPU that a call is about: of its first NPU tensor, else of a device argument, else the current one.
c10::Device npu_of(const std::vector<c10::IValue>& arguments);

// The stream on which the program under test issues work for that NPU, and a wait until it is idle.
void* current_stream(c10::Device device);
void drain(c10::Device device);

// The NPU tensors of a call as spans of the order record: written are those that the schema says, and the results.
Spans spans_of(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments, const std::vector<c10::IValue>& results);

at::Tensor empty_like_on(const at::Tensor& x, c10::Device device);

}  // namespace fluidsim
