// The Python line that is submitting, asked of the interpreter in this process. Its C API is found at run time: the
// libraries are built without Python's headers, and a program without Python has no lines.
#include <dlfcn.h>

#include <cstring>
#include <string>

#include "order.h"

namespace fluidsim {
namespace {

using Object = void;

template <class Function>
Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

struct Python {
    void* (*this_thread)() = find<void* (*)()>("PyGILState_GetThisThreadState");
    int (*ensure)() = find<int (*)()>("PyGILState_Ensure");
    void (*release)(int) = find<void (*)(int)>("PyGILState_Release");
    Object* (*frame)() = find<Object* (*)()>("PyEval_GetFrame");  // borrowed
    Object* (*back)(Object*) = find<Object* (*)(Object*)>("PyFrame_GetBack");
    Object* (*code)(Object*) = find<Object* (*)(Object*)>("PyFrame_GetCode");
    int (*line)(Object*) = find<int (*)(Object*)>("PyFrame_GetLineNumber");
    Object* (*attribute)(Object*, const char*) = find<Object* (*)(Object*, const char*)>("PyObject_GetAttrString");
    const char* (*text)(Object*) = find<const char* (*)(Object*)>("PyUnicode_AsUTF8");
    void (*decref)(Object*) = find<void (*)(Object*)>("Py_DecRef");
    void (*incref)(Object*) = find<void (*)(Object*)>("Py_IncRef");
    int (*alive)() = find<int (*)()>("Py_IsInitialized");

    bool here() const {
        return this_thread && ensure && release && frame && back && code && line && attribute && text && decref && incref &&
            alive && alive();
    }
};

const Python& python() {
    static const Python found;
    return found;
}

std::string attribute_text(Object* object, const char* name) {
    Object* value = python().attribute(object, name);
    if (!value) return "";
    const char* text = python().text(value);
    std::string copied = text ? text : "";
    python().decref(value);
    return copied;
}

bool is_torch(const std::string& path) {
    return path.find("/torch/") != std::string::npos || path.find("/torch_npu/") != std::string::npos || path[0] == '<';
}

// "fluid_npu/comm/all_to_all.py:88 in __init__", as the Python recorder writes it for installed packages.
std::string described(const std::string& path, int line, const std::string& function) {
    constexpr char kInstalled[] = "site-packages/";
    size_t at = path.rfind(kInstalled);
    std::string shorter = at == std::string::npos ? path : path.substr(at + std::strlen(kInstalled));
    return shorter + ":" + std::to_string(line) + " in " + function;
}

// The caller holds Python's lock.
std::string walk() {
    const Python& py = python();
    Object* frame = py.frame();
    if (frame) py.incref(frame);
    std::string found;
    while (frame && found.empty()) {
        Object* code = py.code(frame);
        std::string path = attribute_text(code, "co_filename");
        if (!path.empty() && !is_torch(path)) found = described(path, py.line(frame), attribute_text(code, "co_name"));
        py.decref(code);
        Object* outer = py.back(frame);
        py.decref(frame);
        frame = outer;
    }
    if (frame) py.decref(frame);
    return found;
}

}  // namespace

// A thread that Python does not know (torch_npu's queue, watchdogs) must not wait for Python's lock: its holder may be
// waiting for that thread.
bool is_python_thread() { return python().here() && python().this_thread(); }

std::string python_line() {
    if (!is_python_thread()) return "";
    int state = python().ensure();
    std::string line = walk();
    python().release(state);
    return line;
}

}  // namespace fluidsim
