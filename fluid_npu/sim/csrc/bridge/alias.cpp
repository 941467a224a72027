#include "alias.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

#include "engine.h"

namespace fluidsim {
namespace {

const c10::impl::DeviceGuardImplInterface* guard() {
    return c10::impl::getDeviceGuardImpl(c10::DeviceType::PrivateUse1);
}

c10::Storage cpu_view_of(const c10::Storage& storage) {
    at::DataPtr same(storage.mutable_data(), c10::Device(c10::kCPU));
    return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(same), nullptr, false);
}

}  // namespace

at::Tensor Aliases::cpu(const at::Tensor& x) {
    if (!is_npu(x)) return x;
    auto key = x.storage().unsafeGetStorageImpl();
    auto found = by_npu_.find(key);
    if (found == by_npu_.end()) {
        found = by_npu_.emplace(key, Pair{x, cpu_view_of(x.storage())}).first;
        by_cpu_.emplace(found->second.cpu.unsafeGetStorageImpl(), x);
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second.cpu), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
    auto impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
    if (x.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (x.is_conj()) alias._set_conj(true);
    if (x.is_neg()) alias._set_neg(true);
    return alias;
}

at::Tensor Aliases::npu(const at::Tensor& result, c10::Device device) {
    if (!result.defined() || result.device().type() != c10::kCPU) return result;
    auto found = by_cpu_.find(result.storage().unsafeGetStorageImpl());
    if (found != by_cpu_.end()) {
        if (found->second.dtype() != result.dtype()) fluidsim_stop("aten bridge: a view with another dtype; please report it");
        return at::as_strided(found->second.detach(), result.sizes(), result.strides(), result.storage_offset());
    }
    auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
    auto fresh = empty_like_on(dense, device);
    if (dense.numel()) std::memcpy(fresh.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
    return fresh;
}

c10::Device npu_of(const std::vector<c10::IValue>& arguments) {
    std::optional<c10::Device> found;
    for (const auto& argument : arguments) {
        map_tensors(argument, [&](const at::Tensor& x) {
            if (!found && is_npu(x)) found = x.device();
            return x;
        });
        if (found) return *found;
    }
    for (const auto& argument : arguments)
        if (argument.isDevice() && argument.toDevice().type() == c10::DeviceType::PrivateUse1 && argument.toDevice().has_index())
            return argument.toDevice();
    return guard()->getDevice();
}

// torch_npu empties its host-side task queue before it hands out the handle, so that order is kept.
void* current_stream(c10::Device device) { return guard()->getStreamNativeHandle(guard()->getStream(device)); }

void drain(c10::Device device) { fluidsim_drain(current_stream(device)); }

Spans spans_of(
    const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments, const std::vector<c10::IValue>& results) {
    Spans spans;
    if (!fluidsim_order_on()) return spans;
    auto add = [&](const c10::IValue& value, bool write) {
        map_tensors(value, [&](const at::Tensor& x) {
            if (is_npu(x)) add_span(spans, x, write);
            return x;
        });
    };
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto* alias = schema.arguments()[i].alias_info();
        bool written = alias && alias->isWrite();
        if (!written || !schema.arguments()[i].is_out()) add(arguments[i], false);
        if (written) add(arguments[i], true);
    }
    for (const auto& result : results) add(result, true);
    return spans;
}

at::Tensor empty_like_on(const at::Tensor& x, c10::Device device) {
    return at::empty_strided(x.sizes(), x.strides(), x.options().device(device));
}

}  // namespace fluidsim
