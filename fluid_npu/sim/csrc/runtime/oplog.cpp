// The operator log: one line "kind name" for each operator, in a file of each process below FLUID_SIM_LOG.
//
// Lines are written at once and unbuffered: a worker that leaves by _exit or is killed has still said what it ran.
#include <fcntl.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <string>

#include "engine.h"
#include "settings.h"

namespace {

int open_log() {
    const auto& settings = fluidsim::settings();
    if (settings.log.empty()) return -1;
    std::string path = settings.log + "/rank" + std::to_string(settings.rank) + "-" + std::to_string(getpid()) + ".log";
    int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) fluidsim_stop(("FLUID_SIM_LOG: " + path + " cannot be written; give a folder that exists").c_str());
    return file;
}

}  // namespace

extern "C" void fluidsim_log(const char* kind, const char* name) {
    static const int file = open_log();
    if (file < 0) return;
    std::string line = std::string(kind) + " " + name + "\n";
    if (write(file, line.data(), line.size()) < 0) fluidsim_stop("FLUID_SIM_LOG: the disk is full");
}
