#include "order.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <mutex>

#include "engine.h"
#include "settings.h"
#include "stream.h"

namespace {

using fluidsim::settings;

std::mutex& mutex = *new std::mutex;  // of what follows, never destroyed: threads outlive main()
long numbers = 0;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int open_record() {
    std::string path = settings().order + "/rank" + std::to_string(settings().rank) + "-" + std::to_string(getpid()) + ".jsonl";
    int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) fluidsim_stop(("FLUID_SIM_ORDER: " + path + " cannot be written; give a folder that exists").c_str());
    return file;
}

// Written at once: a process that leaves by _exit or is killed has still said what it did. The mutex is held.
long put(const std::string& members) {
    static const int file = open_record();
    static const bool named = [] {
        std::string head = "{\"kind\": \"process\", \"name\": \"simulator\", \"number\": 1, \"rank\": " +
            std::to_string(settings().rank) + "}\n";
        numbers = 1;
        return write(file, head.data(), head.size()) > 0;
    }();
    std::string line = "{\"number\": " + std::to_string(++numbers) + ", " + members + "}\n";
    if (!named || write(file, line.data(), line.size()) < 0) fluidsim_stop("FLUID_SIM_ORDER: the disk is full");
    return numbers;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return out + '"';
}

std::string common(const char* kind) {
    char at[64];
    std::snprintf(at, sizeof at, ", \"at\": %.6f, \"until\": %.6f", now(), now());
    std::string line = fluidsim::python_line();
    return std::string("\"kind\": \"") + kind + "\"" + at + (line.empty() ? "" : ", \"line\": " + quoted(line));
}

std::string list(const fluidsim_span* spans, size_t count, bool writes) {
    std::string out;
    for (size_t i = 0; i < count; ++i) {
        if (static_cast<bool>(spans[i].write) != writes || !spans[i].bytes) continue;
        auto place = fluidsim::place_of(spans[i].start);
        if (!place.allocation) continue;
        out += (out.empty() ? "[" : ", [") + std::to_string(place.allocation) + ", " + std::to_string(place.offset) + ", " +
            std::to_string(place.offset + spans[i].bytes) + "]";
    }
    return "[" + out + "]";
}

std::string accesses(const fluidsim_span* spans, size_t count) {
    return ", \"reads\": " + list(spans, count, false) + ", \"writes\": " + list(spans, count, true);
}

// The line is asked for before the mutex is taken: it may have to wait for Python's lock, whose holder may come here.
long add(const std::string& members) {
    std::lock_guard<std::mutex> lock(mutex);
    return put(members);
}

}  // namespace

std::string fluidsim::stream_field(const char* key, void* handle) {
    Stream* stream = stream_of(handle);
    return std::string("\"") + key + "\": \"npu:" + std::to_string(stream->device) + "/" + std::to_string(stream->id) + "\"";
}

extern "C" {

int fluidsim_order_on() {
    static const bool on = !settings().order.empty();
    return on;
}

long fluidsim_order_op(const char* name, void* stream, const fluidsim_span* spans, size_t count) {
    if (!fluidsim_order_on()) return 0;
    return add(common("op") + ", \"name\": " + quoted(name) + ", " + fluidsim::stream_field("stream", stream) +
               accesses(spans, count));
}

void fluidsim_order_host_op(const char* name, const fluidsim_span* spans, size_t count) {
    if (fluidsim_order_on())
        add(common("op") + ", \"name\": " + quoted(name) + ", \"stream\": \"host\"" + accesses(spans, count));
}

void fluidsim_order_wrote(long number, const fluidsim_span* spans, size_t count) {
    if (!fluidsim_order_on() || !count) return;
    add("\"kind\": \"wrote\", \"of\": " + std::to_string(number) + accesses(spans, count));
}

void fluidsim_order_collective(
    const char* name, void* stream, const char* fields, const fluidsim_span* spans, size_t count) {
    if (!fluidsim_order_on()) return;
    add(common("collective") + ", \"name\": " + quoted(name) + ", " + fields + fluidsim::stream_field("stream", stream) +
        accesses(spans, count));
}

void fluidsim_order_note(const char* kind, const char* fields) {
    if (fluidsim_order_on()) add(common(kind) + ", " + fields);
}

void fluidsim_order_sync(const char* fields) {
    if (fluidsim_order_on() && fluidsim::is_python_thread()) add(common("sync") + ", " + fields);
}

}
