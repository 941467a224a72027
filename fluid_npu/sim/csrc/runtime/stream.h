// A stream: a thread with a queue of tasks. The thread starts with the first task, as torch_npu makes many streams.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace fluidsim {

class Stream {
public:
    Stream(int device, int id);
    void push(std::function<void()> task);
    void drain();                     // until idle
    bool drain_for(int milliseconds); // false: still busy then
    bool idle();

    const int device;
    const int id;

private:
    void run();
    void delay();

    std::mutex mutex_;
    std::condition_variable has_task_, has_none_;
    std::deque<std::function<void()>> tasks_;
    bool busy_ = false;
    bool started_ = false;
    uint64_t random_;
    std::thread thread_;
};

Stream* new_stream(int device);
Stream* stream_of(void* handle);    // null: the current device's default stream
void drain_device(int device);
int current_device();

}  // namespace fluidsim
