#include "random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

namespace fluidsim {
namespace {

std::mutex& one_at_a_time = *new std::mutex;
constexpr uint64_t kOffsetStep = 4;  // Philox counts in fours

at::Generator generator_of(const std::vector<c10::IValue>& arguments, c10::Device device) {
    for (const auto& argument : arguments)
        if (argument.isGenerator() && argument.toGenerator().defined()) return argument.toGenerator();
    return at::globalContext().defaultGenerator(device);
}

}  // namespace

NpuRandomness::NpuRandomness(
    const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments, c10::Device device)
    : lock_(one_at_a_time, std::defer_lock) {
    if (!op.hasTag(at::Tag::nondeterministic_seeded)) return;
    auto npu = generator_of(arguments, device);
    TORCH_CHECK(npu.device().type() == device.type(), "Expected a '", device.type(), "' device type for generator but found '",
        npu.device().type(), "'");
    uint64_t seed, offset;
    {
        std::lock_guard<std::mutex> lock(npu.mutex());
        seed = npu.current_seed();
        offset = npu.get_offset();
        npu.set_offset(offset + kOffsetStep);
    }
    lock_.lock();
    cpu_ = at::detail::getDefaultCPUGenerator();
    before_ = cpu_.clone();
    cpu_.set_current_seed(seed * 0x9e3779b97f4a7c15ull + offset);
}

NpuRandomness::~NpuRandomness() {
    if (before_.defined()) cpu_.set_state(before_.get_state());
}

}  // namespace fluidsim
