// aclInit, devices, contexts: a process sees FLUID_SIM_DEVICES NPUs; a thread has one of them as its current one.
#include <dlfcn.h>

#include <cstdio>
#include <mutex>
#include <string>

#include "acl/acl.h"
#include "engine.h"
#include "errors.h"
#include "order.h"
#include "settings.h"
#include "stream.h"

namespace {

thread_local int chosen_device = -1;
constexpr intptr_t kContextBase = 0x1000;  // a context's handle is this plus its device

// The bridge brings aten's kernels. It needs libtorch_npu's registrations below its own, so it comes with the first use.
void load_bridge() {
    void* library = dlopen("libfluid_sim_bridge.so", RTLD_NOW | RTLD_LOCAL);
    if (!library) fluidsim_stop((std::string("the aten bridge cannot be loaded: ") + dlerror()).c_str());
    auto install = reinterpret_cast<void (*)()>(dlsym(library, "fluidsim_install_bridge"));
    if (!install) fluidsim_stop("libfluid_sim_bridge.so has no fluidsim_install_bridge; run: fluid-npu sim build --force");
    install();
}

}  // namespace

int fluidsim::current_device() { return chosen_device < 0 ? 0 : chosen_device; }

extern "C" {

aclError aclInit(const char*) {
    static std::once_flag once;
    std::call_once(once, load_bridge);
    return ACL_SUCCESS;
}

aclError aclFinalize() { return ACL_SUCCESS; }

const char* aclrtGetSocName() { return fluidsim::settings().soc.c_str(); }

aclError aclrtGetDeviceCount(uint32_t* count) {
    *count = fluidsim::settings().devices;
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= fluidsim::settings().devices) return ACL_ERROR_RT_INVALID_DEVICEID;
    chosen_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* device) {
    if (chosen_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
    *device = chosen_device;
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetCurrentContext(aclrtContext* context) {
    *context = reinterpret_cast<aclrtContext>(kContextBase + fluidsim::current_device());
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    chosen_device = static_cast<int>(reinterpret_cast<intptr_t>(context) - kContextBase);
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
    if (flags) *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDevice() {
    int device = fluidsim::current_device();
    fluidsim::drain_device(device);
    if (fluidsim_order_on()) fluidsim_order_sync(("\"device\": \"npu:" + std::to_string(device) + "\"").c_str());
    return fluidsim::take_device_error();
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
    *can = 1;
    return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
    *pid = 0;
    return ACL_SUCCESS;
}

// Cores of a 910B3: 24 cube; torch_npu only prints and divides by them.
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
    *value = 24;
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) {
    *value = 24;
    return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
    *value = 1;
    return ACL_SUCCESS;
}

}
