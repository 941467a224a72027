// Knobs of the runtime that have no meaning here: accepted, and nothing else.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "acl/acl.h"
#include "acl/acl_prof.h"

extern "C" {

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetExceptionInfoCallback(aclrtExceptionInfoCallback) { return ACL_SUCCESS; }
aclError aclmdlInitDump() { return ACL_SUCCESS; }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }
aclError aclmdlSetDump(const char*) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }

aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
    *value = 0;
    return ACL_SUCCESS;
}

// torch_npu's own log, at the level of FLUID_SIM_APPLOG (0 debug .. 3 error) and above.
void aclAppLog(aclLogLevel level, const char*, const char* file, uint32_t line, const char* format, ...) {
    static const char* least = std::getenv("FLUID_SIM_APPLOG");
    if (!least || static_cast<int>(level) < std::atoi(least)) return;
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "[torch_npu %d %s:%u] ", static_cast<int>(level), file, line);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
}

}
