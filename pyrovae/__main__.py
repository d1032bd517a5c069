"""``python -m pyrovae`` is the command ``pyrovae``."""

import sys

from pyrovae.cli import main

sys.exit(main())
