"""A training of two processes on this machine, as accelerate and torchrun start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def in_two_processes(*command: str, seconds: float, **environ: str) -> None:
    """Run a Python program as rank 0 and as rank 1 at the same time; both must end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    both |= {"OMP_NUM_THREADS": "1", **environ}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | both | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    if any("EADDRINUSE" in output for output in outputs):  # somebody was quicker to take the port
        return in_two_processes(*command, seconds=seconds, **environ)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
