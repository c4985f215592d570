"""veRL's own CPU tests here: `python -m verl_rig.peer VERL.tar.gz [PYTEST OPTIONS]`.

From tests/support/. They come with veRL's source distribution, and look for the package beside
themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    source, *options = sys.argv[1:]
    spec = find_spec("verl")
    assert spec is not None
    assert spec.origin is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        (tests,) = folder.glob("verl-*/tests")
        tests = tests.rename(folder / "tests")
        (folder / "verl").symlink_to(Path(spec.origin).parent)
        files = sorted(str(path) for path in tests.rglob("*_on_cpu.py"))
        environ = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
        environ |= {"HF_HUB_OFFLINE": "1", "VERL_USE_EXTERNAL_PLUGINS": "auto"}
        environ.pop("VERL_USE_EXTERNAL_MODULES", None)
        # Not this project's settings, where the temporary folder lies in it.
        settings = ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *settings, *options, *files]
        return subprocess.run(command, cwd=folder, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
