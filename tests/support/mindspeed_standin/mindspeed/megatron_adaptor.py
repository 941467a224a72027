"""Importing this patches, by the flags in argv; ``repatch`` takes all off and patches again."""

from __future__ import annotations

import argparse
from typing import Any

from mindspeed.features import register_patches, register_pre_patches
from mindspeed.patch_utils import MindSpeedPatchesManager


def read_argv() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--moe-grouped-gemm", action="store_true")
    parser.add_argument("--moe-alltoall-overlap-comm", action="store_true")
    return parser.parse_known_args()[0]


ARGS = read_argv()


def patch() -> None:
    register_pre_patches()
    MindSpeedPatchesManager.apply_patches()
    register_patches(ARGS)
    MindSpeedPatchesManager.apply_patches()


def repatch(args: dict[str, Any]) -> None:
    MindSpeedPatchesManager.remove_patches()
    vars(ARGS).update(args)
    patch()


patch()
