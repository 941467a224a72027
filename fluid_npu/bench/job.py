"""A bench as its processes see it: which one, on which configuration, with which options. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fluid_npu.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """``task`` is 'module:function'; the function takes (config, options, place) on every rank, returns the result."""

    task: str
    config: TrainConfig
    options: dict[str, Any]
    command: str
    """As typed, for messages: 'fluid-npu bench train-step'."""

    def to_json(self) -> str:
        """The same object as text."""
        return json.dumps({**vars(self), "config": json.loads(self.config.to_json())})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What ``to_json`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "config": TrainConfig(**values["config"])})
