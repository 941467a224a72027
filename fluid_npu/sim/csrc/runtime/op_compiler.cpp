// libacl_op_compiler.so: options of the operator compiler are kept and returned. torch_npu also looks up runtime
// functions here, which the dynamic linker finds in libascendcl.so, on which this library depends.
#include <cstring>
#include <map>
#include <string>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

namespace {
std::map<int, std::string> options;
}

extern "C" {

aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
    options[option] = value;
    return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt option) { return options[option].size() + 1; }

aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t size) {
    std::strncpy(value, options[option].c_str(), size);
    return ACL_SUCCESS;
}

}
