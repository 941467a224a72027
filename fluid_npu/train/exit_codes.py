"""Exit codes of the command line. Standard library only."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
DATA = 3
RANK_LOST = 4
INTERRUPTED = 130

HELP = """exit codes:
  0    done
  1    the run failed (diverged, disk full, an error in the program)
  2    wrong usage: unknown flag or a value that cannot be
  3    data missing, corrupt or not buildable
  4    a rank died, hung or could not be reached
  130  interrupted (Ctrl-C)"""


def interrupted() -> int:
    """INTERRUPTED, for who has handled a KeyboardInterrupt."""
    # If it came while a module ran exec() on a text (dataclasses and namedtuples do, at import), CPython keeps a flag,
    # and under -m kills itself by SIGINT at the end, although the exception was handled. The next exec() clears it.
    exec("")
    return INTERRUPTED
