"""Patch manifests, one TOML file per supported line of an upstream package (installed as fluid_npu.patches)."""
