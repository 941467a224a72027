// A communicator, and how a collective runs on it: queued on the caller's stream, errors as those of a device.
#pragma once

#include <functional>
#include <string>

#include "engine.h"
#include "mesh.h"
#include "order.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace fluidsim {

struct Communicator {
    Communicator(const std::string& folder, int size, int rank);

    Mesh mesh;
    const std::string name;
    std::vector<int> ranks;  // the RANK of each member
};

inline Communicator& communicator(HcclComm handle) { return *static_cast<Communicator*>(handle); }

// What this rank's part of a collective touches, for the order record. `sends` and `receives` are bytes for and from
// each rank; where they are empty every rank hears from all.
struct Buffers {
    Spans spans;
    std::vector<uint64_t> sends, receives;

    Buffers& read(const void* start, size_t bytes) { return add(start, bytes, 0); }
    Buffers& write(const void* start, size_t bytes) { return add(start, bytes, 1); }

private:
    Buffers& add(const void* start, size_t bytes, int write) {
        spans.push_back({start, bytes, write});
        return *this;
    }
};

// Queues `work` on the stream under the collective's name.
HcclResult collective(
    const char* name, HcclComm comm, aclrtStream stream, const Buffers& buffers, std::function<void(Mesh&)> work);

// FLUID_SIM_FAULT=die|hang|late:RANK:N: what befalls this rank before its N-th collective (from 1).
void suffer_fault();

}  // namespace fluidsim
