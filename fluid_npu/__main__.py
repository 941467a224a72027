import sys
from fluid_npu.cli import main
sys.exit(main())
