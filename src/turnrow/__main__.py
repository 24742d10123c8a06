"""``python -m turnrow``."""

import sys

from turnrow.cli.main import main

sys.exit(main())
