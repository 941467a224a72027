"""Imported by the server that ranks are forked from: the sources that ``adapt`` checks are parsed once for all of them.

Parsing them takes most of the time of ``adapt``, of which every rank of every test has one. Nothing is patched here.
"""

from __future__ import annotations

import contextlib
import gc

from fluid_npu.adaptor import select
from fluid_npu.adaptor.checks import check
from fluid_npu.adaptor.patch import PatchError
from tests.support import device

with contextlib.suppress(PatchError):  # a rank says it better
    check(select([device.NAME]), [])
gc.freeze()  # of what is here now a rank collects nothing, so its collections need not look at it
