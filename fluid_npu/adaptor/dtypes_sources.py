"""Where each line of stock Megatron decides about ``--moe-grouped-gemm``: line numbers, read from its tags.

Numbers are lines of the files at ``tag`` of github.com/NVIDIA/Megatron-LM; None where the tag has no such line.
``docs/DTYPES.md`` has the same table; ``dtypes.py`` draws the conclusions. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPERTS = "megatron/core/transformer/moe/experts.py"
BACKENDS = "megatron/core/models/backends.py"
OLD_SPECS = "megatron/core/models/gpt/moe_module_specs.py"
YAML = "megatron/training/yaml_arguments.py"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One minor version. All numbers are those of ``tag``."""

    name: str
    tag: str
    #: validate_args: ``assert args.bf16, 'Currently GroupedGEMM for MoE only supports bf16 dtype.'``
    argparse_bf16: int | None
    #: validate_args: ``torch.cuda.get_device_capability()``, which raises without CUDA and must give 8 or more
    capability: int
    #: validate_args: ``Expert parallelism is not supported with fp16 training.``
    expert_fp16: int | None
    #: initialize_megatron: ``assert torch.cuda.is_available(), "Megatron requires CUDA."``
    needs_cuda: int
    #: yaml_arguments.py repeats the bf16 assertion for --yaml-cfg, in every tag
    yaml_bf16: int | None
    #: experts.py: ``class GroupedMLP``
    grouped_mlp: int | None
    #: GroupedMLP.__init__: the package ``grouped_gemm`` must be importable
    needs_package: int | None
    #: GroupedMLP.forward: ``assert self.config.bf16, "Currently GroupedMLP for MoE only supports bf16."``
    forward_bf16: int | None
    #: experts.py: ``class TEGroupedMLP``
    te_grouped_mlp: int | None
    #: LocalSpecProvider.grouped_mlp_modules that gives SequentialMLP whatever the flag says
    local_sequential: int | None = None

    @property
    def arguments(self) -> str:
        """The file of the argument parser."""
        return "megatron/arguments.py" if self.name == "0.5" else "megatron/training/arguments.py"

    @property
    def initialize(self) -> str:
        """The file of ``initialize_megatron``."""
        return self.arguments.replace("arguments", "initialize")

    def at(self, path: str, number: int | None) -> str:
        """'tag path:line'."""
        return f"{self.tag} {path}:{number}"


def _line(name: str, tag: str, *numbers: int | None) -> Line:
    fields = (
        "argparse_bf16",
        "capability",
        "expert_fp16",
        "needs_cuda",
        "yaml_bf16",
        "grouped_mlp",
        "needs_package",
        "forward_bf16",
        "te_grouped_mlp",
        "local_sequential",
    )
    return Line(name=name, tag=tag, **dict(zip(fields, numbers, strict=True)))  # type: ignore[arg-type]


# Columns: the fields of Line after ``tag``, in their order.
_ROWS = (
    _line("0.5", "core_v0.5.0", 296, 297, 414, 41, None, 23, 33, None, None, None),
    _line("0.6", "core_v0.6.0", 393, 394, 507, 42, 264, 25, 35, None, None, None),
    _line("0.7", "core_v0.7.0", 397, 398, 508, 42, 264, 25, 35, None, None, None),
    _line("0.8", "core_v0.8.0", 421, 422, 539, 45, 264, 36, 46, None, 345, None),
    _line("0.9", "core_v0.9.0", 453, 454, 570, 48, 264, 37, 47, None, 345, None),
    _line("0.10", "core_v0.10.0", 539, 540, 675, 51, 265, 87, 97, None, 592, None),
    _line("0.11", "core_v0.11.0", 591, 592, 733, 52, 265, 90, 100, None, 593, None),
    _line("0.12", "core_v0.12.1", 713, 714, 855, 57, 265, 90, 100, None, 665, None),
    _line("0.13", "core_v0.13.1", 805, 806, 957, 59, 265, 97, 112, None, 665, None),
    _line("0.14", "core_v0.14.0", 791, 792, 956, 59, 259, 99, 114, None, 745, None),
    _line("0.15", "core_v0.15.3", 877, 878, 1042, 59, 259, 100, 115, None, 746, None),
    _line("0.16", "core_v0.16.1", None, 853, None, 62, 259, 65, 81, 225, 512, None),
    _line("0.17", "core_v0.17.1", None, 1144, None, 61, 259, None, None, None, 156, 133),
    _line("0.18", "core_v0.18.2", None, 1324, None, 58, 273, None, None, None, 172, 133),
    _line("0.19", "core_v0.19.0", None, 1339, None, 66, 280, None, None, None, 182, 133),
    _line("0.20", "main d98e8a64dd", None, 1379, None, 72, 280, None, None, None, 183, 133),
)
LINES: dict[str, Line] = {line.name: line for line in _ROWS}
