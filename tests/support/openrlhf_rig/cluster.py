"""Ray on one machine, on free ports, until standard input ends: prints its addresses as JSON."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile


def main() -> None:
    folder = tempfile.mkdtemp(prefix="cme-orl-")  # short: sockets are in it
    # Ray also notes there which cluster is the latest; that of others is none of our concern.
    os.environ["RAY_TMPDIR"] = folder
    os.mkdir(f"{folder}/ray")

    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 16,
            "num_gpus": 8,  # that OpenRLHF asks for, and nothing uses
            "object_store_memory": 200_000_000,
            "include_dashboard": "--dashboard" in sys.argv,
            "dashboard_port": 0,
        },
    )
    print(json.dumps({"ray": cluster.address, "dashboard": cluster.webui_url}), flush=True)
    try:
        sys.stdin.read()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
