// The Python line that is submitting, asked of the interpreter in this process. Its C API is found at run time: the
// libraries are built without Python's headers, and a program without Python has no lines.
#include <dlfcn.h>
#include <unistd.h>

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

// Frames that submit for others: torch, the recorder of fluid_npu, generated code.
bool is_passed_over(const std::string& path) {
    for (const char* part : {"/torch/", "/torch_npu/", "/fluid_npu/order/"})
        if (path.find(part) != std::string::npos) return true;
    return path[0] == '<';
}

std::string working_folder() {
    char path[4096];
    return getcwd(path, sizeof path) ? std::string(path) + "/" : "";
}

// "fluid_npu/comm/all_to_all.py:88 in __init__", as the Python recorder writes it.
std::string described(const std::string& path, int line, const std::string& function) {
    constexpr char kInstalled[] = "site-packages/";
    static const std::string here = working_folder();
    size_t at = path.rfind(kInstalled);
    std::string shorter = path;
    if (at != std::string::npos) shorter = path.substr(at + std::strlen(kInstalled));
    else if (!here.empty() && path.rfind(here, 0) == 0) shorter = path.substr(here.size());
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
        if (!path.empty() && !is_passed_over(path)) found = described(path, py.line(frame), attribute_text(code, "co_name"));
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
