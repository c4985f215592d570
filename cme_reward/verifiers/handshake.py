"""The proof that a server runs the model that the local tokenizer belongs to."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import numpy as np

from cme_reward.errors import TokenizerError, VerifierError
from cme_reward.loading import said
from cme_reward.verifiers.dialect import Dialect, TextDialect
from cme_reward.verifiers.replicas import Busy, Exchange, Replica

logger = logging.getLogger(__name__)

# Replicas may differ by rounding: bfloat16 on unlike GPUs is off by 0.02 to 0.05 nats a token,
# another model by whole nats.
SAME_MODEL_NATS = 0.1
PROBE_LENGTH = 48


class Handshake:
    """What a server has to answer before it is used.

    Its model's name; for ids from all over the vocabulary, the ids themselves, finite log-probs,
    and the texts that its own tokenizer gives them; and the log-probs of the first server proved.
    """

    def __init__(
        self, dialect: TextDialect, faster: Dialect | None, tokenizer: Any, model: str | None
    ) -> None:
        self.dialect = dialect
        self.faster = faster
        self.tokenizer: Any = None if isinstance(tokenizer, str) else tokenizer
        self.tokenizer_path = tokenizer if isinstance(tokenizer, str) else None
        self.wanted = model
        self.model = model or ""
        self.max_length = 0
        self._probe: list[int] = []
        self._expected: np.ndarray | None = None
        self.renew()

    def renew(self) -> None:
        """For another event loop."""
        self._one_at_a_time = asyncio.Lock()

    async def run(self, replica: Replica, exchange: Exchange) -> None:
        """Raises `VerifierError` if the server fails, `Unreachable` or `Busy` if it cannot tell."""
        card = self._card(replica.url, await exchange(replica, "GET", "/v1/models"))
        async with self._one_at_a_time:  # the first proof says what the others have to equal
            if not self._probe:
                await asyncio.to_thread(self._prepare, replica.url, card)
            prompt, response = self._probe[:1], self._probe[1:]
            path, body = self.dialect.request(card["id"], prompt, response, texts=True)
            reply = await exchange(replica, "POST", path, body)
            try:
                logprobs = self.dialect.logprobs(reply, prompt, response)
                self._compare_texts(self.dialect.texts(reply, prompt, response))
            except VerifierError as error:
                raise VerifierError(f"{replica.url}, model {card['id']!r}: {error}") from error
            self._compare(replica.url, card, logprobs)
        replica.dialect = self.dialect
        if self.faster is not None and await self._is_faster(replica, exchange):
            replica.dialect = self.faster

    async def _is_faster(self, replica: Replica, exchange: Exchange) -> bool:
        """Does the server know the quicker way, and does that give the same?"""
        # In an order of its own, as the server's cache may hold what it has read before.
        ids = random.sample(self._probe, len(self._probe))
        ways = [way for way in (self.faster, self.dialect) if way is not None]
        found = []
        for way in ways:
            path, body = way.request(self.model, ids[:1], ids[1:])
            try:
                reply = await exchange(replica, "POST", path, body)
                found.append(way.logprobs(reply, ids[:1], ids[1:]))
            except (VerifierError, Busy) as error:
                logger.info("%s: %s is not to be had: %s", replica.url, path, error)
                return False
        distance = float(np.abs(found[0] - found[1]).mean())
        if distance > SAME_MODEL_NATS:
            logger.warning(
                "%s: the quicker way gives log-probs %.2f nats a token away from the plain one; "
                "not used",
                replica.url,
                distance,
            )
        return distance <= SAME_MODEL_NATS

    def _card(self, url: str, reply: Any) -> dict[str, Any]:
        try:
            cards = {card["id"]: card for card in reply["data"]}
        except (KeyError, TypeError):
            raise VerifierError(
                f"{url}/v1/models answered {str(reply)[:200]}; expected a list of models, as vLLM "
                "and SGLang servers give it"
            ) from None
        wanted = self.wanted or (next(iter(cards)) if len(cards) == 1 else None)
        if wanted not in cards:
            raise VerifierError(
                f"{url} serves {', '.join(map(repr, cards)) or 'no model'}"
                + (f", not {self.wanted!r}" if self.wanted else "; which one is the verifier?")
                + " Name it: load_verifier(..., model=...)"
            )
        return cards[wanted]

    def _prepare(self, url: str, card: dict[str, Any]) -> None:
        from cme_reward.spans.fidelity import load_faithful
        from cme_reward.spans.table import SpanTable

        if self.tokenizer is None:
            path = self.tokenizer_path or card.get("root") or card["id"]
            try:
                self.tokenizer = load_faithful(path)
            except (OSError, ValueError) as error:
                raise VerifierError(
                    f"{url} runs {path!r}, but its tokenizer does not load here: give it, "
                    f"load_verifier(..., tokenizer=NAME_OR_PATH). transformers says: {said(error)}"
                ) from error
        self._probe = probe_ids(self.tokenizer)
        self._texts = SpanTable(self.tokenizer).tokens(self._probe[1:])
        self.model = card["id"]

    def _compare_texts(self, texts: list[str | None]) -> None:
        if all(text is None for text in texts):
            raise VerifierError(
                "the server does not say what its ids mean, so that its tokenizer cannot be told "
                "from another: start it with its tokenizer (no --skip-tokenizer-init)"
            )
        for i, own, text in zip(self._probe[1:], self._texts, texts, strict=True):
            if text is None or _bare(text) != _bare(own):
                raise VerifierError(
                    f"id {i} is {text!r} to the server and {own!r} to the local tokenizer "
                    f"({getattr(self.tokenizer, 'name_or_path', '')!r}): give the tokenizer of the "
                    "model that the server runs, load_verifier(..., tokenizer=...)"
                )

    def _compare(self, url: str, card: dict[str, Any], logprobs: np.ndarray) -> None:
        if logprobs.max() > 1e-3:
            raise VerifierError(
                f"{url}, model {card['id']!r}: a log-prob of {logprobs.max():.3f}, above 0; "
                "the server does not return log-probs in nats"
            )
        if self._expected is None:
            self._expected = logprobs
        distance = float(np.abs(logprobs - self._expected).mean())
        if card["id"] != self.model or distance > SAME_MODEL_NATS:
            raise VerifierError(
                f"{url}, model {card['id']!r}: its log-probs are {distance:.2f} nats a token away "
                f"from those of {self.model!r} proved before (at most {SAME_MODEL_NATS} is "
                "rounding); all URLs must run the same weights"
            )
        # One less: an engine generates a token after the last one, or refuses.
        limit = (card.get("max_model_len") or 2**31) - 1
        self.max_length = min(self.max_length, limit) if self.max_length else limit


def probe_ids(tokenizer: Any) -> list[int]:
    """Ids of plain words from all over the vocabulary."""
    from cme_reward.spans.pieces import special_ids
    from cme_reward.spans.table import SpanTable

    special = set(special_ids(tokenizer).tolist())
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = [_bare(text) for text in SpanTable(tokenizer).tokens(ids)]
    for is_plain in (_is_word, _is_printable):
        plain = [i for i, text in zip(ids, texts, strict=True) if is_plain(text)]
        if len(plain) > PROBE_LENGTH:
            at = np.linspace(0, len(plain) - 1, PROBE_LENGTH + 1).astype(int)
            return [plain[k] for k in at]
    raise TokenizerError(
        f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no {PROBE_LENGTH} tokens of "
        "plain ASCII to tell it from another by"
    )


def _bare(text: str) -> str:
    """Without the white space that every way of decoding one token treats differently."""
    return text.replace("▁", " ").replace("Ġ", " ").strip()


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isascii() and text.isalnum()


def _is_printable(text: str) -> bool:
    return len(text) > 0 and text.isascii() and text.isprintable() and "<0x" not in text
