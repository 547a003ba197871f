"""`python -m mrcn_fast`: the command line where no script is on the path, as under torchrun."""

import sys

from mrcn_fast.cli import main

sys.exit(main())
