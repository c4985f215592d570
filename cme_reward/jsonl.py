"""JSON Lines of prompts and responses, and their rewards, as the command line reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cme_reward.errors import InputError

if TYPE_CHECKING:
    from cme_reward.prompts import Prompt
    from cme_reward.reward import CrossModelEntropy

OUTPUT_FIELDS = ("sequence_reward", "token_rewards", "mask", "tokens", "dropped_nats")


@dataclass
class Row:
    """One good line."""

    line: int
    """Its number, from 1."""
    fields: dict[str, Any]
    """All of the line, to be written again."""
    prompt: Prompt
    response: str | None
    """The response as text; None where it was given as ids."""
    ids: list[int] | None
    mask: list[bool] | None
    policy: list[float] | None


@dataclass
class Scored:
    """A row and its rewards: one list entry per generator token."""

    row: Row
    tokens: list[str]
    token_rewards: list[float]
    token_logprobs: list[float]
    mask: list[bool]
    sequence_reward: float
    dropped_nats: float
    truncated: bool
    verifier: tuple[list[str], list[float]] | None
    """The verifier's tokens and their log-probs, where there is one verifier."""


@dataclass
class Bad:
    """A line that cannot be scored."""

    line: int
    reason: str


def read_rows(stream: Iterable[bytes], **checks: Any) -> Iterator[Row | Bad]:
    """Each line that is not blank, in order. `checks` are the keywords of `parse_row`."""
    for line, raw in enumerate(stream, 1):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            try:
                yield parse_row(line, raw, **checks)
            except InputError as error:
                yield Bad(line, str(error))


def parse_row(
    line: int,
    raw: bytes,
    *,
    vocab_size: int | None = None,
    needs_policy: bool = False,
) -> Row:
    """One line as a row. A field that is null counts as missing.

    Args:
        line: its number.
        raw: its bytes.
        vocab_size: of the generator's tokenizer; None where that is unknown, and ids are refused.
        needs_policy: whether `policy_logprobs` are used. Otherwise they are not looked at.

    Raises:
        InputError: saying what is wrong with it.
    """
    try:
        fields = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 (byte 0x{raw[error.start]:02X} at byte {error.start}); save the file as "
            "UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(
            f"holds {_short(fields)}; expected an object such as "
            '{"prompt": "...", "response": "..."}'
        )
    given = {key: value for key, value in fields.items() if value is not None}
    kind = _one_of(given, "prompt", "messages")
    prompt = _prompt(kind, given[kind])
    if _one_of(given, "response", "response_ids") == "response":
        for name in ("response_mask", "policy_logprobs") if needs_policy else ("response_mask",):
            if name in given:
                raise InputError(
                    f"has {name} with a response as text; expected response_ids, the tokens that "
                    f"{name} counts"
                )
        if not isinstance(given["response"], str):
            raise InputError(f"response is {_short(given['response'])}; expected text")
        _check_unicode("response", given["response"])
        return Row(line, fields, prompt, given["response"], None, None, None)
    if vocab_size is None:
        raise InputError(
            "has response_ids, but whose ids are they? Name the tokenizer of the model that "
            "sampled them with --generator-tokenizer"
        )
    ids = _list(given, "response_ids", "token ids", lambda i: type(i) is int and i >= 0)
    for position, i in enumerate(ids):
        if i >= vocab_size:
            raise InputError(
                f"response_ids[{position}] is {i}, but the generator's tokenizer has ids 0 to "
                f"{vocab_size - 1}. Were they sampled with another tokenizer?"
            )
    mask = policy = None
    if "response_mask" in given:
        mask = _list(given, "response_mask", "0s and 1s", lambda m: m in (0, 1), len(ids))
        mask = list(map(bool, mask))
    if needs_policy:
        if "policy_logprobs" not in given:
            raise InputError(
                "has no policy_logprobs; baseline=policy needs the sampler's log-prob of every "
                "token of response_ids, in nats"
            )
        policy = _list(given, "policy_logprobs", "log-probs in nats", _is_logprob, len(ids))
    return Row(line, fields, prompt, None, ids, mask, policy)


def batches(rows: Iterable[Row | Bad], size: int) -> Iterator[list[Row | Bad]]:
    """Lists of about `size` rows. Neighbours with one prompt stay together, up to `2 * size`."""
    batch: list[Row | Bad] = []
    previous = None
    for row in rows:
        prompt = row.prompt if isinstance(row, Row) else previous
        if len(batch) >= 2 * size or (len(batch) >= size and prompt != previous):
            yield batch
            batch = []
        batch.append(row)
        previous = prompt
    if batch:
        yield batch


def score_rows(
    scorer: CrossModelEntropy, rows: list[Row], eos_id: int | None = None
) -> Iterator[Scored | Bad]:
    """Score rows in one call; where that fails, in halves, until the rows to blame stand alone.

    Args:
        scorer: the reward.
        rows: what to score.
        eos_id: added to responses given as text. None: nothing is.
    """
    if not rows:
        return
    try:
        yield from _score(scorer, rows, eos_id)
    except Exception as error:  # whatever a template, a tokenizer or a model raises for this row
        if len(rows) > 1:
            yield from score_rows(scorer, rows[: len(rows) // 2], eos_id)
            yield from score_rows(scorer, rows[len(rows) // 2 :], eos_id)
        else:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            yield Bad(rows[0].line, f"{kind}{error}")


def _score(scorer: CrossModelEntropy, rows: list[Row], eos_id: int | None) -> list[Scored]:
    texts = [row.response for row in rows if row.response is not None]
    encoded = iter(scorer.table.encode_batch(texts).ids)
    ending = [] if eos_id is None else [eos_id]
    ids = [next(encoded).tolist() + ending if row.ids is None else row.ids for row in rows]
    masks = [row.mask or [True] * len(i) for row, i in zip(rows, ids, strict=True)]
    policy = [row.policy or [0.0] * len(i) for row, i in zip(rows, ids, strict=True)]
    batch = scorer(
        [row.prompt for row in rows],
        ids,
        masks if any(row.mask for row in rows) else None,
        policy if any(row.policy for row in rows) else None,
    )
    return [
        Scored(
            row=row,
            tokens=scorer.table.tokens(i),
            token_rewards=batch.token_rewards[b, : len(i)].tolist(),
            token_logprobs=batch.token_logprobs[b, : len(i)].tolist(),
            mask=batch.mask[b, : len(i)].tolist(),
            sequence_reward=float(batch.sequence_rewards[b]),
            dropped_nats=float(batch.dropped_nats[b]),
        )
        for b, (row, i) in enumerate(zip(rows, ids, strict=True))
    ]
