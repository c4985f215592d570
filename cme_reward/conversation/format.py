"""Prompts and turns, as token ids in the verifier's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

from cme_reward._keys import prompt_key
from cme_reward._lru import LRU
from cme_reward.config import CMEConfig
from cme_reward.conversation.literal import Change, encode_literally, special_names
from cme_reward.conversation.markup import find_prefill
from cme_reward.conversation.messages import (
    SYSTEM,
    Message,
    Prompt,
    as_messages,
    forms,
    marked,
    name_of,
    plain_content,
    with_texts,
)
from cme_reward.conversation.thinking import Start
from cme_reward.errors import InputError

PROMPTS_KEPT = 2048, 2**24
"""Most prompts that are remembered, as many as are in the works at a time, and characters."""

_USER, _REPLY = "cme question", "cme answer"  # contents to look for


class PromptFormat:
    """How one tokenizer's model is prompted: chat template, or plain text for a base model.

    What a prompt says is text: only special tokens that the template itself writes are ones.

    Attributes:
        is_chat: whether prompts go through a chat template.
        end_of_turn: id of the first token the chat template writes after an assistant message; for
            a base model its EOS, and for a template without such messages; None where there is
            neither.
        lead: white space that the template writes right before the message (Llama-2 has one
            space), to be put in front of responses.
        prefill: what the generation prompt writes at the start of the message, such as `<think>`.
        header: what the template writes there of a finished message, if that is another place to
            answer at: the channel of gpt-oss, Qwen3's empty thought, nothing where the generation
            prompt begins a thought; None where an answer goes on from the generation prompt.
    """

    def __init__(self, tokenizer: Any, config: CMEConfig = CMEConfig()) -> None:  # noqa: B008 (frozen)
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self.template = config.chat_template or None
        self.is_chat = self.template != "none" and (self.template or own) is not None
        self.system_prompt = config.system_prompt
        self.examples: Any = config.examples  # read by now, if they were in a file
        self.template_kwargs = dict(config.chat_template_kwargs)
        self.end_of_turn: int | None = tokenizer.eos_token_id
        self.lead = self.prefill = ""
        self.header: str | None = None
        self._tags = config.thinking_tags
        self._special = special_names(tokenizer)
        self._forms: LRU[int] = LRU(*PROMPTS_KEPT)
        if self.is_chat:
            self._read_ending()

    def _read_ending(self) -> None:
        question = self._shown([{"role": "user", "content": _USER}], add_generation_prompt=True)
        before = self._written(question, add_generation_prompt=True)
        try:
            example = self._shown(_example(), add_generation_prompt=False)
        except InputError:  # a template of prompts alone
            return
        written = self._written(example, add_generation_prompt=False)
        body, _, tail = written.rpartition(_REPLY)
        # Llama-2 writes " </s>": the space belongs to no token of its own.
        ids = self.tokenizer.encode(tail.lstrip(" ") or tail, add_special_tokens=False)
        self.end_of_turn = ids[0] if ids else self.end_of_turn
        self.prefill = find_prefill(self._tried, self._tags[0])
        self._read_header(before, body)

    def _read_header(self, before: str, body: str) -> None:
        """From a generation prompt, and what is written before the answer of a finished message."""
        opens = any(
            self.prefill.lstrip().startswith(opening) and closing not in self.prefill
            for opening, closing in (self._tags, CMEConfig.thinking_tags)  # the generator's or not
        )
        start = before.removesuffix(self.prefill) if opens else before
        header = body[len(start) :] if body.startswith(start) else ""
        if self._tags[0] not in header:
            self.lead = header[len(header.rstrip()) :]
        header = header.removesuffix(self.lead)
        if start != before or header:
            self.header = header

    def _tried(self, messages: Sequence[Message], *, ask: bool) -> str | None:
        """The messages as they are; None where the template refuses them."""
        try:
            return self._written(messages, add_generation_prompt=ask)
        except Exception:  # in any way it likes
            return None

    def opening(self, start: Start = "answer") -> str:
        """What stands between the start of the assistant's message and a response.

        In front of an answer it is what the template writes of a finished message, so that a model
        which thinks is not asked for an answer inside a thought. A response that brings a thought
        gets none of the template's, and one that begins inside a thought goes on with that of the
        generation prompt.
        """
        if start == "answer" and self.header is not None:
            return self.header
        thinks = self._tags[0] in (self.header or "")
        channel = "" if thinks else self.header or ""
        return ("" if start == "thought" else self.prefill) + channel

    def render(self, prompt: Prompt, start: Start = "answer") -> list[int]:
        """Token ids of everything before a response; never empty, never with a double BOS.

        A string prompt is one user message to a chat model, and plain text to a base model. `start`
        says how the response begins, see `opening`.

        Raises:
            InputError: for a conversation that the template refuses or does not show in full, or
                one without a template.
        """
        if self.is_chat:
            messages = as_messages(prompt)
            if self.system_prompt and messages[0]["role"] not in SYSTEM:
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
            head = len(list(takewhile(lambda m: m["role"] in SYSTEM, messages)))
            messages[head:head] = self._example_turns()
            shown = self._shown(messages, add_generation_prompt=True)

            def write(change: Change) -> str:
                changed = [with_texts(message, change) for message in shown]
                try:
                    text = self._written(changed, add_generation_prompt=True)
                    return text.removesuffix(self.prefill) + self.opening(start)
                except Exception as error:  # it showed such messages, and objects to what these say
                    raise InputError(self._refusal(_refused(messages, error))) from error

            ids = encode_literally(self.tokenizer, write, self._special)
        else:
            ids = self._plain_ids(self._plain_text(prompt))
        if not ids:
            raise InputError(
                f"the prompt {prompt!r} has no tokens and the tokenizer "
                f"{self.tokenizer.name_or_path!r} no BOS or EOS to start from; expected a prompt "
                "with text"
            )
        return ids

    def _example_turns(self) -> list[Message]:
        roles = {"prompt": "user", "response": "assistant"}
        return [{"role": roles[k], "content": pair[k]} for pair in self.examples for k in roles]

    def _shown(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> Sequence[Message]:
        """The conversation in the first form in which the template writes all that it says."""
        probe, marks = marked(messages)

        def first_form() -> int:
            faults = []
            for k, form in enumerate(forms(probe)):
                fault = self._fault(form, messages, marks, add_generation_prompt)
                if fault is None:
                    return k
                faults.append(fault)
            raise InputError(self._refusal(faults[0]))

        # What a template shows goes by roles and kinds of content, not by what is said.
        key = f"{add_generation_prompt} {prompt_key(probe)}"
        number = self._forms.get(key, first_form, len(key))
        return next(islice(forms(messages), number, None))

    def _fault(
        self,
        form: Sequence[Message],
        messages: Sequence[Message],
        marks: Sequence[Sequence[str]],
        add_generation_prompt: bool,
    ) -> str | None:
        """What is wrong with how the template writes this form of the messages, if anything."""
        try:
            written = self._written(form, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template may object in any way it likes
            return _refused(messages, error)
        if any(m["content"] is None for m in form) and "None" in written:
            return "writes None for a message without content"
        if re.search(r"""['"]text['"]:""", written):  # parts, as Python or JSON write them
            return "writes contents with Python's punctuation"
        for k, message in enumerate(messages):
            lost = [mark for mark in marks[k] if mark not in written]
            if lost:
                if "call" in lost[0]:
                    return f"leaves out tool calls of {name_of(k, message)}"
                return f"leaves out what {name_of(k, message)} says"
        return None

    def _refusal(self, fault: str) -> str:
        return (
            f"the chat template of {self.tokenizer.name_or_path!r} {fault}. Expected roles and "
            "contents that it shows; change the prompt, or give chat_template"
        )

    def _written(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.template,
            **self.template_kwargs,
        )

    def _plain_text(self, prompt: Prompt) -> str:
        parts = [self.system_prompt] if self.system_prompt else []
        parts += [pair["prompt"] + pair["response"] for pair in self.examples]
        messages = as_messages(prompt)
        if len(messages) > 1:
            raise InputError(
                f"{self.tokenizer.name_or_path!r} has no chat template for a conversation of "
                f"{len(messages)} messages; give chat_template, or prompts as plain strings"
            )
        where = f"{self.tokenizer.name_or_path!r}, which has no chat template,"
        return "\n\n".join([*parts, plain_content(0, messages[0], where)])

    def _plain_ids(self, text: str) -> list[int]:
        """The text after the special tokens that start a sequence, without those that end it."""
        # A BOS in front of a text is no part of it, and is the one that is put there.
        bos = self.tokenizer.bos_token or ""
        bos = bos if text.startswith(bos) else ""
        bare = encode_literally(
            self.tokenizer, lambda change: bos + change(text[len(bos) :]), self._special
        )
        sample = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        start = next(k for k in range(len(whole) + 1) if whole[k : k + len(sample)] == sample)
        first = whole[:start] if bare else [i for i in whole if i == self.tokenizer.bos_token_id]
        ids = bare if bare[:1] == first[-1:] and bare[:1] else first + bare
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [i for i in starts if i is not None][:1]
        return ids


def _refused(messages: Sequence[Message], error: Exception) -> str:
    roles = [message["role"] for message in messages]
    return f"refuses a conversation of roles {roles}: {error}"


def _example() -> list[Message]:
    return [{"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}]
