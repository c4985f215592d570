"""What the reward server reads and writes, as its OpenAPI document states it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from cme_reward._row import BY_TOKEN, FIELDS, one_of, plural
from cme_reward.config import Level
from cme_reward.conversation.messages import check_characters
from cme_reward.errors import InputError


def _whole(text: str) -> str:
    check_characters("the text", text)
    return text


Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(strict=True, gt=-(2**31), lt=2**31)]
"""Below 0: padding, under mask 0."""
Flag = bool | Literal[0, 1]
LogProb = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """A misspelt field would be a reward for something else."""

    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    role: Text = Field(min_length=1, max_length=64, examples=["user"])
    content: Text | list[TextPart] | None = Field(None, examples=["What is 2 + 3?"])
    tool_calls: list[dict[str, Any]] | None = Field(
        None,
        description="What an assistant called, as its chat template takes it: "
        '`{"function": {"name": "...", "arguments": {...}}}`.',
    )
    tool_call_id: Text | None = None
    name: Text | None = None

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


PROMPT_FORMS = ("as text", "as messages")


def _form(prompt: Any) -> str:
    return PROMPT_FORMS[isinstance(prompt, list)]


PromptOrMessages = Annotated[
    Annotated[Text, Tag(PROMPT_FORMS[0])] | Annotated[Conversation, Tag(PROMPT_FORMS[1])],
    Discriminator(_form),
]


def _one_each(name: str) -> Any:
    """A list with a row's field for each response."""
    return Field(None, description=f"For each response. {FIELDS[name]}")


class ScoreRequest(_Strict):
    """B responses and their prompts. One prompt may stand for all of them."""

    prompts: list[PromptOrMessages] | None = _one_each("prompt")
    messages: list[Conversation] | None = _one_each("messages")
    responses: list[Text] | None = _one_each("response")
    response_ids: list[list[TokenId]] | None = _one_each("response_ids")
    response_masks: list[list[Flag]] | None = _one_each("response_mask")
    policy_logprobs: list[list[LogProb]] | None = _one_each("policy_logprobs")
    append_eos: bool = Field(
        False,
        description="With `responses`: their writers stopped by themselves, so that the end is "
        "scored too. (Ids hold the token for that.)",
    )
    level: Level | None = Field(
        None,
        description="`sequence`: leave token rewards and masks out of the reply. Default: the "
        "server's.",
    )
    return_tokens: bool = Field(False, description="Add the text of each token to the reply.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompts": ["What is 2 + 3?"], "responses": ["5", "The answer is five."]},
                {
                    "messages": [[{"role": "user", "content": "Say hello."}]],
                    "response_ids": [[72, 101, 108, 108, 111]],
                    "level": "sequence",
                },
            ]
        },
    )

    def check(self) -> int:
        """The number of responses.

        Raises:
            InputError: for fields that do not fit together.
        """
        given = {name: rows for name, rows in vars(self).items() if rows is not None}
        prompts = given[one_of(given, "prompts", "messages", "got")]
        responses = given[one_of(given, "responses", "response_ids", "got")]
        for name in map(plural, BY_TOKEN):
            if name in given and "response_ids" not in given:
                raise InputError(f"{name} goes by sampled tokens; expected response_ids with it")
        if self.append_eos and self.responses is None:
            raise InputError("append_eos is for responses as text; response_ids hold the end")
        if len(prompts) != len(responses) and len(prompts) != 1:
            raise InputError(
                f"got {len(prompts)} prompts and {len(responses)} responses; expected one prompt "
                "for each response, or one for all"
            )
        return len(responses)

    def conversations(self, n: int) -> list[Any]:
        """A prompt for each of n responses."""
        given = self.messages if self.prompts is None else self.prompts
        prompts = [p if isinstance(p, str) else [m.plain() for m in p] for p in given or ()]
        return prompts if len(prompts) == n else prompts * n


class ScoreReply(BaseModel):
    """Rewards in nats: 0 is certain, and the lower, the more surprising."""

    level: Level
    verifier: str
    sequence_rewards: list[float] = Field(
        description="For each response the mean log-prob of the verifier's tokens."
    )
    token_rewards: list[list[float]] | None = Field(
        description="For each response a reward for each of the generator's tokens; 0 where masked."
    )
    masks: list[list[bool]] | None = Field(description="false: the token has no reward.")
    tokens: list[list[str]] | None = Field(description="Texts of those tokens, where asked for.")
    dropped_nats: list[float] = Field(
        description="For each response, how much of its surprise lies on masked tokens."
    )
    truncated: int = Field(
        description="How many responses do not fit the verifier's context with their prompt; "
        "their tails are masked."
    )
    metrics: dict[str, float]


class RewardRequest(BaseModel):
    """OpenRLHF's request. Fields that it may add in other versions are ignored."""

    query: list[Text] = Field(
        description="Prompt and response of each rollout, decoded with special tokens."
    )
    prompts: list[Text] = Field(
        default=[], description="The prompts alone, as the generator's chat template wrote them."
    )
    labels: list[Any] | None = Field(
        None,
        description="Labels of the rollouts. One that holds a list of messages, or that as JSON, "
        "is taken as the conversation before the response, in place of the prompt.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": ["What is 2 + 3? 5"], "prompts": ["What is 2 + 3?"], "labels": [None]},
                {"query": [], "prompts": [], "labels": []},
            ]
        }
    )

    def check(self) -> None:
        """Raises InputError where the lists are not of one length."""
        n = len(self.query)
        for name, rows in (("prompts", self.prompts), ("labels", self.labels)):
            if rows is not None and len(rows) != n:
                raise InputError(
                    f"{name} has {len(rows)} entries and query {n}; expected one for each"
                )


class RewardReply(BaseModel):
    """One entry for each query."""

    rewards: list[float] = Field(description="Sequence rewards in nats, 0 or less.")
    scores: list[float] = Field(
        description="exp(reward), between 0 and 1: for OpenRLHF's dynamic filtering."
    )
    extra_logs: dict[str, list[float]]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    verifier: str
    generator: str
    max_length: int = Field(description="Tokens of prompt and response that the verifier takes.")
    version: str


class Refusal(BaseModel):
    error: str = Field(description="The kind of error, for programs.")
    detail: str = Field(description="What was expected and how to mend it, for people.")
