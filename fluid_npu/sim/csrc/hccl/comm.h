// A communicator, and how a collective runs on it: queued on the caller's stream, errors as those of a device.
#pragma once

#include <functional>
#include <string>

#include "engine.h"
#include "mesh.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace fluidsim {

struct Communicator {
    Communicator(const std::string& folder, int size, int rank);

    Mesh mesh;
    const std::string name;
};

inline Communicator& communicator(HcclComm handle) { return *static_cast<Communicator*>(handle); }

// Queues `work` on the stream under the collective's name.
HcclResult collective(const char* name, HcclComm comm, aclrtStream stream, std::function<void(Mesh&)> work);

// FLUID_SIM_FAULT=die|hang|late:RANK:N: what befalls this rank before its N-th collective (from 1).
void suffer_fault();

}  // namespace fluidsim
