"""``python -m proteus_fast`` is ``proteus``."""

import sys

from proteus_fast.cli import main

sys.exit(main())
