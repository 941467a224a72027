#include "settings.h"

#include <cstdlib>

namespace fluidsim {
namespace {

long number(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

std::string word(const char* name, const char* otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? text : otherwise;
}

Settings read() {
    return {
        .devices = static_cast<int>(number("FLUID_SIM_DEVICES", 8)),
        .soc = word("FLUID_SIM_SOC", "Ascend910B3"),
        .hbm_bytes = static_cast<size_t>(number("FLUID_SIM_HBM_MB", 65536)) << 20,
        .log = word("FLUID_SIM_LOG", ""),
        .order = word("FLUID_SIM_ORDER", ""),
        .delays = std::getenv("FLUID_SIM_DELAY_SEED") != nullptr,
        .delay_seed = static_cast<uint64_t>(number("FLUID_SIM_DELAY_SEED", 0)),
        .delay_us = static_cast<int>(number("FLUID_SIM_DELAY_US", 200)),
        .poison = number("FLUID_SIM_POISON", 0) != 0,
        .hccl_timeout_s = static_cast<int>(number("FLUID_SIM_HCCL_TIMEOUT", 600)),
        .rank = static_cast<int>(number("RANK", 0)),
    };
}

}  // namespace

const Settings& settings() {
    static const Settings read_once = read();
    return read_once;
}

}  // namespace fluidsim
