"""Do a generator's and a verifier's tokenizer fit together? Tried on texts in many languages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from cme_reward.cli.pair_texts import CUT_SHORT, SAMPLES
from cme_reward.conversation.format import PromptFormat
from cme_reward.errors import CMEError, TokenizerError
from cme_reward.reward import CrossModelEntropy
from cme_reward.spans.pieces import require_fast
from cme_reward.spans.table import UNFINISHED, SpanTable

PROMPT = "Hello."
RANDOM_ROWS, RANDOM_LENGTH = 4, 40
SAME_FAMILY = 0.9
EXACT = 1e-9
"""Largest conservation error, relative to the sum of log-probs, that counts as none."""


@dataclass
class Sample:
    """What became of one text."""

    name: str
    generator_tokens: int = 0
    verifier_tokens: int = 0
    exact: bool = False
    """Each of the verifier's tokens has its exact place, and none of the text is left over."""
    rewarded: float = 0.0
    """Share of the generator's tokens that get a reward, of those that write text."""
    dropped: float = 0.0
    """Share of the log-prob that lies on tokens without reward, were it -1 for each token."""
    conservation_error: float = 0.0
    """Sum of aligned log-probs against that of the verifier's, relative, before masking."""
    generator_round_trip: bool = True
    """The generator's tokens write the text they were made of."""
    verifier_round_trip: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class Side:
    """One of the two tokenizers."""

    name: str
    kind: str
    vocabulary: int
    bos: str | None
    eos: str | None
    chat_template: bool
    generation_prompt: str
    """What the chat template writes between the user's message and the response."""
    end_of_turn: str | None
    system_role: str
    """"yes", "no" (put at the head of the user's message), or "" without a chat template."""


@dataclass
class PairCheck:
    """All that was found out."""

    generator: Side
    verifier: Side
    samples: list[Sample]
    shared_vocabulary: float
    """Jaccard index of the two sets of token strings."""
    identical_tokens: bool
    """Every sample has the same ids on both sides."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why a side, "generator" or "verifier", loses text and is not used. No samples then."""

    @property
    def exact(self) -> bool:
        """On every sample."""
        return not self.refused and all(sample.exact for sample in self.samples)

    @property
    def same_family(self) -> bool:
        """Vocabularies or tokens are (almost) those of one tokenizer."""
        return self.identical_tokens or self.shared_vocabulary > SAME_FAMILY

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and all that follows from them."""
        return {
            "exact": self.exact,
            "same_family": self.same_family,
            "verdict": self.verdict(),
            "warnings": self.warnings(),
            **asdict(self),
        }

    def warnings(self) -> list[str]:
        """What the user should know apart from alignment."""
        found = list(self.refused.values())
        if self.same_family:
            found.append(
                f"same tokenizer family ({self.shared_vocabulary:.0%} of the vocabulary is shared"
                f"{', identical tokens on every text' * self.identical_tokens}). Cross-model "
                "entropy wants a verifier of another family than the generator: its gains come "
                "from what the two models do not have in common"
            )
        if not self.verifier.chat_template:
            found.append(
                "the verifier has no chat template: it reads prompt and response as plain text, "
                "like a base model. For a chat model, give it one with "
                "`score --set chat_template=...`"
            )
        elif self.verifier.system_role == "no":
            found.append(
                "the verifier's chat template has no system role: a system prompt goes to the head "
                "of the first user message"
            )
        if self.generator.end_of_turn is None or self.verifier.end_of_turn is None:
            side = "generator" if self.generator.end_of_turn is None else "verifier"
            found.append(f"the {side} has no token that ends a response: endings are not scored")
        return found

    def verdict(self) -> str:
        """One line."""
        if self.refused:
            sides = " and of the ".join(self.refused)
            return f"refused: the tokenizer of the {sides} does not keep the text"
        bad = [sample.name for sample in self.samples if not sample.exact]
        if not bad:
            return f"aligned exactly on all {len(self.samples)} samples"
        more = f" and {len(bad) - 4} more" if len(bad) > 5 else ""
        named = ", ".join(bad[:4] if more else bad)
        return f"not exact on {len(bad)} of {len(self.samples)} samples: {named}{more}"


class Uniform:
    """Stands in for the verifier's model: every token has log-prob -1."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.max_length = 1 << 30
        self.vocab_size = len(tokenizer)

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        return [np.full(len(response), -1, dtype=np.float32) for response in responses]


def check(generator: Any, verifier: Any, names: tuple[str, str]) -> PairCheck:
    """Align samples of text, texts cut off inside a character, and random tokens.

    Raises:
        TokenizerError: if one of the two is not a fast tokenizer.
        InputError: if the verifier's chat template refuses a user's message.
    """
    refused = _refused(generator=generator, verifier=verifier)
    samples, identical = ([], [False]) if refused else _samples(generator, verifier, names[1])
    ours, theirs = set(generator.get_vocab()), set(verifier.get_vocab())
    return PairCheck(
        generator=_side(generator, names[0]),
        verifier=_side(verifier, names[1]),
        samples=samples,
        shared_vocabulary=len(ours & theirs) / len(ours | theirs),
        identical_tokens=all(identical[: len(SAMPLES)]),
        refused=refused,
    )


def _refused(**sides: Any) -> dict[str, str]:
    """The sides whose tokenizers lose text, and what they lose."""
    refused = {}
    for side, tokenizer in sides.items():
        require_fast(tokenizer)
        try:
            SpanTable(tokenizer)
        except TokenizerError as error:
            refused[side] = f"the {side}: {error}"
    return refused


def _samples(generator: Any, verifier: Any, verifier_name: str) -> tuple[list[Sample], list[bool]]:
    """Samples, and which of them have the same ids on both sides."""
    scorer = CrossModelEntropy(Uniform(verifier, verifier_name), generator)
    samples, identical = [], []
    for name, text, ids in _sample_ids(scorer):
        try:
            sample, verifier_ids = _check_sample(scorer, name, text, ids)
        except CMEError as error:
            sample, verifier_ids = Sample(name, len(ids), notes=[f"fails: {error}"]), None
        samples.append(sample)
        identical.append(verifier_ids == ids)
    return samples, identical


def _sample_ids(scorer: CrossModelEntropy) -> Iterator[tuple[str, str | None, list[int]]]:
    """Name, text (None for ids without one) and the generator's ids."""
    for name, text in SAMPLES.items():
        yield name, text, scorer.table.encode(text)[0].tolist()
    cut = scorer.table.encode(CUT_SHORT)[0].tolist()
    while cut and scorer.table.decode_batch([cut]).kinds[0][-1] != UNFINISHED:
        cut.pop()
    if cut:  # otherwise the generator has no tokens for parts of characters
        yield "cut off character", None, cut
    special = set(scorer.generator.special_ids.tolist())
    plain = [i for i in range(scorer.table.vocab_size) if i not in special]
    rng = np.random.default_rng(0)
    for k in range(RANDOM_ROWS):
        yield f"random tokens {k + 1}", None, rng.choice(plain, RANDOM_LENGTH).tolist()


def _check_sample(
    scorer: CrossModelEntropy, name: str, text: str | None, ids: list[int]
) -> tuple[Sample, list[int]]:
    """The sample, and the verifier's ids of it."""
    batch = scorer([PROMPT], [ids])
    member = scorer.members[0]
    rows = [np.array(ids, dtype=np.int64)]
    (segment,) = scorer.generator.segments([PROMPT], rows, None)
    question = member.ask([segment])  # once more, for float64
    scores = member.read(question, member.verifier.logprobs(*question.arguments))
    verifier_ids, logprobs_S = scores.verifier_tokens_n[0]
    seen = segment.shown(member.format)
    shown = seen.whole
    ends_S = seen.within(member.table.encode(shown)[1])
    expected = float(logprobs_S[np.diff(ends_S, prepend=0) > 0].sum())
    read = member.table.decode(verifier_ids)[0]
    if not shown.startswith(" "):
        read = read.removeprefix(" ")  # T5 writes one before every text
    covered, n_tokens = batch.metrics["coverage"], len(verifier_ids)
    sample = Sample(
        name,
        generator_tokens=len(ids),
        verifier_tokens=n_tokens,
        rewarded=float(batch.mask.float().mean()),
        dropped=float(batch.dropped_nats[0]) / max(n_tokens, 1),
        conservation_error=abs(float(scores.aligned_N.sum()) - expected) / max(-expected, 1),
        generator_round_trip=text is None or segment.text == text,
        verifier_round_trip=read == shown,
    )
    sample.exact = read == shown and covered == 1 and sample.conservation_error <= EXACT
    if covered < 1:
        sample.notes.append(f"{1 - covered:.0%} of the tokens have no place for the verifier")
    if read != shown:
        sample.notes.append(f"the verifier {_change(shown, read)}")
    if sample.conservation_error > EXACT:
        sample.notes.append(f"{sample.conservation_error:.2g} of the log-prob is lost")
    if text is not None and not sample.generator_round_trip:
        sample.notes.append(f"the generator {_change(text, segment.text)}")
    return sample, verifier_ids.tolist()


def _change(before: str, after: str) -> str:
    """`turns 'B' into 'b'`: where two texts first differ, with a few characters after it."""
    pairs = zip(before, after, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return f"turns {before[same : same + 6]!a} into {after[same : same + 6]!a}"


def _side(tokenizer: Any, name: str) -> Side:
    form = PromptFormat(tokenizer)
    generation_prompt, system_role = "", ""
    if form.is_chat:
        turns = [{"role": "user", "content": PROMPT}]
        generation_prompt = _render(tokenizer, turns, True).removeprefix(
            _render(tokenizer, turns, False)
        )
        system = {"role": "system", "content": "cme system"}
        try:
            system_role = (
                "yes" if "cme system" in _render(tokenizer, [system, *turns], True) else ""
            )
        except TemplateError:
            system_role = ""
        system_role = system_role or "no"
    end = form.end_of_turn
    return Side(
        name=name,
        kind=_kind(tokenizer),
        vocabulary=len(tokenizer),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        chat_template=form.is_chat,
        generation_prompt=generation_prompt,
        end_of_turn=None if end is None else tokenizer.convert_ids_to_tokens(end),
        system_role=system_role,
    )


def _render(tokenizer: Any, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )


def _kind(tokenizer: Any) -> str:
    """Such as "byte-level BPE, normaliser NFC"."""
    backend = tokenizer.backend_tokenizer
    model = type(backend.model).__name__
    decoder = str(backend.decoder)
    if "ByteLevel(" in decoder:
        kind = f"byte-level {model}"
    elif "ByteFallback(" in decoder:
        kind = f"SentencePiece {model} with byte fallback"
    else:
        kind = model
    normaliser = backend.normalizer
    return kind if normaliser is None else f"{kind}, normaliser {type(normaliser).__name__}"
