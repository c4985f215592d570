"""Tests that need a framework in an environment of its own: `nox -s openrlhf` and the like.

Each folder is collected only when it is named.
"""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.iterdir() if path.is_dir()]
