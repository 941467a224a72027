// aclrt*Event*: an event counts its records; a wait is for the last record that was submitted before it.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "acl/acl.h"
#include "errors.h"
#include "order.h"
#include "stream.h"

namespace {

using Clock = std::chrono::steady_clock;

uint64_t next_id() {
    static std::atomic<uint64_t> count{0};
    return ++count;
}

struct Event {
    const uint64_t id = next_id();
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t recorded = 0;  // submitted to a stream
    uint64_t reached = 0;   // executed there
    Clock::time_point time{};

    uint64_t submit() {
        std::lock_guard<std::mutex> lock(mutex);
        return ++recorded;
    }
    uint64_t last() {
        std::lock_guard<std::mutex> lock(mutex);
        return recorded;
    }
    bool complete() {
        std::lock_guard<std::mutex> lock(mutex);
        return reached >= recorded;
    }
    void reach(uint64_t record) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (record > reached) {
                reached = record;
                time = Clock::now();
            }
        }
        changed.notify_all();
    }
    void wait(uint64_t record) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return reached >= record; });
    }
};

// Tasks share the event with its handle: it may be destroyed while they are queued.
using Handle = std::shared_ptr<Event>;
Handle& event_of(aclrtEvent event) { return *static_cast<Handle*>(event); }

std::string name_of(const Handle& event) { return "\"event\": \"event " + std::to_string(event->id) + "\""; }

void note(const char* kind, const Handle& event, aclrtStream stream) {
    if (fluidsim_order_on()) fluidsim_order_note(kind, (name_of(event) + ", " + fluidsim::stream_field("stream", stream)).c_str());
}

// The host has seen that the last record was reached.
aclError seen(const Handle& event, aclError result) {
    if (fluidsim_order_on()) fluidsim_order_sync(name_of(event).c_str());
    return result;
}

}  // namespace

extern "C" {

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
    *event = new Handle(std::make_shared<Event>());
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }
aclError aclrtCreateEvent(aclrtEvent* event) { return aclrtCreateEventWithFlag(event, 0); }

aclError aclrtDestroyEvent(aclrtEvent event) {
    delete static_cast<Handle*>(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    Handle shared = event_of(event);
    uint64_t record = shared->submit();
    note("record", shared, stream);
    fluidsim::stream_of(stream)->push([shared, record] { shared->reach(record); });
    return ACL_SUCCESS;
}

// A later record makes the event pending again without a reset.
aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    Handle shared = event_of(event);
    uint64_t record = shared->last();
    note("wait", shared, stream);
    fluidsim::stream_of(stream)->push([shared, record] { shared->wait(record); });
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
    Handle shared = event_of(event);
    shared->wait(shared->last());
    return seen(shared, fluidsim::take_device_error());
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
    bool complete = event_of(event)->complete();
    *status = complete ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return complete ? seen(event_of(event), ACL_SUCCESS) : ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
    *status = event_of(event)->complete() ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
    std::chrono::duration<float, std::milli> passed = event_of(end)->time - event_of(start)->time;
    *milliseconds = passed.count();
    return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
    auto since = event_of(event)->time.time_since_epoch();
    *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(since).count();
    return ACL_SUCCESS;
}

}
