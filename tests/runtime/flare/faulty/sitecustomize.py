"""Python loads this at its start when the folder is on its path: see `faults`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from faults import install_here

install_here()
