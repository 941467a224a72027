#include "comm.h"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "settings.h"

namespace fluidsim {
namespace {

constexpr char kPrefix[] = "fluid-sim-hccl";

template <class Number>
std::string list(const std::vector<Number>& numbers) {
    std::string text;
    for (Number number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
    return "[" + text + "]";
}

void note(const Communicator& at, const char* name, aclrtStream stream, const Buffers& buffers) {
    if (!fluidsim_order_on()) return;
    std::string fields = "\"group\": \"" + at.name + "\", ";
    if (!buffers.sends.empty())
        fields += "\"sends\": " + list(buffers.sends) + ", \"receives\": " + list(buffers.receives) + ", ";
    fluidsim_order_collective(name, stream, fields.c_str(), buffers.spans.data(), buffers.spans.size());
}

HcclResult make(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* comm) {
    try {
        *comm = new Communicator(root->internal, static_cast<int>(size), static_cast<int>(rank));
        return HCCL_SUCCESS;
    } catch (const ExchangeError& error) {
        std::fprintf(stderr, "[fluid-sim] rank %d: HcclCommInitRootInfo: %s\n", settings().rank, error.what());
        return HCCL_E_TIMEOUT;
    }
}

}  // namespace

Communicator::Communicator(const std::string& folder, int size, int rank)
    : mesh(folder, size, rank), name(folder.substr(folder.rfind('/') + 1)), ranks(size) {
    if (!fluidsim_order_on()) return;
    std::vector<Segment> out, in;
    int own = settings().rank;
    for (int peer = 0; peer < size; ++peer) {
        out.push_back({peer, reinterpret_cast<char*>(&own), sizeof own});
        in.push_back({peer, reinterpret_cast<char*>(&ranks[peer]), sizeof own});
    }
    mesh.exchange(out, in);
    fluidsim_order_note("group", ("\"group\": \"" + name + "\", \"ranks\": " + list(ranks)).c_str());
}

HcclResult collective(
    const char* name, HcclComm comm, aclrtStream stream, const Buffers& buffers, std::function<void(Mesh&)> work) {
    Communicator* at = &communicator(comm);
    note(*at, name, stream, buffers);
    fluidsim_log("hccl", name);
    submit(stream, name, [=] {
        suffer_fault();
        try {
            work(at->mesh);
        } catch (const ExchangeError& error) {
            device_error(std::string(name) + " on " + at->name + ": " + error.what());
        }
    });
    return HCCL_SUCCESS;
}

void suffer_fault() {
    static const char* text = std::getenv("FLUID_SIM_FAULT");
    if (!text) return;
    static std::atomic<int> calls{0};
    char kind[8] = "";
    int rank = -1, nth = -1;
    if (std::sscanf(text, "%7[a-z]:%d:%d", kind, &rank, &nth) != 3)
        fluidsim_stop("FLUID_SIM_FAULT: allowed is die, hang or late, then :RANK:N, as in die:1:5");
    if (rank != settings().rank || ++calls != nth) return;
    if (!std::strcmp(kind, "die")) raise(SIGKILL);
    else if (!std::strcmp(kind, "hang")) for (;;) pause();
    else if (!std::strcmp(kind, "late")) std::this_thread::sleep_for(std::chrono::seconds(2));
    else fluidsim_stop("FLUID_SIM_FAULT: allowed is die, hang or late, then :RANK:N, as in die:1:5");
}

}  // namespace fluidsim

using fluidsim::communicator;

extern "C" {

// The root's folder of sockets is what the ranks must share.
HcclResult HcclGetRootInfo(HcclRootInfo* root) {
    std::memset(root, 0, sizeof *root);
    const char* temporary = std::getenv("TMPDIR");
    std::string folder = std::string(temporary ? temporary : "/tmp") + "/" + fluidsim::kPrefix + ".XXXXXX";
    if (!mkdtemp(folder.data())) return HCCL_E_SYSCALL;
    std::strncpy(root->internal, folder.c_str(), sizeof root->internal - 1);
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* comm) {
    return fluidsim::make(size, root, rank, comm);
}

HcclResult HcclCommInitRootInfoConfig(
    uint32_t size, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig*, HcclComm* comm) {
    return fluidsim::make(size, root, rank, comm);
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

// The object stays, with closed sockets only at the end: a queued collective may still use it.
HcclResult HcclCommDestroy(HcclComm) { return HCCL_SUCCESS; }

HcclResult HcclGetCommName(HcclComm comm, char* name) {
    std::strcpy(name, communicator(comm).name.c_str());
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
    *error = communicator(comm).mesh.broken ? HCCL_E_REMOTE : HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
    *size = communicator(comm).mesh.size;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
    *rank = communicator(comm).mesh.rank;
    return HCCL_SUCCESS;
}

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
const char* HcclGetErrorString(HcclResult) { return "simulated HCCL; the reason was printed with [fluid-sim]"; }

}
