"""What the check has to say about a job: one flag, its value, the rule, and the fix."""

from __future__ import annotations

from dataclasses import dataclass

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A finding. ``level`` is 'error' (the job fails, or loses what it is run for) or 'warning'."""

    kind: str
    flag: str
    value: str
    rule: str
    fix: str
    level: str = ERROR

    def text(self) -> str:
        """One line: flag, value, rule, fix."""
        value = f" {self.value}" if self.value else ""
        return f"{self.flag}{value}: {self.rule}; {self.fix}"
