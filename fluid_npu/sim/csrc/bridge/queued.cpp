// An aten operator queued on the stream, as a kernel launch is: the program goes on while it waits its turn.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>

#include <memory>

#include "alias.h"
#include "engine.h"
#include "kernels.h"

namespace fluidsim {
namespace {

using c10::IValue;

// Whether the results' shapes follow from the arguments' shapes, and results are fresh or written arguments.
bool predictable(const c10::FunctionSchema& schema) {
    for (const auto& argument : schema.arguments()) {
        if (argument.is_out()) return false;
        if (argument.type()->str().find("Generator") != std::string::npos) return false;
    }
    for (const auto& result : schema.returns()) {
        if (result.alias_info() && !result.alias_info()->isWrite()) return false;
        auto kind = result.type()->kind();
        if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return false;
    }
    return true;
}

bool depends_on_values(const c10::OperatorHandle& op) {
    return op.hasTag(at::Tag::nondeterministic_seeded) || op.hasTag(at::Tag::data_dependent_output) ||
        op.hasTag(at::Tag::dynamic_output_shape);
}

at::Tensor shape_of(const at::Tensor& x) {
    if (!is_npu(x)) return x;
    auto meta = at::empty_strided(x.sizes(), x.strides(), x.options().device(at::kMeta));
    if (x.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
    return meta;
}

// The operator's results on the Meta device; empty when it has none of its own.
torch::jit::Stack shapes(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
    torch::jit::Stack stack;
    for (const auto& argument : arguments)
        stack.push_back(argument.isDevice() ? IValue(c10::Device(at::kMeta)) : map_tensors(argument, shape_of));
    try {
        at::AutoDispatchBelowADInplaceOrView no_autograd;
        op.callBoxed(&stack);
    } catch (const std::exception&) {
        stack.clear();
    }
    return stack;
}

// The argument that a result with alias information is.
std::optional<IValue> written_argument(
    const c10::FunctionSchema& schema, const c10::AliasInfo& alias, const std::vector<IValue>& arguments) {
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto* own = schema.arguments()[i].alias_info();
        if (own && *own == alias) return arguments[i];
    }
    return std::nullopt;
}

struct Results {
    std::vector<IValue> values;                     // what the caller gets
    std::vector<std::vector<at::Tensor>> targets;   // for each: the fresh tensors that the kernel must fill
};

// Allocates the results; nothing when one of them cannot be known ahead.
std::optional<Results> allocate(
    const c10::FunctionSchema& schema, const torch::jit::Stack& shapes, const std::vector<IValue>& arguments,
    c10::Device device) {
    Results results;
    for (size_t i = 0; i < schema.returns().size(); ++i) {
        if (const auto* alias = schema.returns()[i].alias_info()) {
            auto written = written_argument(schema, *alias, arguments);
            if (!written) return std::nullopt;
            results.values.push_back(*written);
            results.targets.emplace_back();
            continue;
        }
        if (!shapes[i].isTensor() && !shapes[i].isTensorList()) return std::nullopt;
        std::vector<at::Tensor> fresh;
        bool known = true;
        results.values.push_back(map_tensors(shapes[i], [&](const at::Tensor& shape) {
            known = known && shape.defined() && shape.device().type() == at::kMeta;
            if (known) fresh.push_back(empty_like_on(shape, device));
            return known ? fresh.back() : shape;
        }));
        if (!known) return std::nullopt;
        results.targets.push_back(std::move(fresh));
    }
    return results;
}

void fill(const std::vector<std::vector<at::Tensor>>& targets, const torch::jit::Stack& computed) {
    for (size_t i = 0; i < targets.size(); ++i) {
        if (targets[i].empty()) continue;
        if (computed[i].isTensor()) {
            targets[i][0].copy_(computed[i].toTensor());
            continue;
        }
        auto list = computed[i].toTensorList();
        for (size_t k = 0; k < targets[i].size(); ++k) targets[i][k].copy_(list.get(k));
    }
}

}  // namespace

bool run_queued(const c10::OperatorHandle& op, torch::jit::Stack* stack, const std::vector<IValue>& arguments) {
    const auto& schema = op.schema();
    if (!predictable(schema) || depends_on_values(op)) return false;
    bool has_npu_tensor = false;
    for (const auto& argument : arguments)
        map_tensors(argument, [&](const at::Tensor& x) {
            has_npu_tensor = has_npu_tensor || is_npu(x);
            return x;
        });
    if (!has_npu_tensor) return false;
    auto result_shapes = shapes(op, arguments);
    if (result_shapes.size() != schema.returns().size()) return false;
    auto device = npu_of(arguments);
    auto results = allocate(schema, result_shapes, arguments, device);
    if (!results) return false;

    Aliases aliases;
    torch::jit::Stack inputs;
    for (const auto& argument : arguments)
        inputs.push_back(argument.isDevice() ? IValue(c10::Device(at::kCPU))
                                             : map_tensors(argument, [&](const at::Tensor& x) { return aliases.cpu(x); }));
    auto targets = results->targets;
    for (auto& group : targets)
        for (auto& target : group) target = aliases.cpu(target);
    void* stream = current_stream(device);
    auto spans = spans_of(schema, arguments, results->values);
    fluidsim_order_op(name_of(op).c_str(), stream, spans.data(), spans.size());
    submit(stream, "aten", [op, inputs, targets]() mutable {
        at::AutoDispatchBelowADInplaceOrView no_autograd;
        try {
            op.callBoxed(&inputs);
            fill(targets, inputs);
        } catch (const std::exception& error) {
            device_error(name_of(op) + " failed: " + error.what());
        }
    });
    stack->resize(stack->size() - arguments.size());
    for (auto& value : results->values) stack->push_back(std::move(value));
    return true;
}

}  // namespace fluidsim
