"""`python -m mrcn_fast.benchmark`: the same as `mrcn-fast bench`, for where that command isn't installed."""

import sys

from mrcn_fast.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
