"""Profiles: what ``fluid-npu tune`` found best for one model on one machine, and ``train --profile`` reads.

A profile holds where it was measured (``key``) and the settings that won. It is used only where every entry of the key
is the same; otherwise the run goes on by the rules of ``--overlap auto`` and says what differs. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_npu.train.config import ConfigError, TrainConfig
from fluid_npu.train.summary import versions

if TYPE_CHECKING:
    from fluid_npu.train.parallel import Place

SCHEMA = 6
#: Fields of TrainConfig that a profile may set.
SETTINGS = (
    *("overlap", "carry_over", "dispatch", "moe_chunks", "moe_chunks_of", "local_first"),
    *("interleave_batches", "attention_chunks", "moe_cuda_graph", "a2a_transport", "a2a_ctas"),
)
_SIZES = (
    "hidden",
    "heads",
    "kv_heads",
    "moe_ffn",
    "experts",
    "topk",
    "seq_length",
    "micro_batch_size",
    "aux_loss_coeff",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """``settings``: a value for each of SETTINGS; ``reason``: the figures behind them."""

    key: dict[str, Any]
    settings: dict[str, Any]
    reason: str

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Raises ConfigError for a file that is not there or is no profile of this version."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise ConfigError(f"--profile {path}: {reason}; fluid-npu tune writes one") from error
        except ValueError as error:
            raise ConfigError(f"--profile {path}: no JSON ({error}); fluid-npu tune writes a new one") from error
        if not isinstance(data, dict) or data.get("profile") != SCHEMA:
            raise ConfigError(f"--profile {path}: not a profile of schema {SCHEMA}; fluid-npu tune writes a new one")
        try:
            settings = {name: data["settings"][name] for name in SETTINGS}
            return cls(key=dict(data["key"]), settings=settings, reason=str(data["reason"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"--profile {path}: misses {error}; fluid-npu tune writes a new one") from error

    def as_dict(self) -> dict[str, Any]:
        """What ``read`` reads."""
        return {"profile": SCHEMA, "key": self.key, "settings": self.settings, "reason": self.reason}

    def differs(self, key: Mapping[str, Any]) -> str | None:
        """The first entry in which the place differs from the profile's, in words; None where it fits."""
        for name in sorted({*self.key, *key}):
            if self.key.get(name) != key.get(name):
                return f"{name} is {key.get(name)!r} here and was {self.key.get(name)!r} when it was measured"
        return None


def key_of(config: TrainConfig, place: Place, *, hosts: int, link: str | None = None) -> dict[str, Any]:
    """What a profile depends on: sizes of a layer, ranks, device, versions; not how many layers, which are alike."""
    preset = config.model()
    return {
        **{name: getattr(preset, name) for name in _SIZES},
        **{name: getattr(config, name) for name in ("ep", "tp", "cp", "plant_delay_ms")},
        "ranks": place.world,
        "hosts": hosts,
        "link": link,
        "dtype": config.dtype or "fp32",
        "device": f"{place.device.name}: {place.device.describe()}",
        **{f"version of {name}": number for name, number in versions().items()},
    }
