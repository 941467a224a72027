#include "mesh.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <thread>

#include "settings.h"

namespace fluidsim {
namespace {

using Clock = std::chrono::steady_clock;

Clock::time_point deadline() { return Clock::now() + std::chrono::seconds(settings().hccl_timeout_s); }

sockaddr_un address_of(const std::string& folder, int rank) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::string path = folder + "/" + std::to_string(rank);
    if (path.size() >= sizeof address.sun_path) throw ExchangeError("TMPDIR is too long for a socket; set a shorter one");
    std::strcpy(address.sun_path, path.c_str());
    return address;
}

int listen_at(const sockaddr_un& address, int ranks) {
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(address.sun_path);
    if (bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address) || listen(listener, ranks))
        throw ExchangeError(std::string("cannot listen at ") + address.sun_path + ": " + std::strerror(errno));
    return listener;
}

// What is left to send to, or receive from, each peer.
using Queues = std::vector<std::deque<Segment>>;

Queues by_peer(const std::vector<Segment>& segments, int ranks, int self) {
    Queues queues(ranks);
    for (const Segment& segment : segments)
        if (segment.peer != self && segment.size) queues[segment.peer].push_back(segment);
    return queues;
}

void copy_own(const std::vector<Segment>& sends, const std::vector<Segment>& receives, int self) {
    std::deque<Segment> mine;
    for (const Segment& segment : sends)
        if (segment.peer == self) mine.push_back(segment);
    for (const Segment& segment : receives) {
        if (segment.peer != self || mine.empty()) continue;
        std::memmove(segment.bytes, mine.front().bytes, std::min(segment.size, mine.front().size));
        mine.pop_front();
    }
}

// Moves on by what a socket took or gave; false when the peer is gone.
bool advance(std::deque<Segment>& queue, ssize_t moved) {
    if (moved > 0) {
        queue.front().bytes += moved;
        queue.front().size -= moved;
        if (!queue.front().size) queue.pop_front();
        return true;
    }
    return moved < 0 && (errno == EAGAIN || errno == EINTR);
}

}  // namespace

Mesh::Mesh(std::string where, int ranks, int own) : folder(std::move(where)), size(ranks), rank(own), sockets_(ranks, -1) {
    sockaddr_un own_address = address_of(folder, rank);
    int listener = listen_at(own_address, size);
    for (int peer = 0; peer < rank; ++peer) connect_to(peer);
    accept_higher_ranks(listener);
    close(listener);
    unlink(own_address.sun_path);
    rmdir(folder.c_str());  // succeeds for the last rank
    for (int fd : sockets_)
        if (fd >= 0) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

Mesh::~Mesh() {
    for (int fd : sockets_)
        if (fd >= 0) close(fd);
}

void Mesh::connect_to(int peer) {
    sockaddr_un address = address_of(folder, peer);
    auto end = deadline();
    for (;;) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address)) {
            if (write(fd, &rank, sizeof rank) != sizeof rank) throw ExchangeError("a peer closed its socket");
            sockets_[peer] = fd;
            return;
        }
        close(fd);
        if (Clock::now() > end) throw ExchangeError("rank " + std::to_string(peer) + " did not join the communicator");
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

void Mesh::accept_higher_ranks(int listener) {
    for (int missing = size - 1 - rank; missing > 0; --missing) {
        pollfd waiting{listener, POLLIN, 0};
        if (poll(&waiting, 1, settings().hccl_timeout_s * 1000) <= 0)
            throw ExchangeError(std::to_string(missing) + " ranks did not join the communicator");
        int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        int peer = -1;
        if (read(fd, &peer, sizeof peer) != sizeof peer) throw ExchangeError("a peer closed its socket");
        sockets_[peer] = fd;
    }
}

void Mesh::exchange(const std::vector<Segment>& sends, const std::vector<Segment>& receives) {
    std::lock_guard<std::mutex> lock(one_at_a_time_);
    if (broken) throw ExchangeError("the communicator has failed before");
    copy_own(sends, receives, rank);
    Queues out = by_peer(sends, size, rank), in = by_peer(receives, size, rank);
    auto end = deadline();
    for (;;) {
        std::vector<pollfd> waiting;
        std::vector<int> peers;
        for (int peer = 0; peer < size; ++peer) {
            short events = (out[peer].empty() ? 0 : POLLOUT) | (in[peer].empty() ? 0 : POLLIN);
            if (!events) continue;
            waiting.push_back({sockets_[peer], events, 0});
            peers.push_back(peer);
        }
        if (waiting.empty()) return;
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
        if (left <= 0 || (poll(waiting.data(), waiting.size(), static_cast<int>(left)) == 0)) {
            broken = true;
            throw ExchangeError("rank " + std::to_string(peers.front()) + " did not answer in " +
                                std::to_string(settings().hccl_timeout_s) + " s (FLUID_SIM_HCCL_TIMEOUT)");
        }
        for (size_t i = 0; i < waiting.size(); ++i) {
            int peer = peers[i], fd = waiting[i].fd;
            bool there = true;
            if ((waiting[i].revents & (POLLOUT | POLLERR | POLLHUP)) && !out[peer].empty())
                there = advance(out[peer], send(fd, out[peer].front().bytes, out[peer].front().size, MSG_DONTWAIT | MSG_NOSIGNAL));
            if (there && (waiting[i].revents & (POLLIN | POLLERR | POLLHUP)) && !in[peer].empty())
                there = advance(in[peer], recv(fd, in[peer].front().bytes, in[peer].front().size, MSG_DONTWAIT));
            if (!there) {
                broken = true;
                throw ExchangeError("rank " + std::to_string(peer) + " is gone");
            }
        }
    }
}

}  // namespace fluidsim
