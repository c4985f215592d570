"""The reward function behind OpenRLHF's HTTP protocol: `python http_reward.py`, prints its port."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cme_reward.openrlhf import reward_func


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = reward_func(asked["query"], asked["prompts"], asked["labels"])
        body = json.dumps(
            {
                "rewards": reply["rewards"].tolist(),
                "scores": reply["scores"].tolist(),
                "extra_logs": {k: v.tolist() for k, v in reply["extra_logs"].items()},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print("answered", len(asked["query"]), flush=True)

    def log_message(self, format: str, *args: object) -> None: ...


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    input()


if __name__ == "__main__":
    main()
