"""What to do next: repairs first, then the commands that show that this machine trains."""

from __future__ import annotations

from collections.abc import Sequence

from fluid_npu.doctor.finding import Section, worst
from fluid_npu.doctor.readiness import Readiness


def next_steps(sections: Sequence[Section], readiness: Readiness) -> list[str]:
    """Ordered actions: what is wrong, what may hurt, then what to run on the device that was found."""
    steps = [*_fixes(sections, "wrong"), *_fixes(sections, "warn")]
    if worst(sections) == "wrong":
        return [*steps, "fluid-npu doctor"]
    device = readiness.device
    flags = "" if device == "cpu" else f" --device {device}"
    steps += [
        f"fluid-npu parity --preset h64 --steps 20{flags}",
        f"fluid-npu train --preset mixtral-tiny --steps 150 --out runs/first{flags}",
    ]
    if readiness.next.startswith("fluid-npu"):
        steps.append(readiness.next)
    return [*steps, "fluid-npu doctor --dtypes"]


def _fixes(sections: Sequence[Section], level: str) -> list[str]:
    fixes = [f"{item.name}: {item.fix}" for section in sections for item in section.items if item.level == level]
    return list(dict.fromkeys(fix for fix in fixes if not fix.endswith(": ")))
