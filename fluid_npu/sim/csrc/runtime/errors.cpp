#include "errors.h"

#include <execinfo.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "engine.h"
#include "settings.h"

namespace {

constexpr aclError kKernelFailed = 507015;     // ACL_ERROR_RT_AICORE_EXCEPTION
constexpr aclError kPeerLost = 507048;         // ACL_ERROR_RT_FFTS_PLUS_TIMEOUT: a collective waited in vain
constexpr aclError kInvalidArgument = 161002;  // ACLNN_ERR_PARAM_INVALID
constexpr int kStopped = 99;                   // exit status

thread_local std::string recent_message;
std::mutex& mutex = *new std::mutex;  // of what follows
std::string& device_message = *new std::string;

void say(const std::string& message) {
    fprintf(stderr, "[fluid-sim] rank %d: %s\n", fluidsim::settings().rank, message.c_str());
    fflush(stderr);
}

}  // namespace

aclError fluidsim::take_device_error() {
    std::lock_guard<std::mutex> lock(mutex);
    if (device_message.empty()) return ACL_SUCCESS;
    recent_message = std::move(device_message);
    device_message.clear();
    return recent_message.rfind("[fluid-sim] Hccl", 0) == 0 ? kPeerLost : kKernelFailed;
}

extern "C" {

void fluidsim_device_error(const char* message) {
    say(message);
    std::lock_guard<std::mutex> lock(mutex);
    if (device_message.empty()) device_message = std::string("[fluid-sim] ") + message;
}

int fluidsim_refuse(const char* message) {
    recent_message = std::string("[fluid-sim] ") + message;
    return kInvalidArgument;
}

void fluidsim_stop(const char* message) {
    say(message);
    if (std::getenv("FLUID_SIM_BACKTRACE")) {
        void* frames[64];
        backtrace_symbols_fd(frames, backtrace(frames, 64), STDERR_FILENO);
    }
    _exit(kStopped);
}

const char* aclGetRecentErrMsg() { return recent_message.c_str(); }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

}
