// aclrtMalloc and its kin: device memory is host memory, counted against the size of the NPU's HBM.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "acl/acl.h"
#include "engine.h"
#include "order.h"
#include "settings.h"
#include "stream.h"

namespace {

struct Block {
    size_t bytes;
    int device;
    long number;  // in the order record
};

// Never destroyed: torch_npu frees memory while the process ends.
std::mutex& mutex = *new std::mutex;  // of what follows
std::map<char*, Block>& blocks = *new std::map<char*, Block>;
std::map<int, size_t>& used = *new std::map<int, size_t>;

long allocations = 0;

// Outside the mutex: to find its Python line a note may have to wait for Python's lock.
void note(const char* kind, long number, size_t bytes) {
    if (!fluidsim_order_on() || !fluidsim::is_python_thread()) return;
    std::string fields = "\"alloc\": " + std::to_string(number) + ", \"size\": " + std::to_string(bytes);
    fluidsim_order_note(kind, fields.c_str());
}

// The block that an address is in; the mutex is held.
std::map<char*, Block>::iterator block_of(const void* address) {
    auto after = blocks.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
    if (after == blocks.begin()) return blocks.end();
    auto found = std::prev(after);
    return address < found->first + found->second.bytes ? found : blocks.end();
}

constexpr size_t kAlignment = 512;
constexpr int kPoison = 0xFF;  // NaN in every floating type, -1 in integers

void poison(void* start, size_t bytes) {
    if (fluidsim::settings().poison) std::memset(start, kPoison, bytes);
}

aclError allocate(void** pointer, size_t bytes, int device, long& number) {
    std::lock_guard<std::mutex> lock(mutex);
    if (used[device] + bytes > fluidsim::settings().hbm_bytes) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    if (posix_memalign(pointer, kAlignment, bytes)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    used[device] += bytes;
    number = ++allocations;
    blocks[static_cast<char*>(*pointer)] = {bytes, device, number};
    poison(*pointer, bytes);
    return ACL_SUCCESS;
}

}  // namespace

fluidsim::Place fluidsim::place_of(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = block_of(address);
    if (found == blocks.end()) return {0, 0};
    return {found->second.number, static_cast<size_t>(static_cast<const char*>(address) - found->first)};
}

extern "C" {

aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) {
    *pointer = nullptr;
    long number = 0;
    size_t taken = bytes ? bytes : kAlignment;
    aclError result = allocate(pointer, taken, fluidsim::current_device(), number);
    if (result == ACL_SUCCESS) note("alloc", number, taken);
    return result;
}

aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, bytes, policy);
}

aclError aclrtFree(void* pointer) {
    auto place = fluidsim::place_of(pointer);
    if (place.allocation) note("free", place.allocation, 0);
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
    fluidsim_span spans[] = {{from, bytes, 0}, {to, bytes, 1}};
    fluidsim_order_host_op("aclrtMemcpy", spans, 2);
    std::memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* to, size_t, const void* from, size_t bytes, aclrtMemcpyKind, aclrtStream stream) {
    fluidsim_span spans[] = {{from, bytes, 0}, {to, bytes, 1}};
    fluidsim_order_op("aclrtMemcpyAsync", stream, spans, 2);
    fluidsim::stream_of(stream)->push([=] { std::memmove(to, from, bytes); });
    return ACL_SUCCESS;
}

aclError aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
    fluidsim_span span{to, bytes, 1};
    fluidsim_order_host_op("aclrtMemset", &span, 1);
    std::memset(to, value, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* to, size_t, int32_t value, size_t bytes, aclrtStream stream) {
    fluidsim_span span{to, bytes, 1};
    fluidsim_order_op("aclrtMemsetAsync", stream, &span, 1);
    fluidsim::stream_of(stream)->push([=] { std::memset(to, value, bytes); });
    return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
    std::memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = block_of(pointer);
    if (found == blocks.end()) return ACL_SUCCESS;
    attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    attributes->location.id = found->second.device;
    return ACL_SUCCESS;
}

bool fluidsim_on_device(const void* pointer) {
    aclrtPtrAttributes attributes;
    aclrtPointerGetAttributes(pointer, &attributes);
    return attributes.location.type == ACL_MEM_LOCATION_TYPE_DEVICE;
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
