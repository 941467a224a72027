// Random numbers of an NPU: the CPU's algorithm, begun anew for each operator from the NPU generator's seed and offset.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <mutex>
#include <vector>

namespace fluidsim {

// While it lives, the CPU's generator follows the NPU's; afterwards it is as before. Does nothing for an operator that
// draws no random numbers. Throws when the caller gave a generator of another device, as torch_npu does.
class NpuRandomness {
public:
    NpuRandomness(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments, c10::Device device);
    ~NpuRandomness();
    NpuRandomness(const NpuRandomness&) = delete;

private:
    at::Generator cpu_;
    at::Generator before_;  // undefined: nothing to restore
    std::unique_lock<std::mutex> lock_;
};

}  // namespace fluidsim
