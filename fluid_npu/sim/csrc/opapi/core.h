// What every simulated aclnn operator is made of.
//
// An operator has two C functions, as in CANN: aclnnXGetWorkspaceSize checks the arguments and plans, on the thread that
// calls; aclnnX queues the plan on a stream. ACLNN(X, (parameters), (names)) defines both; the body behind it checks
// with require() and returns the kernel, which computes with ATen on the CPU, on the stream's thread. Parameters must
// be those of op-plugin's call in their order: no header declares them, so a value test of each operator guards it.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/IListRef_inl.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

struct aclTensor {
    at::Tensor tensor;
    bool on_host;  // its memory is not an NPU's
};
struct aclScalar {
    at::Scalar scalar;
};
struct aclIntArray {
    std::vector<int64_t> values;
};
struct aclBoolArray {
    std::vector<bool> values;
};
struct aclFloatArray {
    std::vector<float> values;
};
struct aclTensorList {
    std::vector<at::Tensor> tensors;
    bool on_host = false;  // of any of them
};
struct aclScalarList {
    std::vector<at::Scalar> scalars;
};

using Kernel = std::function<void()>;

struct aclOpExecutor {
    const char* name;
    Kernel kernel;
    std::vector<at::Tensor> arguments;  // for the order record
};

namespace fluidsim {

// What the documentation forbids. A kernel may throw it too, for rules about values on the device.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws Refusal unless `good`: the rule that was broken, what was given, and where the rule is written.
void require(bool good, const std::string& rule, const std::string& given, const std::string& source);

int plan(const char* name, uint64_t* workspace, aclOpExecutor** executor, const std::function<Kernel()>& make);
int launch(aclOpExecutor* executor, void* stream);

at::ScalarType scalar_type_of(int acl_type);
at::Tensor tensor(const aclTensor* given);                       // undefined for null; refuses host memory
std::vector<at::Tensor> tensors(const aclTensorList* given);     // the same for a list

inline at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat); }
bool is_half(const at::Tensor& x);          // fp16 or bf16
bool is_half_or_float(const at::Tensor& x); // or fp32
std::string show(const at::Tensor& x);      // "BFloat16[3, 4]"
std::string show(at::IntArrayRef values);   // "[1, 2]"

}  // namespace fluidsim

#define FLUIDSIM_UNPACK(...) __VA_ARGS__
#define ACLNN(NAME, PARAMETERS, NAMES)                                                                              \
    static Kernel plan_##NAME PARAMETERS;                                                                           \
    extern "C" int aclnn##NAME##GetWorkspaceSize(                                                                   \
        FLUIDSIM_UNPACK PARAMETERS, uint64_t* workspace, aclOpExecutor** executor) {                                \
        return fluidsim::plan("aclnn" #NAME, workspace, executor, [&] { return plan_##NAME NAMES; });               \
    }                                                                                                               \
    extern "C" int aclnn##NAME(void*, uint64_t, aclOpExecutor* executor, void* stream) {                            \
        return fluidsim::launch(executor, stream);                                                                  \
    }                                                                                                               \
    static Kernel plan_##NAME PARAMETERS
