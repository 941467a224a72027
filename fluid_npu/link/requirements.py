"""Whether this machine can make links, and what to do where it cannot."""

from __future__ import annotations

import errno
import shutil
import sys

from fluid_npu.link.namespace import Namespace

_PROGRAMS = ("ip", "tc")


def why_unavailable() -> str | None:
    """None where links can be made; otherwise what is missing and the fix. Makes one empty namespace to see."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}; run it on Linux"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"iproute2 is missing ({', '.join(missing)} not found); install it: apt-get install iproute2"
    try:
        Namespace("probe").close()
    except OSError as error:
        return _refusal(error)
    return None


def _refusal(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return (
            "root is needed to make network namespaces; run it with sudo, or as "
            "'unshare --map-root-user fluid-npu ...' where the kernel lets users do that; "
            "in a container: --cap-add SYS_ADMIN --cap-add NET_ADMIN"
        )
    return f"{error.strerror}; the kernel needs network namespaces (CONFIG_NET_NS)"
