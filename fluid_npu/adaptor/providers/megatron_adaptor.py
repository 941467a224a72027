"""The place for MegatronAdaptor, the package that Ascend users move to from megatron-core 0.18 on.

Its source was not to be had when this was written (November 2026), so nothing is claimed about how it patches: it is
found by name, our patches go on and off as without it, and ``detect`` says so. To support it, fill in

* ``foreign``: its patches as ``Foreign`` records, so that conflicts are named and its objects looked through;
* ``attach`` and ``detach``: put ``ours.suspend()`` before and ``ours.resume()`` after whatever in it changes Megatron,
  as ``providers/mindspeed.py`` does, through ``import_hook.after_import`` when it is imported later than we are.
"""

from __future__ import annotations

from fluid_npu.adaptor.providers.detect import Finding, detect_megatron_adaptor
from fluid_npu.adaptor.providers.none import NoProvider


class MegatronAdaptor(NoProvider):
    """Found, and left alone."""

    name = "megatron_adaptor"

    def detect(self) -> Finding:
        return detect_megatron_adaptor()
