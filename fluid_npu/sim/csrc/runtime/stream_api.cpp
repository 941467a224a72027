// aclrt*Stream*: the calls of the runtime on streams, and the callbacks that run on them.
#include <chrono>
#include <thread>

#include "acl/acl.h"
#include "errors.h"
#include "order.h"
#include "stream.h"

using fluidsim::stream_of;

namespace {

// The host has seen that the stream is idle.
aclError seen(aclrtStream stream, aclError result) {
    if (fluidsim_order_on()) fluidsim_order_sync(fluidsim::stream_field("stream", stream).c_str());
    return result;
}

}  // namespace

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
    *stream = fluidsim::new_stream(fluidsim::current_device());
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

// A stream object stays: a late event or query of a destroyed stream must not crash the program under test.
aclError aclrtDestroyStream(aclrtStream stream) {
    stream_of(stream)->drain();
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream) { return ACL_SUCCESS; }

aclError aclrtSynchronizeStream(aclrtStream stream) {
    stream_of(stream)->drain();
    return seen(stream, fluidsim::take_device_error());
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t milliseconds) {
    if (milliseconds < 0) return aclrtSynchronizeStream(stream);
    if (!stream_of(stream)->drain_for(milliseconds)) return ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
    return seen(stream, fluidsim::take_device_error());
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
    bool idle = stream_of(stream)->idle();
    *status = idle ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return idle ? seen(stream, ACL_SUCCESS) : ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    *id = stream_of(stream)->id;
    return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType, aclrtStream stream) {
    stream_of(stream)->push([function, data] { function(data); });
    return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* data) {
    stream_of(stream)->push([function, data] { function(data); });
    return ACL_SUCCESS;
}

// Callbacks run on the stream's own thread, so nobody has to subscribe to them.
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }

aclError aclrtProcessReport(int32_t milliseconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds > 0 ? milliseconds : 1));
    return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }

aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
    *flag = 0;
    return ACL_SUCCESS;
}

}
