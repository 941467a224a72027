// aclop*: the operator path of old CANN. torch_npu takes it when libopapi lacks an operator, so it ends the process by
// name: a path that returned nothing would leave plausible garbage in the outputs.
#include <string>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "engine.h"

extern "C" aclError aclopCompileAndExecute(
    const char* name, int, const aclTensorDesc* const[], const aclDataBuffer* const[], int, const aclTensorDesc* const[],
    aclDataBuffer* const[], const aclopAttr*, aclopEngineType, aclopCompileType, const char*, aclrtStream) {
    fluidsim_log("missing", name);
    std::string text = std::string("operator ") + name + " is not simulated: libopapi.so has no aclnn operator for it, and "
        "torch_npu fell back to the legacy path. Add it to fluid_npu/sim/csrc/opapi, or use another operator";
    fluidsim_stop(text.c_str());
}
