"""`python -m mrcn_fast.benchmark`: as `mrcn-fast bench`, where that command isn't installed."""

import sys

from mrcn_fast.benchmark.command import main

sys.exit(main())
