// The environment variables that steer the simulator, read once. fluid-npu sim exec sets them from its flags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fluidsim {

struct Settings {
    int devices;            // FLUID_SIM_DEVICES: NPUs that a process sees
    std::string soc;        // FLUID_SIM_SOC: the chip's name, as aclrtGetSocName returns it
    size_t hbm_bytes;       // FLUID_SIM_HBM_MB: memory of one NPU
    std::string log;        // FLUID_SIM_LOG: folder for the operator log; empty: none
    std::string order;      // FLUID_SIM_ORDER: folder for the order record; empty: none
    bool delays;            // FLUID_SIM_DELAY_SEED is set: every task waits a random time first
    uint64_t delay_seed;    // the same seed gives each stream of each rank the same delays
    int delay_us;           // FLUID_SIM_DELAY_US: the longest delay
    bool poison;            // FLUID_SIM_POISON=1: memory is filled with NaN when it is allocated and freed
    int hccl_timeout_s;     // FLUID_SIM_HCCL_TIMEOUT: how long a collective waits for its peers
    int rank;               // RANK, for messages and delays; 0 without it
};

const Settings& settings();

}  // namespace fluidsim
