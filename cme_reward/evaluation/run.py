"""Ask every judge about every pair, several at a time, and nothing twice."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from cme_reward._keys import prompt_key
from cme_reward.errors import VerifierError
from cme_reward.evaluation.journal import Journal
from cme_reward.evaluation.judge import FAILED, INSTRUCTION, Judge
from cme_reward.evaluation.pairs import Pair, digest

HOPELESS = 20
"""Failures in a row, after all attempts of each, at which the judge is taken to be gone."""


@dataclass(frozen=True)
class Question:
    """A pair in one order, for one judge."""

    judge: Judge
    pair: Pair
    first: str
    """The model whose response is A."""

    @property
    def second(self) -> str:
        return self.pair.baseline if self.first == self.pair.model else self.pair.model

    @property
    def key(self) -> str:
        """Of all that a reply depends on: a changed response is asked about anew."""
        names, texts = (self.first, self.second), self.pair.shown(self.first)
        prompt = prompt_key(self.pair.prompt)
        return digest(self.judge.name, INSTRUCTION, prompt, names, texts)[:32]


def questions_of(
    judges: Sequence[Judge], pairs: Sequence[Pair], *, seed: int, both_orders: bool
) -> list[Question]:
    """What is to be asked, a pair's orders and judges together."""
    found = []
    for pair in pairs:
        first = pair.drawn(seed)
        second = pair.baseline if first == pair.model else pair.model
        orders = [first, second][: 1 + both_orders]
        found += [Question(judge, pair, name) for name in orders for judge in judges]
    return found


def ask_all(
    questions: Sequence[Question],
    journal: Journal,
    *,
    concurrency: int = 8,
    done: Callable[[dict[str, Any] | None, bool], None] = lambda judgment, new: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Has every question answered in the journal.

    Args:
        questions: those that the journal answers already are not asked.
        journal: where each judgment goes at once, by the thread that got it.
        concurrency: most questions at a time.
        done: told of each question's judgment, and whether it is new or was there already.
        stopping: told when those under way are waited for, after an error or Ctrl-C.

    Raises:
        ConfigError: where a judge refuses.
        VerifierError: when HOPELESS questions in a row have failed.

    On an error, and on Ctrl-C, no further question is asked, and those under way are waited for:
    they are paid for.
    """
    stop = threading.Event()
    todo: dict[str, Question] = {}
    for question in questions:
        if journal.answered(question.key):
            done(journal.known[question.key], False)
        elif question.key in todo:
            done(None, False)
        else:
            todo[question.key] = question
    waiting, failures = iter(todo.values()), 0
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for judgment in _answers(pool, waiting, journal, concurrency, stop):
                done(judgment, True)
                failures = failures + 1 if judgment["verdict"] == FAILED else 0
                if failures >= HOPELESS:
                    raise VerifierError(
                        f"{failures} questions in a row got no answer, the last from "
                        f"{judgment['judge']}: {judgment['reply']}. What was answered is kept; the "
                        "same command goes on from there"
                    )
        except BaseException:
            stop.set()
            stopping()
            raise


def _answers(
    pool: ThreadPoolExecutor,
    waiting: Iterator[Question],
    journal: Journal,
    concurrency: int,
    stop: threading.Event,
) -> Iterator[dict[str, Any]]:
    """Judgments as they come; only as many questions as run at once are handed to the pool."""
    running: set[Future[dict[str, Any] | None]] = set()
    while True:
        for question in waiting:
            running.add(pool.submit(_answer, question, journal, stop))
            if len(running) >= concurrency:
                break
        if not running:
            return
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for one in finished:
            judgment = one.result()
            if judgment is not None:
                yield judgment


def _answer(question: Question, journal: Journal, stop: threading.Event) -> dict[str, Any] | None:
    if stop.is_set():
        return None
    started = time.monotonic()
    texts = question.pair.shown(question.first)
    reply = question.judge.ask(question.pair.prompt, *texts, stop)
    if reply is None:
        return None
    prompt = prompt_key(question.pair.prompt)
    judgment: dict[str, Any] = {
        "key": question.key,
        "judge": question.judge.name,
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "models": sorted((question.first, question.second)),
        "order": [question.first, question.second],
        "verdict": reply.verdict,
        "reason": reply.reason,
        "reply": reply.raw,
        "seconds": round(time.monotonic() - started, 3),
    }
    if reply.usage is not None:
        judgment["tokens"] = list(reply.usage)
    if reply.chances is not None:
        judgment["chances"] = [round(chance, 6) for chance in reply.chances]
    journal.add(judgment)
    return judgment
