"""A vLLM or SGLang server without a model: the real protocols over a real socket.

It answers in the form of the replies recorded in `recordings/`, with log-probs known beforehand,
and can be told to fail in all the ways that servers and networks do. It stands in for an engine,
which needs a GPU or an environment of its own; `nox -s vllm` runs the same client against one.

`python fake_engines.py vllm PORT TOKENIZER` serves for ever, to be killed.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast


def true_logprobs(prompt_and_response: list[int]) -> np.ndarray:
    """Log-prob of each id but the first, from it and the one before: depends on the context."""
    ids = np.array(prompt_and_response)
    return -((ids[1:] * 7 + ids[:-1] * 3) % 101 + 1) / np.float32(8)


class Fault:
    """What a server does in place of answering. Fields are applied where they are given."""

    def __init__(
        self,
        *,
        status: int | None = None,
        message: str = "",
        headers: dict[str, str] | None = None,
        delay: float = 0.0,
        hang_up: bool = False,
        truncate: bool = False,
        cut_body: bool = False,
        change: Callable[[Any], Any] | None = None,
    ) -> None:
        self.status, self.message, self.headers = status, message, headers or {}
        self.delay, self.hang_up = delay, hang_up
        self.truncate, self.cut_body, self.change = truncate, cut_body, change


class FakeEngine:
    """Serves in threads of this process until `close`.

    `fault(n, body)` is asked at each POST, with the number of POSTs before it; it returns a `Fault`
    or None. `requests` keeps path, headers and body of each.
    """

    def __init__(
        self,
        engine: str,
        tokenizer: Any,
        *,
        port: int = 0,
        model: str = "tiny",
        max_model_len: int = 512,
        shift: float = 0.0,
        api_key: str | None = None,
        scale_out: bool = False,
        fault: Callable[[int, Any], Fault | None] = lambda n, body: None,
    ) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.max_model_len, self.shift, self.api_key = max_model_len, shift, api_key
        self.fault, self.scale_out = fault, scale_out
        self.scored: set[tuple[int, ...]] = set()
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.in_flight, self.most_in_flight = 0, 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.get(self)

            def do_POST(self) -> None:
                fake.post(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up are part of the game

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if not self._allowed(handler):
            return
        if handler.path == "/v1/models":
            card = {"id": self.model, "object": "model", "root": self.tokenizer.name_or_path}
            card["max_model_len"] = self.max_model_len
            self._send(handler, 200, {"object": "list", "data": [card]})
        elif handler.path == "/health":
            self._send(handler, 200, {})
        else:
            self._send(handler, 404, {"detail": "Not Found"})

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            n = len(self.requests)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            length = int(handler.headers["content-length"])
            body = json.loads(handler.rfile.read(length))
            self.requests.append((handler.path, dict(handler.headers), body))
        try:
            if self._allowed(handler):
                self._answer(handler, body, self.fault(n, body) or Fault())
        finally:
            with self.lock:
                self.in_flight -= 1

    def _allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.api_key is None or handler.headers["authorization"] == f"Bearer {self.api_key}":
            return True
        self._send(handler, 401, {"error": "Unauthorized"})
        return False

    def _answer(self, handler: BaseHTTPRequestHandler, body: Any, fault: Fault) -> None:
        time.sleep(fault.delay)
        if fault.hang_up:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        if fault.status is not None:
            error = {"error": {"message": fault.message, "type": "Error", "code": fault.status}}
            self._send(handler, fault.status, error, fault)
            return
        status, reply = {"vllm": self._vllm, "sglang": self._sglang}[self.engine](
            handler.path, body
        )
        if status == 200 and fault.change is not None:
            reply = fault.change(reply)
        self._send(handler, status, reply, fault)

    def _vllm(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/inference/v1/generate":
            return self._vllm_generate(body)
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["model"] != self.model:
            return self._refusal(404, f"The model `{body['model']}` does not exist.")
        ids = body["prompt"]
        refusal = self._refused(ids)
        if refusal:
            return refusal
        entries: list[Any] = [None]
        for i, logprob in zip(ids[1:], self._logprobs(ids), strict=True):
            text = self.tokenizer.decode([i])
            entries.append({str(i): {"logprob": logprob, "rank": 9, "decoded_token": text}})
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return 200, {"object": "text_completion", "model": self.model, "choices": [choice]}

    def _vllm_generate(self, body: Any) -> tuple[int, Any]:
        if not self.scale_out:
            return self._refusal(403, "Scale-out endpoints are disabled.")
        ids, asked = body["token_ids"], body["sampling_params"]
        start, rows = asked["prompt_logprob_start"], asked["prompt_logprob_token_ids"]
        refusal = self._refused(ids)
        if refusal:
            return refusal
        assert rows == [[i] for i in ids[start + 1 :]]
        array = np.array(self._logprobs(ids)[start:], np.float32)[:, None]
        binary = io.BytesIO()
        np.save(binary, array)
        encoded = base64.b64encode(binary.getvalue()).decode()
        known = tuple(ids) in self.scored  # all of it is in the cache, so that nothing is computed
        self.scored.add(tuple(ids))
        return 200, {
            "model": self.model,
            "prompt_token_id_logprobs": None if known else encoded,
            "prompt_token_ids": ids,
        }

    def _sglang(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/generate":
            return 404, {"detail": "Not Found"}
        ids, start = body["input_ids"], body["logprob_start_len"]
        refusal = self._refused(ids)
        if refusal:
            return refusal
        texts = [None] * len(ids)
        if body.get("return_text_in_logprobs"):
            texts = [self.tokenizer.decode([i]) for i in ids]
        logprobs = [None, *self._logprobs(ids)[start:]]
        entries = [list(e) for e in zip(logprobs, ids[start:], texts[start:], strict=True)]
        return 200, {"text": "", "meta_info": {"input_token_logprobs": entries}}

    def _logprobs(self, ids: list[int]) -> list[float]:
        return (true_logprobs(ids) - self.shift).tolist()

    def _refused(self, ids: list[int]) -> tuple[int, Any] | None:
        if len(ids) >= self.max_model_len:
            return self._refusal(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your request has {len(ids)} input tokens.",
            )
        if max(ids) >= len(self.tokenizer):
            return self._refusal(400, f"Token id {max(ids)} is out of vocabulary")
        return None

    def _refusal(self, status: int, message: str) -> tuple[int, Any]:
        return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, reply: Any, fault: Fault | None = None
    ) -> None:
        fault = fault or Fault()
        payload = json.dumps(reply).encode()
        length = len(payload)
        if fault.truncate:
            payload = payload[: length // 2]
            length = len(payload)
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(length))
        for name, value in fault.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload[: length // 2] if fault.cut_body else payload)
        if fault.cut_body:
            handler.close_connection = True


if __name__ == "__main__":
    kind, wanted_port, folder = sys.argv[1:]
    own = PreTrainedTokenizerFast.from_pretrained(folder)  # AutoTokenizer takes 3 s to import
    slow = Fault(delay=0.05)
    with FakeEngine(kind, own, port=int(wanted_port), fault=lambda n, body: slow) as served:
        print("ready", flush=True)
        served.thread.join()
