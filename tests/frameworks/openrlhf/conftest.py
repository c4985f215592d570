"""The stand-ins of the rig, and its modules, are importable."""

import sys
from pathlib import Path

RIG = Path(__file__).parents[2] / "support" / "openrlhf_rig"
sys.path[:0] = [str(RIG), str(RIG / "site")]
