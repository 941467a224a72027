// The order record: what the program submitted, for fluid_npu.order (its records.py says what each line means).
//
// On when FLUID_SIM_ORDER names a folder. Only what the hardware's runtime would know is written: submissions, events,
// waits and synchronisations of the program, never what this simulator does on its own (its drains, its threads).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" {
// Bytes that an operation touches.
struct fluidsim_span {
    const void* start;
    size_t bytes;
    int write;
};

// Whether a record is made.
int fluidsim_order_on();

// One operation submitted to a stream (null: the current device's default stream). Returns its number.
long fluidsim_order_op(const char* name, void* stream, const fluidsim_span* spans, size_t count);

// A synchronous copy or fill of the host itself.
void fluidsim_order_host_op(const char* name, const fluidsim_span* spans, size_t count);

// What operation `number` was seen to write, of the spans given as reads: known only when it has run.
void fluidsim_order_wrote(long number, const fluidsim_span* spans, size_t count);

// A collective. `fields`: JSON members for group, sends and receives, each followed by a comma.
void fluidsim_order_collective(
    const char* name, void* stream, const char* fields, const fluidsim_span* spans, size_t count);

// An entry of which `fields` are the JSON members behind "kind", without the first comma.
void fluidsim_order_note(const char* kind, const char* fields);

// The host waited: for what `fields` say. Nothing when the thread is not the program's own.
void fluidsim_order_sync(const char* fields);
}

namespace fluidsim {

using Spans = std::vector<fluidsim_span>;

// The span from the first to the last element of a tensor of ATen.
template <class Tensor>
void add_span(Spans& spans, const Tensor& x, bool write) {
    if (!x.defined() || !x.numel()) return;
    int64_t last = 0;
    for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
    spans.push_back({x.const_data_ptr(), static_cast<size_t>((last + 1) * x.element_size()), write});
}

// The innermost Python line of the calling thread that is the program's; empty on a thread without Python.
std::string python_line();
bool is_python_thread();

std::string stream_field(const char* key, void* stream);

// Where an address is: the number of the aclrtMalloc that it is in, and the offset. Number 0: the host's memory, which
// is not followed (its allocator is not the simulator's).
struct Place {
    long allocation;
    size_t offset;
};
Place place_of(const void* address);

}  // namespace fluidsim
