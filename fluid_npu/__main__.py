"""``python -m fluid_npu`` is the console script ``fluid-npu``."""

import sys

from fluid_npu.cli import main

sys.exit(main())
