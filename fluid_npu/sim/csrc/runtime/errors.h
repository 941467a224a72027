// Errors of the device and of calls, and the end of a process that cannot go on.
#pragma once

#include "acl/acl.h"

namespace fluidsim {

// The code of the oldest failed task since the last call, else ACL_SUCCESS. Its message becomes the recent one.
aclError take_device_error();

}  // namespace fluidsim
