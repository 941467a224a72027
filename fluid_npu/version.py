"""The version of fluid_npu, in one place."""

__version__ = "0.1.0"
