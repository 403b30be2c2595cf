"""``python -m jmoe.cli``."""

import sys

from jmoe.cli.main import main

sys.exit(main())
