// What the simulator's libraries ask of its runtime (libascendcl.so): streams of tasks, errors, the operator log.
//
// A stream is a thread that runs its tasks in the order in which they were submitted. Nothing else orders two
// streams: only events do, as on the hardware.
#pragma once

#include <functional>
#include <string>

extern "C" {
// Queues *task on a stream (an aclrtStream; null: the default stream of the current device) and owns it from then on.
void fluidsim_submit(void* stream, const char* name, std::function<void()>* task);

// Waits until the stream has no task left. Errors stay for the next synchronising call of the program.
void fluidsim_drain(void* stream);

// A task failed, as a kernel that traps on the device: printed now, returned by the next synchronising call.
void fluidsim_device_error(const char* message);

// Whether a pointer is into memory of an NPU, which aclrtMalloc gave.
bool fluidsim_on_device(const void* pointer);

// Sets what aclGetRecentErrMsg returns on this thread, and returns the code of an invalid argument.
int fluidsim_refuse(const char* message);

// Prints the message and ends the process at once. For what cannot go on without inventing values.
[[noreturn]] void fluidsim_stop(const char* message);

// Notes that an operator ran, on the path `kind`: aclnn, aten, aten-sync, hccl, fallback or refused.
void fluidsim_log(const char* kind, const char* name);
}

namespace fluidsim {

inline void submit(void* stream, const char* name, std::function<void()> task) {
    fluidsim_submit(stream, name, new std::function<void()>(std::move(task)));
}

inline void device_error(const std::string& message) { fluidsim_device_error(message.c_str()); }

}  // namespace fluidsim
