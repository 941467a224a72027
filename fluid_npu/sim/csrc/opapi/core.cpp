// aclCreate* and aclDestroy*: handles around tensors; planning and launching of operators.
#include "core.h"

#include <ATen/ops/from_blob.h>

#include <optional>
#include <sstream>

#include "order.h"

namespace fluidsim {
namespace {

// The tensors of the operator that this thread is about to plan: op-plugin makes its handles right before.
thread_local std::vector<at::Tensor> created;

// An operator is handed tensors without a word which of them it writes. torch counts the writes of each: those whose
// count has changed when the kernel has run were written.
struct Writes {
    explicit Writes(const std::vector<at::Tensor>& tensors) : tensors(tensors) {
        for (const auto& x : tensors) before.push_back(x._version());
    }
    void note(long operation) const {
        Spans spans;
        for (size_t i = 0; i < tensors.size(); ++i)
            if (tensors[i]._version() != before[i]) add_span(spans, tensors[i], true);
        fluidsim_order_wrote(operation, spans.data(), spans.size());
    }
    const std::vector<at::Tensor>& tensors;
    std::vector<int64_t> before;
};

long note_launch(const aclOpExecutor& executor, void* stream) {
    if (!fluidsim_order_on()) return 0;
    Spans spans;
    for (const auto& x : executor.arguments) add_span(spans, x, false);
    return fluidsim_order_op(executor.name, stream, spans.data(), spans.size());
}

// Runs a kernel below autograd; torch counts writes only while a record is made.
void run(const aclOpExecutor& executor, long operation) {
    if (!fluidsim_order_on()) {
        at::AutoDispatchBelowADInplaceOrView no_autograd;
        executor.kernel();
        return;
    }
    at::AutoDispatchBelowAutograd no_autograd;
    Writes writes(executor.arguments);
    executor.kernel();
    writes.note(operation);
}

}  // namespace

void require(bool good, const std::string& rule, const std::string& given, const std::string& source) {
    if (!good) throw Refusal(rule + "; given: " + given + " [" + source + "]");
}

namespace {

void require_on_device(bool on_host, const std::string& given) {
    require(!on_host, "every tensor is in the memory of the NPU", given + " on the host", "CANN docs, aclCreateTensor");
}

}  // namespace

at::Tensor tensor(const aclTensor* given) {
    if (!given) return {};
    require_on_device(given->on_host, show(given->tensor));
    return given->tensor;
}

std::vector<at::Tensor> tensors(const aclTensorList* given) {
    if (!given) return {};
    require_on_device(given->on_host, std::to_string(given->tensors.size()) + " tensors, one of them");
    return given->tensors;
}

int plan(const char* name, uint64_t* workspace, aclOpExecutor** executor, const std::function<Kernel()>& make) {
    *workspace = 0;
    try {
        *executor = new aclOpExecutor{name, make(), std::exchange(created, {})};
        fluidsim_log("aclnn", name);
        return 0;
    } catch (const std::exception& error) {
        created.clear();
        fluidsim_log("refused", name);
        return fluidsim_refuse((std::string(name) + " refuses: " + error.what()).c_str());
    }
}

int launch(aclOpExecutor* executor, void* stream) {
    long operation = note_launch(*executor, stream);
    submit(stream, executor->name, [executor, operation] {
        try {
            run(*executor, operation);
        } catch (const Refusal& refusal) {
            fluidsim_log("refused", executor->name);
            device_error(std::string(executor->name) + " refuses: " + refusal.what());
        } catch (const std::exception& error) {
            device_error(std::string(executor->name) + " failed: " + error.what());
        }
        delete executor;
    });
    return 0;
}

// aclDataType, as acl_base.h numbers it.
at::ScalarType scalar_type_of(int acl_type) {
    switch (acl_type) {
        case 0: return at::kFloat;
        case 1: return at::kHalf;
        case 2: return at::kChar;
        case 3: return at::kInt;
        case 4: return at::kByte;
        case 6: return at::kShort;
        case 9: return at::kLong;
        case 11: return at::kDouble;
        case 12: return at::kBool;
        case 16: return at::kComplexFloat;
        case 27: return at::kBFloat16;
        default: fluidsim_stop(("aclDataType " + std::to_string(acl_type) + " is not simulated").c_str());
    }
}

bool is_half(const at::Tensor& x) { return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16; }
bool is_half_or_float(const at::Tensor& x) { return is_half(x) || x.scalar_type() == at::kFloat; }

std::string show(const at::Tensor& x) {
    if (!x.defined()) return "None";
    std::ostringstream text;
    text << x.scalar_type() << x.sizes();
    return text.str();
}

std::string show(at::IntArrayRef values) {
    std::ostringstream text;
    text << values;
    return text.str();
}

namespace {

at::Scalar scalar_at(const void* value, at::ScalarType type) {
    switch (type) {
        case at::kDouble: return *static_cast<const double*>(value);
        case at::kFloat: return *static_cast<const float*>(value);
        case at::kLong: return *static_cast<const int64_t*>(value);
        case at::kInt: return *static_cast<const int32_t*>(value);
        case at::kBool: return *static_cast<const bool*>(value);
        case at::kBFloat16: return static_cast<float>(*static_cast<const c10::BFloat16*>(value));
        case at::kHalf: return static_cast<float>(*static_cast<const c10::Half*>(value));
        default: fluidsim_stop("aclCreateScalar: a type that is not simulated");
    }
}

}  // namespace
}  // namespace fluidsim

extern "C" {

aclTensor* aclCreateTensor(
    const int64_t* sizes, uint64_t dims, int type, const int64_t* strides, int64_t offset, int, const int64_t*, uint64_t,
    void* data) {
    auto scalar_type = fluidsim::scalar_type_of(type);
    char* first = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(scalar_type));
    auto options = at::TensorOptions().dtype(scalar_type);
    auto made = at::from_blob(first, at::IntArrayRef(sizes, dims), at::IntArrayRef(strides, dims), options);
    if (fluidsim_order_on()) fluidsim::created.push_back(made);
    return new aclTensor{made, made.numel() > 0 && !fluidsim_on_device(data)};
}

aclScalar* aclCreateScalar(void* value, int type) {
    return new aclScalar{fluidsim::scalar_at(value, fluidsim::scalar_type_of(type))};
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) { return new aclIntArray{{values, values + count}}; }
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) { return new aclBoolArray{{values, values + count}}; }

aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
    return new aclFloatArray{{values, values + count}};
}

// A list takes its entries over.
aclTensorList* aclCreateTensorList(const aclTensor* const* entries, uint64_t count) {
    auto list = new aclTensorList;
    for (uint64_t i = 0; i < count; ++i) {
        list->tensors.push_back(entries[i]->tensor);
        list->on_host = list->on_host || entries[i]->on_host;
        delete entries[i];
    }
    return list;
}

aclScalarList* aclCreateScalarList(const aclScalar* const* entries, uint64_t count) {
    auto list = new aclScalarList;
    for (uint64_t i = 0; i < count; ++i) {
        list->scalars.push_back(entries[i]->scalar);
        delete entries[i];
    }
    return list;
}

#define DESTROY(TYPE) \
    int aclDestroy##TYPE(const acl##TYPE* handle) { \
        delete handle; \
        return 0; \
    }

DESTROY(Tensor)
DESTROY(Scalar)
DESTROY(IntArray)
DESTROY(BoolArray)
DESTROY(FloatArray)
DESTROY(TensorList)
DESTROY(ScalarList)

}
