// aclrtMalloc and its kin: device memory is host memory, counted against the size of the NPU's HBM.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "acl/acl.h"
#include "engine.h"
#include "settings.h"
#include "stream.h"

namespace {

struct Block {
    size_t bytes;
    int device;
};

// Never destroyed: torch_npu frees memory while the process ends.
std::mutex& mutex = *new std::mutex;  // of what follows
std::map<char*, Block>& blocks = *new std::map<char*, Block>;
std::map<int, size_t>& used = *new std::map<int, size_t>;

constexpr size_t kAlignment = 512;
constexpr int kPoison = 0xFF;  // NaN in every floating type, -1 in integers

void poison(void* start, size_t bytes) {
    if (fluidsim::settings().poison) std::memset(start, kPoison, bytes);
}

}  // namespace

extern "C" {

aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) {
    *pointer = nullptr;
    int device = fluidsim::current_device();
    size_t taken = bytes ? bytes : kAlignment;
    std::lock_guard<std::mutex> lock(mutex);
    if (used[device] + taken > fluidsim::settings().hbm_bytes) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    if (posix_memalign(pointer, kAlignment, taken)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    used[device] += taken;
    blocks[static_cast<char*>(*pointer)] = {taken, device};
    poison(*pointer, taken);
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, bytes, policy);
}

aclError aclrtFree(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = blocks.find(static_cast<char*>(pointer));
    if (found == blocks.end()) return ACL_ERROR_RT_PARAM_INVALID;
    poison(pointer, found->second.bytes);
    used[found->second.device] -= found->second.bytes;
    blocks.erase(found);
    free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtMallocHost(void** pointer, size_t bytes) {
    return posix_memalign(pointer, 64, bytes ? bytes : 64) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtMallocHostWithCfg(void** pointer, uint64_t bytes, aclrtMallocConfig*) {
    return aclrtMallocHost(pointer, bytes);
}

aclError aclrtFreeHost(void* pointer) {
    free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* unused, size_t* total) {
    std::lock_guard<std::mutex> lock(mutex);
    *total = fluidsim::settings().hbm_bytes;
    *unused = *total - used[fluidsim::current_device()];
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void* to, size_t, const void* from, size_t bytes, aclrtMemcpyKind) {
    std::memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* to, size_t, const void* from, size_t bytes, aclrtMemcpyKind, aclrtStream stream) {
    fluidsim::stream_of(stream)->push([=] { std::memmove(to, from, bytes); });
    return ACL_SUCCESS;
}

aclError aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
    std::memset(to, value, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* to, size_t, int32_t value, size_t bytes, aclrtStream stream) {
    fluidsim::stream_of(stream)->push([=] { std::memset(to, value, bytes); });
    return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
    std::memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(const_cast<char*>(static_cast<const char*>(pointer)));
    if (after == blocks.begin()) return ACL_SUCCESS;
    auto found = std::prev(after);
    if (pointer < found->first + found->second.bytes) {
        attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
        attributes->location.id = found->second.device;
    }
    return ACL_SUCCESS;
}

// Virtual memory is not simulated: torch_npu asks for it only with expandable_segments:True.
#define NOT_SIMULATED(name) fluidsim_stop(#name " is not simulated; unset expandable_segments in PYTORCH_NPU_ALLOC_CONF")

aclError aclrtReserveMemAddress(void**, size_t, size_t, void*, uint64_t) { NOT_SIMULATED(aclrtReserveMemAddress); }
aclError aclrtReleaseMemAddress(void*) { NOT_SIMULATED(aclrtReleaseMemAddress); }
aclError aclrtMallocPhysical(aclrtDrvMemHandle*, size_t, const aclrtPhysicalMemProp*, uint64_t) {
    NOT_SIMULATED(aclrtMallocPhysical);
}
aclError aclrtFreePhysical(aclrtDrvMemHandle) { NOT_SIMULATED(aclrtFreePhysical); }
aclError aclrtMapMem(void*, size_t, size_t, aclrtDrvMemHandle, uint64_t) { NOT_SIMULATED(aclrtMapMem); }
aclError aclrtUnmapMem(void*) { NOT_SIMULATED(aclrtUnmapMem); }

}
