// Hccl collectives: each is one exchange over the mesh, run on the stream, and a reduction where there is one.
#include <cstdint>
#include <memory>

#include "comm.h"
#include "reduce.h"

using fluidsim::Buffers;
using fluidsim::bytes_of;
using fluidsim::collective;
using fluidsim::communicator;
using fluidsim::Mesh;
using fluidsim::Segment;

namespace {

char* at(const void* base, size_t offset) { return static_cast<char*>(const_cast<void*>(base)) + offset; }

// One buffer for each rank, to receive what is reduced afterwards.
struct Inbox {
    Inbox(int ranks, size_t bytes) : memory(ranks, std::vector<char>(bytes)) {
        for (int rank = 0; rank < ranks; ++rank) {
            parts.push_back(memory[rank].data());
            segments.push_back({rank, memory[rank].data(), bytes});
        }
    }
    std::vector<std::vector<char>> memory;
    std::vector<char*> parts;
    std::vector<Segment> segments;
};

// What the order record says of collectives in which ranks differ.

bool is_root(HcclComm comm, uint32_t root) { return communicator(comm).mesh.rank == static_cast<int>(root); }

Buffers reduced(const void* send, void* receive, size_t bytes, uint32_t root, HcclComm comm) {
    Buffers buffers = Buffers().read(send, bytes);
    return is_root(comm, root) ? buffers.write(receive, bytes) : buffers;
}

Buffers broadcast(void* buffer, size_t bytes, uint32_t root, HcclComm comm) {
    size_t ranks = communicator(comm).mesh.size;
    bool own = is_root(comm, root);
    Buffers buffers = own ? Buffers().read(buffer, bytes) : Buffers().write(buffer, bytes);
    buffers.sends.assign(ranks, own ? bytes : 0);
    buffers.receives.assign(ranks, 0);
    buffers.sends[root] = 0;
    if (!own) buffers.receives[root] = bytes;
    return buffers;
}

Buffers scattered(const void* send, void* receive, size_t bytes, uint32_t root, HcclComm comm) {
    Buffers buffers = Buffers().write(receive, bytes);
    return is_root(comm, root) ? buffers.read(send, bytes * communicator(comm).mesh.size) : buffers;
}

Buffers all_to_all(const void* send, const void* receive, size_t sent, size_t received, HcclComm comm) {
    size_t ranks = communicator(comm).mesh.size;
    Buffers buffers = Buffers().read(send, sent * ranks).write(receive, received * ranks);
    buffers.sends.assign(ranks, sent);
    buffers.receives.assign(ranks, received);
    return buffers;
}

using Numbers = std::vector<uint64_t>;

Buffers all_to_all_v(
    const void* send, const Numbers& sent, const Numbers& sent_from, size_t out_bytes, const void* receive,
    const Numbers& received, const Numbers& received_to, size_t in_bytes) {
    Buffers buffers;
    for (size_t peer = 0; peer < sent.size(); ++peer) {
        buffers.read(at(send, sent_from[peer] * out_bytes), sent[peer] * out_bytes);
        buffers.write(at(receive, received_to[peer] * in_bytes), received[peer] * in_bytes);
        buffers.sends.push_back(sent[peer] * out_bytes);
        buffers.receives.push_back(received[peer] * in_bytes);
    }
    return buffers;
}

Buffers batch(const std::vector<HcclSendRecvItem>& items) {
    Buffers buffers;
    for (const auto& item : items) {
        size_t bytes = item.count * bytes_of(item.dataType);
        item.sendRecvType == HCCL_SEND ? buffers.read(item.buf, bytes) : buffers.write(item.buf, bytes);
    }
    return buffers;
}

// Counts and offsets live in the caller's memory only during the call.
std::vector<uint64_t> copied(const void* numbers, int count) {
    auto first = static_cast<const uint64_t*>(numbers);
    return {first, first + count};
}

}  // namespace

extern "C" {

HcclResult HcclAllReduce(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    Buffers buffers = Buffers().read(send, count * bytes_of(type)).write(receive, count * bytes_of(type));
    return collective("HcclAllReduce", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        Inbox inbox(mesh.size, bytes);
        std::vector<Segment> out;
        for (int peer = 0; peer < mesh.size; ++peer) out.push_back({peer, at(send, 0), bytes});
        mesh.exchange(out, inbox.segments);
        fluidsim::reduce(at(receive, 0), inbox.parts, count, type, op);
    });
}

HcclResult HcclReduce(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root, HcclComm comm,
    aclrtStream stream) {
    Buffers buffers = reduced(send, receive, count * bytes_of(type), root, comm);
    return collective("HcclReduce", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        bool is_root = mesh.rank == static_cast<int>(root);
        Inbox inbox(is_root ? mesh.size : 0, bytes);
        mesh.exchange({{static_cast<int>(root), at(send, 0), bytes}}, inbox.segments);
        if (is_root) fluidsim::reduce(at(receive, 0), inbox.parts, count, type, op);
    });
}

HcclResult HcclReduceScatter(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    Buffers buffers = Buffers().read(send, communicator(comm).mesh.size * count * bytes_of(type)).write(receive, count * bytes_of(type));
    return collective("HcclReduceScatter", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        Inbox inbox(mesh.size, bytes);
        std::vector<Segment> out;
        for (int peer = 0; peer < mesh.size; ++peer) out.push_back({peer, at(send, peer * bytes), bytes});
        mesh.exchange(out, inbox.segments);
        fluidsim::reduce(at(receive, 0), inbox.parts, count, type, op);
    });
}

HcclResult HcclBroadcast(
    void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
    Buffers buffers = broadcast(buffer, count * bytes_of(type), root, comm);
    return collective("HcclBroadcast", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        std::vector<Segment> out, in;
        if (mesh.rank != static_cast<int>(root)) in.push_back({static_cast<int>(root), at(buffer, 0), bytes});
        else
            for (int peer = 0; peer < mesh.size; ++peer)
                if (peer != mesh.rank) out.push_back({peer, at(buffer, 0), bytes});
        mesh.exchange(out, in);
    });
}

HcclResult HcclScatter(
    void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
    Buffers buffers = scattered(send, receive, count * bytes_of(type), root, comm);
    return collective("HcclScatter", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        std::vector<Segment> out;
        if (mesh.rank == static_cast<int>(root))
            for (int peer = 0; peer < mesh.size; ++peer) out.push_back({peer, at(send, peer * bytes), bytes});
        mesh.exchange(out, {{static_cast<int>(root), at(receive, 0), bytes}});
    });
}

HcclResult HcclAllGather(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
    Buffers buffers = Buffers().read(send, count * bytes_of(type)).write(receive, communicator(comm).mesh.size * count * bytes_of(type));
    return collective("HcclAllGather", comm, stream, buffers, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        std::vector<Segment> out, in;
        for (int peer = 0; peer < mesh.size; ++peer) {
            out.push_back({peer, at(send, 0), bytes});
            in.push_back({peer, at(receive, peer * bytes), bytes});
        }
        mesh.exchange(out, in);
    });
}

HcclResult HcclAlltoAll(
    const void* send, uint64_t send_count, HcclDataType send_type, const void* receive, uint64_t receive_count,
    HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
    Buffers buffers = all_to_all(send, receive, send_count * bytes_of(send_type), receive_count * bytes_of(receive_type), comm);
    return collective("HcclAlltoAll", comm, stream, buffers, [=](Mesh& mesh) {
        size_t sent = send_count * bytes_of(send_type), received = receive_count * bytes_of(receive_type);
        std::vector<Segment> out, in;
        for (int peer = 0; peer < mesh.size; ++peer) {
            out.push_back({peer, at(send, peer * sent), sent});
            in.push_back({peer, at(receive, peer * received), received});
        }
        mesh.exchange(out, in);
    });
}

HcclResult HcclAlltoAllV(
    const void* send, const void* send_counts, const void* send_starts, HcclDataType send_type, const void* receive,
    const void* receive_counts, const void* receive_starts, HcclDataType receive_type, HcclComm comm,
    aclrtStream stream) {
    int ranks = communicator(comm).mesh.size;
    auto sent = copied(send_counts, ranks), sent_from = copied(send_starts, ranks);
    auto received = copied(receive_counts, ranks), received_to = copied(receive_starts, ranks);
    auto buffers = all_to_all_v(
        send, sent, sent_from, bytes_of(send_type), receive, received, received_to, bytes_of(receive_type));
    return collective("HcclAlltoAllV", comm, stream, buffers, [=](Mesh& mesh) {
        size_t out_bytes = bytes_of(send_type), in_bytes = bytes_of(receive_type);
        std::vector<Segment> out, in;
        for (int peer = 0; peer < mesh.size; ++peer) {
            out.push_back({peer, at(send, sent_from[peer] * out_bytes), sent[peer] * out_bytes});
            in.push_back({peer, at(receive, received_to[peer] * in_bytes), received[peer] * in_bytes});
        }
        mesh.exchange(out, in);
    });
}

HcclResult HcclSend(
    void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
    return collective("HcclSend", comm, stream, Buffers().read(buffer, count * bytes_of(type)), [=](Mesh& mesh) {
        mesh.exchange({{static_cast<int>(peer), at(buffer, 0), count * bytes_of(type)}}, {});
    });
}

HcclResult HcclRecv(
    void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
    return collective("HcclRecv", comm, stream, Buffers().write(buffer, count * bytes_of(type)), [=](Mesh& mesh) {
        mesh.exchange({}, {{static_cast<int>(peer), at(buffer, 0), count * bytes_of(type)}});
    });
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
    std::vector<HcclSendRecvItem> kept(items, items + count);
    return collective("HcclBatchSendRecv", comm, stream, batch(kept), [kept](Mesh& mesh) {
        std::vector<Segment> out, in;
        for (const auto& item : kept) {
            auto& side = item.sendRecvType == HCCL_SEND ? out : in;
            side.push_back({static_cast<int>(item.remoteRank), at(item.buf, 0), item.count * bytes_of(item.dataType)});
        }
        mesh.exchange(out, in);
    });
}

}
