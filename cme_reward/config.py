"""The settings of the reward, in one frozen dataclass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cme_reward._settings import (
    check_choices,
    kinds_of,
    read_environment,
    read_settings,
    read_yaml,
)
from cme_reward.advantages import Credit, Scale
from cme_reward.errors import ConfigError

Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class CMEConfig:
    """Settings of the cross-model entropy reward.

    From keyword arguments, or through `from_dict` (also a hydra / OmegaConf node), `from_yaml` and
    `from_env`. An unknown key raises `ConfigError` naming the nearest known one. The paper to the
    letter (arXiv 2605.29009, Appendix B) is `CMEConfig(whitespace="mask", eos="mask")`.
    """

    level: Level = "token"
    """"token" (the paper's): one reward per token. "sequence": the mean verifier log-prob (Eq. 3),
    on the last token; in the miniature as quick, and in the long run more often right and less
    varied (docs/evidence.md)."""

    credit: Credit = "token"
    """What of the token rewards a token's advantage is made of. "token" (paper): its own. "return":
    its own and all later ones, see `returns_to_go`, so that a token answers for what it leads to.
    "sequence" is another word for `level="sequence"`, and read as that."""

    gamma: float = 1.0
    """Discount of `credit="return"`, from 0 (a token's own reward) to 1."""

    whitespace: Literal["keep", "mask"] = "keep"
    """"keep": tokens of white space only are scored as others are. "mask" (paper): they get no
    reward, and a policy of long answers learns to go on in them (docs/evidence.md)."""

    eos: Literal["score", "mask"] = "score"
    """"score": the generator's EOS gets the verifier's end-of-turn log-prob, so that stopping earns
    or costs credit. "mask" (paper): EOS gets no reward, and nothing pays for stopping; at the token
    level runs then did a little worse, and credited with what follows they failed
    (docs/evidence.md)."""

    thinking: Literal["score", "condition", "hide"] = "score"
    """"score" (paper): thoughts and answer are one text. "condition": thoughts are shown to the
    verifier and not scored, so that the reward is of the answer given the thoughts. "hide": the
    verifier reads the answer alone. See docs/conversations.md."""

    thinking_tags: Sequence[str] | str = ("<think>", "</think>")
    """What opens and closes a thought in the generator's responses; in one text, both apart."""

    special_tokens: Literal["hide", "show"] = "hide"
    """"hide": special tokens inside a response (tool-call markers, tags that are special) are left
    out of its text, counted as `special_masked`. "show": the verifier reads their names as ordinary
    characters, and they are scored as text. What ends a response is the end of turn either way."""

    logprob_floor: float | None = None
    """Verifier log-probs below this many nats are raised to it, before alignment. None: none is."""

    baseline: Literal["none", "policy"] = "none"
    """"policy": subtract the sampler's own log-prob from each token's (the reverse-KL reward of
    on-policy distillation), and its sum over the text that the verifier scores from the
    verifier's. "none": the paper."""

    scale: Scale = "std"
    """"std": advantages are divided by the group's standard deviation + eps. "batch": by that of
    the whole batch + eps. "none": they are not (Dr. GRPO)."""

    eps: float = 0.1
    """Added to the standard deviation, in nats. See `group_advantages`."""

    system_prompt: str | None = None
    """System prompt for the verifier, in front of conversations that have none of their own."""

    examples: Sequence[Mapping[str, str]] | str = ()
    """Prompts with good responses, `[{"prompt": ..., "response": ...}]` or a file of such JSON
    lines, that the verifier reads as turns in front of every conversation, after its system prompt.
    They tell it what form a response is to have: one that expects whole sentences finds a bare
    right answer as surprising as a wrong one (docs/evidence.md). A base model reads each prompt
    and response as one text."""

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the verifier's chat template, for example `{"enable_thinking": False}`."""

    chat_template: str | None = None
    """A jinja chat template to use in place of the verifier's own (or where it has none). "none"
    for no template: a base model whose tokenizer ships one reads plain text.
    Left out, the verifier's own."""

    max_length: int | None = None
    """Most tokens shown to the verifier, prompt included. None: as many as it can take."""

    def __post_init__(self) -> None:
        template = "" if self.chat_template is None else str(self.chat_template)
        if template.strip().lower() in ("none", "null", "false"):
            object.__setattr__(self, "chat_template", "none")  # the class is frozen
        check_choices(self)
        self._check_credit()
        tags = self.thinking_tags
        tags = tuple(tags.replace(",", " ").split() if isinstance(tags, str) else tags)
        if len(set(tags)) != 2 or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            raise ConfigError(
                f"thinking_tags={self.thinking_tags!r} must be two different texts, what opens a "
                "thought and what closes it, such as ('<think>', '</think>') or '<think> </think>'"
            )
        object.__setattr__(self, "thinking_tags", tags)  # frozen, and a list compares unequal
        if self.logprob_floor is not None and not self.logprob_floor <= 0:
            raise ConfigError(
                f"logprob_floor={self.logprob_floor!r} must be 0 or negative (nats), or None"
            )
        if not self.eps >= 0:
            raise ConfigError(f"eps={self.eps!r} must be 0 or a positive number of nats")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length={self.max_length!r} leaves no room for a prompt and a response; "
                "expected at least 2 tokens, or None"
            )
        self._check_examples()
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ConfigError(
                f"chat_template_kwargs={self.chat_template_kwargs!r} must be a mapping, "
                "such as {'enable_thinking': False}"
            )

    def _check_examples(self) -> None:
        given = self.examples
        given = _read_lines(given) if isinstance(given, str) else given
        for k, pair in enumerate(given):
            texts = pair if isinstance(pair, Mapping) else {}
            texts = [texts.get(name) for name in ("prompt", "response")]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ConfigError(
                    f"examples[{k}]={pair!r}: expected a mapping such as {{'prompt': 'Capital of "
                    "Italy?', 'response': 'Rome'}, both with text"
                )
        pairs = tuple({"prompt": pair["prompt"], "response": pair["response"]} for pair in given)
        object.__setattr__(self, "examples", pairs)  # frozen

    def _check_credit(self) -> None:
        if self.credit == "sequence":
            object.__setattr__(self, "level", "sequence")
            object.__setattr__(self, "credit", "token")
        if self.level == "sequence" and self.credit == "return":
            raise ConfigError(
                'credit="return" is made of token rewards, and level="sequence" has none; leave '
                "one of them out"
            )
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma!r} must be a discount from 0 to 1")
        if self.gamma != 1 and self.credit != "return":
            raise ConfigError(f'gamma={self.gamma!r} has no effect without credit="return"')

    @property
    def of_advantages(self) -> dict[str, Any]:
        """The keywords of `token_advantages`."""
        return {name: getattr(self, name) for name in ("credit", "gamma", "scale", "eps")}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CMEConfig:
        """From any mapping of names to values; strings are read as their field's type."""
        return cls(**read_settings(settings, kinds_of(cls)))

    @classmethod
    def from_yaml(
        cls, path: str | Path, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> CMEConfig:
        """From a YAML file of settings, at its top level or under a `cme:` key, with changes."""
        settings = read_yaml(path, "settings from ", "eos: score")
        inner = settings.get("cme")
        return cls.from_dict({**(inner if isinstance(inner, dict) else settings), **changes})

    @classmethod
    def from_env(cls, prefix: str = "CME_", environ: Mapping[str, str] | None = None) -> CMEConfig:
        """From environment variables such as `CME_EOS=mask`; other variables are left alone, also
        one that is misspelt."""
        return cls.from_dict(read_environment(kinds_of(cls), prefix, environ))


def _read_lines(file: str) -> list[Any]:
    try:
        # Not by splitlines: JSON may hold U+2028 as it is.
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"examples={file!r} cannot be read as a file of JSON lines with prompt and response: "
            f"{error}"
        ) from error
