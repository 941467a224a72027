"""Packaging that pyproject cannot say: the manifests of patches/ are installed as fluid_npu.patches."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fluid_npu/version.py").read_text(), re.M).group(1)

setup(
    version=VERSION,
    packages=[*find_packages(include=["fluid_npu", "fluid_npu.*"]), "fluid_npu.patches"],
    package_dir={"fluid_npu": "fluid_npu", "fluid_npu.patches": "patches"},
    package_data={
        "fluid_npu": ["py.typed", "cluster/megatron_flags.txt"],
        "fluid_npu.report": ["page.html.j2"],
        "fluid_npu.sim": ["README.md", "schemas.json", "csrc/*/*.cpp", "csrc/*/*.h"],
        "fluid_npu.patches": ["*.toml", "*.md", "megatron_lm/*.patch"],
    },
)
