// The wires of one communicator: a Unix socket between every two ranks, and one exchange at a time over them.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fluidsim {

// Bytes that go to a peer or come from it. Several for one peer travel in their order.
struct Segment {
    int peer;
    char* bytes;
    size_t size;
};

struct ExchangeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Mesh {
public:
    // Connects to all ranks that were given the same folder. Throws ExchangeError.
    Mesh(std::string folder, int size, int rank);
    ~Mesh();

    // Returns when all segments have been sent and received. Throws ExchangeError: a peer is gone, or late.
    void exchange(const std::vector<Segment>& sends, const std::vector<Segment>& receives);

    const std::string folder;
    const int size;
    const int rank;
    std::atomic<bool> broken{false};

private:
    void accept_higher_ranks(int listener);
    void connect_to(int peer);

    std::vector<int> sockets_;
    std::mutex one_at_a_time_;
};

}  // namespace fluidsim
