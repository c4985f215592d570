"""The fields of a row: the same for the command line and the server, and what goes together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cme_reward._row import BY_TOKEN, FIELDS, Row, one_of, plural, read_row
from cme_reward.conversation import messages
from cme_reward.errors import InputError

TALK = [{"role": "user", "content": "Hi"}]


def test_every_door_has_these_fields() -> None:
    models = pytest.importorskip("cme_reward.server.models")
    of_request = list(models.ScoreRequest.model_fields)
    assert of_request[: len(FIELDS)] == list(map(plural, FIELDS))
    for name, text in FIELDS.items():
        assert text in models.ScoreRequest.model_fields[plural(name)].description
    # In a row that was read, the two ways to give a prompt are one.
    assert [f.name for f in dataclasses.fields(Row)] == [n for n in FIELDS if n != "messages"]
    assert set(models.ChatMessage.model_fields) == set(messages.FIELDS)


def test_names_of_lists() -> None:
    assert [plural(name) for name in FIELDS] == [
        "prompts", "messages", "responses", "response_ids", "response_masks", "policy_logprobs",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_a_conversation_under_either_name(name: str) -> None:
    assert read_row({name: TALK, "response": "x", "other": 1}, 9) == Row(TALK, "x")


def test_what_is_null_is_missing_and_log_probs_are_read_where_they_are_used() -> None:
    fields: dict[str, Any] = {"prompt": "a", "messages": None, "response_ids": [1, -1]}
    fields |= {"response_mask": [1, 0], "policy_logprobs": [-0.5, 0]}
    row = Row("a", response_ids=[1, -1], response_mask=[True, False])
    assert read_row(fields, 9) == row
    used = dataclasses.replace(row, policy_logprobs=[-0.5, 0])
    assert read_row(fields, 9, needs_policy=True) == used
    assert read_row(fields | {"policy_logprobs": "no list"}, 9) == row


@pytest.mark.parametrize("name", BY_TOKEN)
def test_fields_by_token_need_ids(name: str) -> None:
    fields = {"prompt": "a", "response": "b", name: [1]}
    with pytest.raises(InputError, match="has a response as text; expected response_ids"):
        read_row(fields, 9, needs_policy=name == "policy_logprobs")


def test_one_of_two() -> None:
    assert one_of({"b": 0}, "a", "b") == "b"
    with pytest.raises(InputError, match=r"^got neither a nor b; expected one of the two"):
        one_of({}, "a", "b", "got")
    with pytest.raises(InputError, match=r"^has both a and b"):
        one_of(["a", "b"], "a", "b")


def test_half_a_character_anywhere_in_a_conversation() -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "\ud83e"}]}]
    with pytest.raises(InputError, match=r"prompt holds '.ud83e', half of a surrogate pair"):
        read_row({"prompt": talk, "response": "x"}, 9)
