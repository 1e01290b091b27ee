"""`python -m aollm` is `aollm`."""

import sys

from .cli import main

sys.exit(main())
