"""RLME: an evaluator's answers to questions about the response."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward.comparators.base import Call, Comparator, Values
from cme_reward.config import CMEConfig
from cme_reward.conversation.format import PromptFormat
from cme_reward.conversation.messages import Prompt, as_messages, plain_content
from cme_reward.errors import ConfigError, VerifierError
from cme_reward.spans.table import SpanTable
from cme_reward.verifiers import Ensemble, Verifier, load_verifier

TEMPLATE = (
    "Below are a request and a response to it.\n\n# Request\n{prompt}\n\n# Response\n{response}"
    "\n\n# Question\n{question} Reply with {positive} or {negative}, and nothing else."
)
FOR_BASE_MODELS = "\n\n# Answer\n"


@dataclass(frozen=True)
class MetaQuestion:
    """A question about a response, and the answer that is rewarded."""

    text: str
    positive: str = "Yes"
    negative: str = "No"
    weight: float = 1.0

    def __post_init__(self) -> None:
        texts = (self.text, self.positive, self.negative)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"{self!r}: expected a text, and words for both answers")
        if not math.isfinite(self.weight):
            raise ConfigError(f"{self!r}: expected a finite weight")


class RLME(Comparator):
    """The evaluator's probability of a positive answer to meta-questions (RLME, arXiv 2601.21268).

        r(x, y) = sum_k w_k log p(a_k | x, y, q_k)

    in nats, <= 0 for positive weights: q_k is a question about the response y to x, a_k its
    positive answer ("Yes"), p the evaluator's probability of that text, over all tokens it could
    say. The mean of the verifiers of an ensemble. An empty response is judged as any other.

    Args:
        verifier: the evaluator: a verifier or ensemble, or the spec of one.
        generator_tokenizer: the sampler's fast tokenizer.
        config: see `Comparator`; `system_prompt`, `examples`, `chat_template`,
            `chat_template_kwargs` and `max_length` are for the evaluator.
        questions: texts, `MetaQuestion`s, or the same as mappings.
        logarithm: False for `sum_k w_k p(a_k | ...)`, without unit.
        relative: True to divide by the probabilities of both answers: `p(Yes) / (p(Yes) + p(No))`.
        template: what the evaluator reads, with `{prompt}`, `{response}`, `{question}`, and if
            wanted `{positive}`, `{negative}`: one user message to a chat model, plain text to a
            base model. All of it is text: it cannot write special tokens, and no response can.

    A response too long for the evaluator's context is shown without its tail and counted in the
    metric `truncated`; where not even the question fits, the answer is a uniform guess.
    """

    name = "rlme"

    def __init__(
        self,
        verifier: Verifier | Ensemble | str,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        questions: Sequence[str | MetaQuestion | Mapping[str, Any]] = ("Is the answer correct?",),
        logarithm: bool = True,
        relative: bool = False,
        template: str | None = None,
        per_token: bool = False,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(
            generator_tokenizer, config, per_token=per_token, eos_token_ids=eos_token_ids
        )
        self.verifier = load_verifier(verifier) if isinstance(verifier, str) else verifier
        if isinstance(questions, str) or not questions:
            raise ConfigError(f"questions={questions!r}; expected a list of at least one question")
        self.questions = [_question(question) for question in questions]
        self.logarithm = logarithm
        self.relative = relative
        members = self.verifier.members if isinstance(self.verifier, Ensemble) else (self.verifier,)
        self.evaluators = [Evaluator(member, config, template) for member in members]

    def values(self, call: Call) -> Values:
        texts = self.table.decode_batch(call.sampled_ids).texts
        judged = [
            evaluator.logprobs(call.prompts, texts, self.questions, relative=self.relative)
            for evaluator in self.evaluators
        ]
        logp_BK = np.mean([logp for logp, _ in judged], axis=0)
        p_BK = np.mean([np.exp(logp) for logp, _ in judged], axis=0)
        weights_K = np.array([question.weight for question in self.questions])
        metrics = {
            "positive": float(p_BK.mean()) if p_BK.size else 0.0,
            "truncated": float(np.any([cut_B for _, cut_B in judged], axis=0).sum()),
        }
        if len(self.questions) > 1 and len(texts):
            metrics |= {f"positive_{k}": float(p) for k, p in enumerate(p_BK.mean(0))}
        return Values((logp_BK if self.logarithm else p_BK) @ weights_K, None, metrics)


class _Request(NamedTuple):
    prompt: list[int]
    answer: list[int]


class Evaluator:
    """A verifier that answers questions."""

    def __init__(self, verifier: Verifier, config: CMEConfig, template: str | None) -> None:
        self.verifier = verifier
        self.format = PromptFormat(verifier.tokenizer, config)
        self.table = SpanTable(verifier.tokenizer)
        self.max_length = min(verifier.max_length, config.max_length or verifier.max_length)
        default = TEMPLATE if self.format.is_chat else TEMPLATE + FOR_BASE_MODELS
        self.template = default if template is None else template
        fields = dict.fromkeys(("prompt", "response", "question"), "\0")
        try:
            filled = self.template.format(**fields, positive="", negative="")
        except (KeyError, IndexError, ValueError) as error:
            filled = repr(error)
        if filled.count("\0") != len(fields):
            raise ConfigError(
                f"template={template!r}; expected {{prompt}}, {{response}} and {{question}} in it, "
                "once each, and braces of its own doubled"
            )

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        questions: Sequence[MetaQuestion],
        *,
        relative: bool,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probs of the positive answers `[B, K]`, and which responses were cut `[B]`."""
        requests: list[_Request] = []
        places: list[tuple[int, int, int]] = []
        cut_B = np.zeros(len(texts), dtype=bool)
        logp_BK2 = np.zeros((len(texts), len(questions), 2 if relative else 1))
        guess = -math.log(self.verifier.vocab_size)
        for b, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            request = _as_text(prompt)
            for k, question in enumerate(questions):
                answers = [self._answer(question.positive)]
                if relative:
                    answers.append(self._answer(question.negative))
                room = self.max_length - max(map(len, answers))
                ids, cut = self._fitted(request, text, question, room)
                cut_B[b] |= cut
                for a, answer in enumerate(answers):
                    if ids is None:
                        logp_BK2[b, k, a] = guess
                    else:
                        places.append((b, k, a))
                        requests.append(_Request(ids, answer))
        replies = self.verifier.logprobs([r.prompt for r in requests], [r.answer for r in requests])
        for (b, k, a), request, reply in zip(places, requests, replies, strict=True):
            logp_S = np.asarray(reply, dtype=np.float64)
            if logp_S.shape != (len(request.answer),) or not np.isfinite(logp_S).all():
                raise VerifierError(
                    f"{self.verifier.name} returned {reply!r} for the answer to question {k} on "
                    f"response {b}; expected {len(request.answer)} finite log-probs"
                )
            logp_BK2[b, k, a] = logp_S.sum()
        logp_BK = logp_BK2[..., 0]
        return logp_BK - np.logaddexp.reduce(logp_BK2, axis=-1) * relative, cut_B

    def _answer(self, word: str) -> list[int]:
        lead = self.format.lead if self.format.is_chat else ""
        return self.table.encode(lead + word)[0].tolist()

    def _fitted(
        self, request: str, text: str, question: MetaQuestion, room: int
    ) -> tuple[list[int] | None, bool]:
        """The evaluator's prompt, with as much of the response as fits; None if none does."""
        ids = self._prompt(request, text, question)
        if len(ids) <= room:
            return ids, False
        shown = self.table.encode(text)[0]
        while len(ids) > room:
            if not len(shown):
                return None, True
            shown = shown[: max(0, len(shown) - (len(ids) - room))]
            ids = self._prompt(request, self.table.decode(shown)[0], question)
        return ids, True

    def _prompt(self, request: str, text: str, question: MetaQuestion) -> list[int]:
        content = self.template.format(
            prompt=request,
            response=text,
            question=question.text,
            positive=question.positive,
            negative=question.negative,
        )
        if self.format.is_chat:
            return self.format.render([{"role": "user", "content": content}])
        return self.format.render(content)


def _question(given: str | MetaQuestion | Mapping[str, Any]) -> MetaQuestion:
    if isinstance(given, MetaQuestion):
        return given
    if isinstance(given, str):
        return MetaQuestion(given)
    try:
        return MetaQuestion(**given)
    except TypeError as error:
        raise ConfigError(
            f"question {given!r}: expected a text, or a mapping with `text` and any of "
            "`positive`, `negative`, `weight`"
        ) from error


def _as_text(prompt: Prompt) -> str:
    """A prompt as plain text: one message as it is, a conversation by roles."""
    if isinstance(prompt, str):
        return prompt
    messages = as_messages(prompt)
    where = "the evaluator, which reads the request as plain text,"
    texts = [plain_content(k, message, where) for k, message in enumerate(messages)]
    if len(messages) == 1:
        return texts[0]
    return "\n\n".join(
        f"{m['role'].capitalize()}: {text}" for m, text in zip(messages, texts, strict=True)
    )
