"""`python -m proteus_server --address HOST:PORT | unix:PATH`."""

import sys

from proteus_server.app import main

sys.exit(main())
