// The kernels that stand in for those of aten on the NPU, one for all operators, and copy_.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace fluidsim {

// Runs the operator's CPU kernel on aliases: queued on the stream where the shapes of the results are known ahead
// (from the operator's Meta kernel), else at once, after the stream is drained.
void run_aten(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// False: the operator needs the results of its inputs (nonzero), a generator, or writes to out=. The stack is unchanged.
bool run_queued(const c10::OperatorHandle& op, torch::jit::Stack* stack, const std::vector<c10::IValue>& arguments);

// For operators that torch_npu has no kernel for: on the hardware it would compute them on the host.
void refuse_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

std::string name_of(const c10::OperatorHandle& op);

}  // namespace fluidsim
