"""A judge behind HTTP: any server with OpenAI's /chat/completions."""

from __future__ import annotations

import email.utils
import json
import random
import threading
import time
from dataclasses import replace
from typing import Any

import httpx

from cme_reward.conversation.messages import Prompt
from cme_reward.errors import ConfigError
from cme_reward.evaluation.judge import FAILED, UNREADABLE, Reply, question, read_verdict, usage_of
from cme_reward.evaluation.likelihood import ASKED, verdict_chances

FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0
"""Seconds before the second attempt, doubled before each further one; also bounds Retry-After."""
REFUSED = (401, 403, 404)
"""What no further question would change: the key, the address or the model is wrong."""


class _Again(Exception):
    """An attempt that may succeed another time."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class HttpJudge:
    """Asks a model of an OpenAI-compatible server, at temperature 0."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        connections: int = 8,
        logprobs: bool = False,
    ) -> None:
        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL:
            host = ""
        if not host:
            raise ConfigError(f"--judge {url!r} names no host; expected such as http://host/v1")
        # The name is in every journal's key: a verdict alone answers no question for log-probs.
        self.name = f"{model} at {url}{', by log-probs' * logprobs}"
        self.logprobs = logprobs
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.timeout, self.retries = timeout, retries
        self._not_before = 0.0  # by Retry-After, for all threads: one 429 speaks for the server
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def close(self) -> None:
        self._client.close()

    def ask(self, prompt: Prompt, first: str, second: str, stop: threading.Event) -> Reply | None:
        """The reply; 429, 5xx, time-outs and broken connections are tried again, then FAILED.

        Raises:
            ConfigError: where the server refuses the key, the address or the model, or gives no
                log-probs when asked for them.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": question(prompt, first, second)}],
        }
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": ASKED}
        attempt = 0
        while True:
            if stop.wait(max(self._not_before - time.monotonic(), 0.0)):
                return None
            try:
                return self._attempt(body)
            except _Again as error:
                if attempt >= self.retries:
                    return Reply(FAILED, raw=f"{error} ({attempt + 1} attempts)")
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)
                if error.after:
                    until = time.monotonic() + min(error.after, LONGEST_WAIT)
                    self._not_before = max(self._not_before, until)
                elif stop.wait(wait):
                    return None
            attempt += 1

    def _attempt(self, body: dict[str, Any]) -> Reply:
        try:
            status, headers, content = self._post(body)
        except httpx.TimeoutException as error:
            raise _Again(f"no answer within {self.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise _Again(f"{type(error).__name__}: {error}") from error
        text = content.decode(errors="replace")
        if status == 429 or status == 408 or status >= 500:
            raise _Again(f"HTTP {status}: {text[:200]}", retry_after(headers))
        if status in REFUSED:
            raise ConfigError(
                f"the judge {self.name} answers HTTP {status}: {text[:200]!r}; see to --judge (a "
                "base address such as http://host/v1), --judge-model and --api-key-env"
            )
        if status != 200 and self.logprobs and "logprob" in text:
            raise ConfigError(
                f"the judge {self.name} was asked for logprobs: true, top_logprobs: {ASKED} and "
                f"answers HTTP {status}: {text[:200]!r}; leave out --judge-logprobs"
            )
        if status != 200:
            return Reply(FAILED, raw=f"HTTP {status}: {text[:1000]}")
        return self._read(text)

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """One request within the time-out as a whole: a server that trickles is late, too."""
        deadline = time.monotonic() + self.timeout
        parts = []
        with self._client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the whole of the answer took too long")
            return response.status_code, response.headers, b"".join(parts)

    def _read(self, text: str) -> Reply:
        """A completion's message. A body that is none comes from something before the model."""
        try:
            completion = json.loads(text)
            choice = completion["choices"][0]
            message, given = choice["message"], choice.get("logprobs")
            content, refusal = message.get("content"), message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Again(f"answers 200 with what is no completion: {text[:200]!r}") from None
        usage = usage_of(completion.get("usage"))
        if not isinstance(content, str):
            raw = refusal if isinstance(refusal, str) else json.dumps(message, ensure_ascii=False)
            return Reply(UNREADABLE, raw=raw, usage=usage)
        reply = Reply(*read_verdict(content), content, usage)
        if not self.logprobs or reply.verdict == UNREADABLE:
            return reply
        return replace(reply, chances=verdict_chances(reply.verdict, given, self.name))


def retry_after(headers: httpx.Headers) -> float:
    """Seconds that a Retry-After names, as a number or a date; 0 where there is none."""
    given = headers.get("retry-after", "")
    try:
        seconds = float(given)
        return seconds if seconds > 0 else 0.0  # NaN is not
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
