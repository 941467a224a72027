// Hccl collectives: each is one exchange over the mesh, run on the stream, and a reduction where there is one.
#include <cstdint>
#include <memory>

#include "comm.h"
#include "reduce.h"

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

// Counts and offsets live in the caller's memory only during the call.
std::vector<uint64_t> copied(const void* numbers, int count) {
    auto first = static_cast<const uint64_t*>(numbers);
    return {first, first + count};
}

}  // namespace

extern "C" {

HcclResult HcclAllReduce(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    return collective("HcclAllReduce", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclReduce", comm, stream, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        bool is_root = mesh.rank == static_cast<int>(root);
        Inbox inbox(is_root ? mesh.size : 0, bytes);
        mesh.exchange({{static_cast<int>(root), at(send, 0), bytes}}, inbox.segments);
        if (is_root) fluidsim::reduce(at(receive, 0), inbox.parts, count, type, op);
    });
}

HcclResult HcclReduceScatter(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    return collective("HcclReduceScatter", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclBroadcast", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclScatter", comm, stream, [=](Mesh& mesh) {
        size_t bytes = count * bytes_of(type);
        std::vector<Segment> out;
        if (mesh.rank == static_cast<int>(root))
            for (int peer = 0; peer < mesh.size; ++peer) out.push_back({peer, at(send, peer * bytes), bytes});
        mesh.exchange(out, {{static_cast<int>(root), at(receive, 0), bytes}});
    });
}

HcclResult HcclAllGather(
    void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
    return collective("HcclAllGather", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclAlltoAll", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclAlltoAllV", comm, stream, [=](Mesh& mesh) {
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
    return collective("HcclSend", comm, stream, [=](Mesh& mesh) {
        mesh.exchange({{static_cast<int>(peer), at(buffer, 0), count * bytes_of(type)}}, {});
    });
}

HcclResult HcclRecv(
    void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
    return collective("HcclRecv", comm, stream, [=](Mesh& mesh) {
        mesh.exchange({}, {{static_cast<int>(peer), at(buffer, 0), count * bytes_of(type)}});
    });
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
    std::vector<HcclSendRecvItem> kept(items, items + count);
    return collective("HcclBatchSendRecv", comm, stream, [kept](Mesh& mesh) {
        std::vector<Segment> out, in;
        for (const auto& item : kept) {
            auto& side = item.sendRecvType == HCCL_SEND ? out : in;
            side.push_back({static_cast<int>(item.remoteRank), at(item.buf, 0), item.count * bytes_of(item.dataType)});
        }
        mesh.exchange(out, in);
    });
}

}
