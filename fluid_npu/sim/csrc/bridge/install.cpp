// Puts the bridge's kernels over torch_npu's for aten. What moves no values (views, allocation) stays torch_npu's.
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <set>

#include "alias.h"
#include "engine.h"
#include "kernels.h"

namespace fluidsim {
namespace {

// torch_npu's own: allocation, views, streams and the copies between host and device, which are what is under test.
const std::set<std::string> kept = {
    "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_has_compatible_shallow_copy_type",
    "aten::_local_scalar_dense", "aten::_nested_tensor_from_tensor_list", "aten::_pin_memory", "aten::_reshape_alias",
    "aten::_to_copy", "aten::_unsafe_view", "aten::alias", "aten::as_strided", "aten::as_strided_", "aten::contiguous",
    "aten::copy_", "aten::detach", "aten::empty.memory_format", "aten::empty_like", "aten::empty_strided",
    "aten::is_pinned", "aten::is_set_to", "aten::isnan", "aten::pin_memory", "aten::record_stream", "aten::reshape",
    "aten::resize_", "aten::resize_as_", "aten::set_", "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::to.device", "aten::unfold",
    "aten::view", "aten::view.dtype",
};

std::optional<c10::SafeKernelFunction> original_copy;

// A copy with a conversion: on the hardware a kernel on the stream, for which the host waits when the copy blocks.
void note_copy(const at::Tensor& self, const at::Tensor& source, bool waits) {
    if (!fluidsim_order_on()) return;
    void* stream = current_stream(is_npu(self) ? self.device() : source.device());
    Spans spans;
    if (is_npu(source)) add_span(spans, source, false);
    if (is_npu(self)) add_span(spans, self, true);
    fluidsim_order_op("aten::copy_", stream, spans.data(), spans.size());
    if (waits) fluidsim_order_sync(stream_field("stream", stream).c_str());
}

// Between host and device in one dtype and layout: torch_npu's own asynchronous copy. Else a conversion on aliases.
at::Tensor& copy(c10::DispatchKeySet keys, at::Tensor& self, const at::Tensor& source, bool non_blocking) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    bool crosses = is_npu(self) != is_npu(source);
    bool plain = self.dtype() == source.dtype() && self.is_contiguous() && source.is_contiguous() &&
        self.sizes() == source.sizes() && !self.is_neg() && !source.is_neg();
    torch::jit::Stack stack{self, source, non_blocking};
    if (crosses && plain) {
        original_copy->callBoxed(op, keys, &stack);
        return self;
    }
    if (!crosses && run_queued(op, &stack, {self, source, non_blocking})) {
        fluidsim_log("aten", "aten::copy_");
        return self;
    }
    fluidsim_log("aten-sync", "aten::copy_");
    if (is_npu(self)) drain(self.device());
    if (is_npu(source)) drain(source.device());
    note_copy(self, source, crosses && !non_blocking);
    Aliases aliases;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    aliases.cpu(self).copy_(aliases.cpu(source));
    return self;
}

at::Tensor to_copy(
    const at::Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pin, bool non_blocking,
    std::optional<at::MemoryFormat> format) {
    return at::native::_to_copy(self, dtype, layout, device, pin, non_blocking, format);
}

at::Tensor dtype_cast(const at::Tensor& self, int64_t dtype, std::optional<int64_t>) {
    auto wanted = static_cast<at::ScalarType>(dtype);
    if (self.scalar_type() == wanted) return self;
    auto out = at::empty_like(self, self.options().dtype(wanted));
    out.copy_(self);
    return out;
}

// torch_npu differentiates matmul as one operator, for which torch has no CPU kernel: by matmuls, which the bridge runs.
std::tuple<at::Tensor, at::Tensor> matmul_backward(
    const at::Tensor& dy, const at::Tensor& a, const at::Tensor& b, std::array<bool, 2> wanted) {
    // Vectors as matrices, as matmul itself sees them.
    auto left = a.dim() == 1 ? a.unsqueeze(0) : a, right = b.dim() == 1 ? b.unsqueeze(1) : b;
    auto gradient = dy;
    if (b.dim() == 1) gradient = gradient.unsqueeze(-1);
    if (a.dim() == 1) gradient = gradient.unsqueeze(-2);
    at::Tensor da, db;
    if (wanted[0]) da = at::matmul(gradient, right.transpose(-2, -1)).sum_to_size(left.sizes()).reshape(a.sizes());
    if (wanted[1]) db = at::matmul(left.transpose(-2, -1), gradient).sum_to_size(right.sizes()).reshape(b.sizes());
    return {da, db};
}

// A view moves no values: torch_npu's own is right, and the stream must not be drained for it.
bool is_view(const c10::FunctionSchema& schema) {
    for (const auto& result : schema.returns())
        if (result.alias_info() && !result.alias_info()->isWrite()) return true;
    return false;
}

enum class Action { keep, run, refuse };

Action action_for(const c10::OperatorHandle& op) {
    using Key = c10::DispatchKey;
    if (kept.count(name_of(op)) || is_view(op.schema())) return Action::keep;
    bool decomposes = op.hasKernelForDispatchKey(Key::CompositeImplicitAutograd) ||
        op.hasKernelForDispatchKey(Key::CompositeExplicitAutograd) ||
        op.hasKernelForDispatchKey(Key::CompositeExplicitAutogradNonFunctional);
    bool on_the_cpu = op.hasKernelForDispatchKey(Key::CPU);
    // One that only torch_npu has stays its own: it calls aclnn operators, and ends by name where one is missing.
    if (op.hasKernelForDispatchKey(Key::PrivateUse1)) return on_the_cpu || decomposes ? Action::run : Action::keep;
    return on_the_cpu && !decomposes ? Action::refuse : Action::keep;
}

// Overriding kernels is what this library is for: torch's warning about it is not wanted.
struct Silent : c10::WarningHandler {
    void process(const c10::Warning&) override {}
};

}  // namespace

void install() {
    Silent silent;
    c10::WarningUtils::WarningHandlerGuard guard(&silent);
    auto& dispatcher = c10::Dispatcher::singleton();
    // Never destroyed: unregistering while the process ends would race with torch's own end.
    auto& aten = *new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    for (const auto& name : dispatcher.getAllOpNames()) {
        auto op = dispatcher.findOp(name);
        if (name.name.rfind("aten::", 0) != 0 || !op || !op->hasSchema()) continue;
        std::string own_name = name_of(*op).substr(6);
        switch (action_for(*op)) {
            case Action::keep: break;
            case Action::run: aten.impl(own_name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_aten>()); break;
            case Action::refuse: aten.impl(own_name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_fallback>()); break;
        }
    }
    original_copy = dispatcher.findSchemaOrThrow("aten::copy_", "").getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
    aten.impl("copy_", TORCH_FN(copy));
    aten.impl("_to_copy", TORCH_FN(to_copy));
    aten.impl("matmul_backward", TORCH_FN(matmul_backward));
    auto& npu = *new torch::Library(torch::Library::IMPL, "npu", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    npu.impl("npu_dtype_cast", TORCH_FN(dtype_cast));
}

}  // namespace fluidsim

extern "C" void fluidsim_install_bridge() { fluidsim::install(); }
