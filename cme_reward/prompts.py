"""Prompts and turns, as token ids in the verifier's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from cme_reward.config import CMEConfig
from cme_reward.errors import InputError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

PROMPTS_KEPT = 2048, 2**24
"""Most prompts that are remembered, as many as are in the works at a time, and characters."""

_USER, _REPLY = "cme question", "cme answer"  # contents to look for


class PromptFormat:
    """How one tokenizer's model is prompted: chat template, or plain text for a base model.

    Attributes:
        is_chat: whether prompts go through a chat template.
        end_of_turn: id of the first token the chat template writes after an assistant message; for
            a base model its EOS; None where there is neither.
        lead: white space that the template writes between the generation prompt and the message
            (Llama-2 has one space), to be put in front of responses.
    """

    def __init__(self, tokenizer: Any, config: CMEConfig = CMEConfig()) -> None:  # noqa: B008 (frozen)
        self.tokenizer = tokenizer
        self.template = config.chat_template or getattr(tokenizer, "chat_template", None)
        self.is_chat = self.template is not None
        self.system_prompt = config.system_prompt
        self.template_kwargs = dict(config.chat_template_kwargs)
        self.end_of_turn: int | None = tokenizer.eos_token_id
        self.lead = ""
        if self.is_chat:
            before = self._text([{"role": "user", "content": _USER}], add_generation_prompt=True)
            written = self._text(_example(), add_generation_prompt=False)
            body, _, tail = written.rpartition(_REPLY)
            if body.startswith(before) and body[len(before) :].isspace():
                self.lead = body[len(before) :]
            # Llama-2 writes " </s>": the space belongs to no token of its own.
            ids = self._ids(tail.lstrip(" ") or tail)
            self.end_of_turn = ids[0] if ids else self.end_of_turn

    def render(self, prompt: Prompt) -> list[int]:
        """Token ids of everything before a response; never empty, never with a double BOS.

        A string prompt is one user message to a chat model, and plain text to a base model.

        Raises:
            InputError: for a conversation the template refuses, or one without a template.
        """
        if self.is_chat:
            messages = as_messages(prompt)
            if self.system_prompt and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
            ids = self._ids(self._text(messages, add_generation_prompt=True))
        else:
            ids = self._plain_ids(self._plain_text(prompt))
        if not ids:
            raise InputError(
                f"the prompt {prompt!r} has no tokens and the tokenizer "
                f"{self.tokenizer.name_or_path!r} no BOS or EOS to start from; expected a prompt "
                "with text"
            )
        return ids

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The rendered conversation, in simpler roles where the template knows no others."""
        first_error = None
        for attempt in (list, _plain_roles, _without_system):
            try:
                return self.tokenizer.apply_chat_template(
                    attempt(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self.template,
                    **self.template_kwargs,
                )
            except TemplateError as error:
                first_error = first_error or error
        raise InputError(
            f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of roles "
            f"{[message.get('role') for message in messages]}: {first_error}. Expected roles it "
            "knows; change the prompt, or give chat_template"
        ) from first_error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _plain_text(self, prompt: Prompt) -> str:
        parts = [self.system_prompt] if self.system_prompt else []
        if not isinstance(prompt, str):
            messages = as_messages(prompt)
            if len(messages) > 1:
                raise InputError(
                    f"{self.tokenizer.name_or_path!r} has no chat template for a conversation of "
                    f"{len(messages)} messages; give chat_template, or prompts as plain strings"
                )
            prompt = str(messages[0]["content"])
        return "\n\n".join([*parts, prompt])

    def _plain_ids(self, text: str) -> list[int]:
        """The text after the special tokens that start a sequence, without those that end it."""
        bare = self._ids(text)
        whole = self.tokenizer.encode(text, add_special_tokens=True)
        start = next(k for k in range(len(whole) + 1) if whole[k : k + len(bare)] == bare)
        first = whole[:start] if bare else [i for i in whole if i == self.tokenizer.bos_token_id]
        ids = bare if bare[:1] == first[-1:] and bare[:1] else first + bare
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [i for i in starts if i is not None][:1]
        return ids


def _example() -> list[Message]:
    return [{"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}]


def as_messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = list(prompt)
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InputError(
                f"{message!r} is not a message; expected a string prompt or a list of messages "
                "such as {'role': 'user', 'content': '...'}"
            )
    if not messages:
        raise InputError("a prompt holds no messages; expected at least one")
    return messages


def _plain_roles(messages: Sequence[Message]) -> list[Message]:
    """System, user and assistant only, neighbours of one role joined."""
    plain: list[Message] = []
    for message in messages:
        role = message["role"] if message["role"] in ("system", "assistant") else "user"
        if plain and plain[-1]["role"] == role:
            joined = f"{plain[-1]['content']}\n\n{message['content']}"
            plain[-1] = {"role": role, "content": joined}
        else:
            plain.append({"role": role, "content": message["content"]})
    return plain


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system prompt at the head of the first user message, for templates without that role."""
    turned = [{**m, "role": "user"} if m["role"] == "system" else m for m in messages]
    return _plain_roles(turned)


def prompt_key(prompt: Prompt) -> str:
    """Equal for prompts that render equally: rollouts of one prompt are rendered once."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
