#include "stream.h"

#include <chrono>
#include <map>
#include <memory>
#include <vector>

#include "engine.h"
#include "settings.h"

namespace fluidsim {
namespace {

// Never destroyed: streams may still work while the process ends.
std::mutex& registry = *new std::mutex;  // of what follows
std::vector<Stream*>& all_streams = *new std::vector<Stream*>;
std::map<int, Stream*>& default_streams = *new std::map<int, Stream*>;

// splitmix64: any seed gives a usable sequence.
uint64_t next_random(uint64_t& state) {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

}  // namespace

Stream::Stream(int device_index, int number)
    : device(device_index),
      id(number),
      random_(settings().delay_seed * 1000003u + static_cast<uint64_t>(settings().rank) * 8191u + number) {}

void Stream::push(std::function<void()> task) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        tasks_.push_back(std::move(task));
        if (!started_) {
            started_ = true;
            thread_ = std::thread([this] { run(); });
            thread_.detach();  // a process may end while its streams work, as with a device
        }
    }
    has_task_.notify_one();
}

void Stream::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        has_task_.wait(lock, [this] { return !tasks_.empty(); });
        auto task = std::move(tasks_.front());
        tasks_.pop_front();
        busy_ = true;
        lock.unlock();
        delay();
        task();
        task = nullptr;  // what it captured goes before the stream looks idle
        lock.lock();
        busy_ = false;
        if (tasks_.empty()) has_none_.notify_all();
    }
}

void Stream::delay() {
    if (!settings().delays || settings().delay_us <= 0) return;
    // Half of the tasks start at once: a delay of every task would leave their order almost as it was.
    uint64_t drawn = next_random(random_);
    if (drawn & 1) return;
    std::this_thread::sleep_for(std::chrono::microseconds((drawn >> 1) % settings().delay_us));
}

void Stream::drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    has_none_.wait(lock, [this] { return tasks_.empty() && !busy_; });
}

bool Stream::drain_for(int milliseconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    return has_none_.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return tasks_.empty() && !busy_; });
}

bool Stream::idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return tasks_.empty() && !busy_;
}

Stream* new_stream(int device) {
    std::lock_guard<std::mutex> lock(registry);
    all_streams.push_back(new Stream(device, static_cast<int>(all_streams.size())));
    return all_streams.back();
}

Stream* stream_of(void* handle) {
    if (handle) return static_cast<Stream*>(handle);
    int device = current_device();
    {
        std::lock_guard<std::mutex> lock(registry);
        auto found = default_streams.find(device);
        if (found != default_streams.end()) return found->second;
    }
    Stream* made = new_stream(device);
    std::lock_guard<std::mutex> lock(registry);
    return default_streams.emplace(device, made).first->second;
}

void drain_device(int device) {
    std::vector<Stream*> streams;
    {
        std::lock_guard<std::mutex> lock(registry);
        streams = all_streams;
    }
    for (Stream* stream : streams)
        if (stream->device == device) stream->drain();
}

}  // namespace fluidsim

extern "C" {

void fluidsim_submit(void* stream, const char*, std::function<void()>* task) {
    std::shared_ptr<std::function<void()>> owned(task);
    fluidsim::stream_of(stream)->push([owned] { (*owned)(); });
}

void fluidsim_drain(void* stream) { fluidsim::stream_of(stream)->drain(); }

}
