// One kernel for all of aten: queued where it can be, else run at once on the drained stream.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "alias.h"
#include "engine.h"
#include "kernels.h"
#include "random.h"

namespace fluidsim {
namespace {

using c10::IValue;

// An empty tensor given as out= is resized by the kernel, which an alias cannot be: it gets a fresh one.
struct Outputs {
    std::vector<bool> fresh;
};

torch::jit::Stack on_the_cpu(
    const c10::FunctionSchema& schema, const std::vector<IValue>& arguments, Aliases& aliases, Outputs& outputs) {
    torch::jit::Stack inputs;
    outputs.fresh.assign(arguments.size(), false);
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto& argument = arguments[i];
        bool empty_out = schema.arguments()[i].is_out() && argument.isTensor() && is_npu(argument.toTensor()) &&
            argument.toTensor().numel() == 0;
        if (empty_out) {
            outputs.fresh[i] = true;
            inputs.push_back(at::empty({0}, argument.toTensor().options().device(at::kCPU)));
        } else if (argument.isDevice()) {
            inputs.push_back(c10::Device(at::kCPU));
        } else if (argument.isGenerator()) {
            inputs.push_back(IValue());  // the CPU's own, which NpuRandomness has seeded
        } else {
            inputs.push_back(map_tensors(argument, [&](const at::Tensor& x) { return aliases.cpu(x); }));
        }
    }
    return inputs;
}

// Gives an argument that the kernel wrote the shape and, when it was a fresh out=, the content of its result.
void take_over(const at::Tensor& argument, const at::Tensor& result, bool fresh, bool is_out) {
    if (fresh) {
        argument.resize_(result.sizes());
        if (result.numel()) argument.copy_(result);
    } else if (is_npu(argument) && !is_out && !argument.sizes().equals(result.sizes())) {
        argument.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    }
}

IValue to_the_npu(
    const c10::FunctionSchema& schema, size_t index, const IValue& computed, const std::vector<IValue>& arguments,
    Aliases& aliases, const Outputs& outputs, c10::Device device) {
    const auto* alias = schema.returns()[index].alias_info();
    if (alias && alias->isWrite()) {
        for (size_t i = 0; i < arguments.size(); ++i) {
            const auto& argument = schema.arguments()[i];
            if (!argument.alias_info() || !(*argument.alias_info() == *alias)) continue;
            if (arguments[i].isTensor() && computed.isTensor())
                take_over(arguments[i].toTensor(), computed.toTensor(), outputs.fresh[i], argument.is_out());
            return arguments[i];
        }
    }
    return map_tensors(computed, [&](const at::Tensor& x) { return aliases.npu(x, device); });
}

// On the hardware this is a kernel on the stream too; the host waits only for a size or a value that follows from values.
void note_at_once(
    const c10::OperatorHandle& op, const std::vector<IValue>& arguments, const std::vector<IValue>& results, void* stream) {
    if (!fluidsim_order_on()) return;
    auto spans = spans_of(op.schema(), arguments, results);
    fluidsim_order_op(name_of(op).c_str(), stream, spans.data(), spans.size());
    if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape))
        fluidsim_order_sync(stream_field("stream", stream).c_str());
}

void run_at_once(const c10::OperatorHandle& op, torch::jit::Stack* stack, const std::vector<IValue>& arguments) {
    auto device = npu_of(arguments);
    drain(device);
    Aliases aliases;
    Outputs outputs;
    auto computed = on_the_cpu(op.schema(), arguments, aliases, outputs);
    {
        NpuRandomness random(op, arguments, device);
        at::AutoDispatchBelowADInplaceOrView no_autograd;
        op.callBoxed(&computed);
    }
    stack->resize(stack->size() - arguments.size());
    std::vector<IValue> results;
    for (size_t i = 0; i < computed.size(); ++i)
        results.push_back(to_the_npu(op.schema(), i, computed[i], arguments, aliases, outputs, device));
    note_at_once(op, arguments, results, current_stream(device));
    for (auto& result : results) stack->push_back(std::move(result));
}

}  // namespace

std::string name_of(const c10::OperatorHandle& op) {
    const auto& name = op.schema();
    return name.overload_name().empty() ? name.name() : name.name() + "." + name.overload_name();
}

void run_aten(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    size_t count = op.schema().arguments().size();
    std::vector<IValue> arguments(stack->end() - static_cast<long>(count), stack->end());
    if (run_queued(op, stack, arguments)) {
        fluidsim_log("aten", name_of(op).c_str());
        return;
    }
    fluidsim_log("aten-sync", name_of(op).c_str());
    run_at_once(op, stack, arguments);
}

void refuse_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    std::string name = name_of(op);
    fluidsim_log("fallback", name.c_str());
    if (std::getenv("FLUID_SIM_FALLBACK") && std::string(std::getenv("FLUID_SIM_FALLBACK")) == "allow") {
        run_aten(op, stack);
        return;
    }
    TORCH_CHECK(false, "[fluid-sim] torch_npu has no NPU kernel for ", name, ": on the hardware it would copy the tensors "
        "to the host and compute there. Use another operator, or set FLUID_SIM_FALLBACK=allow to let it pass");
}

}  // namespace fluidsim
