"""``python -m turnrow``."""

import sys

from turnrow_command import main

sys.exit(main())
