"""Which prompts are the same."""

from __future__ import annotations

from cme_reward._keys import prompt_key


def test_the_order_counts_where_a_template_writes_it() -> None:
    message = {"content": "hi", "role": "user"}
    assert prompt_key([message]) == prompt_key([dict(reversed(message.items()))])
    called, other = (
        [{"tool_calls": [{"arguments": arguments}]}]
        for arguments in ({"x": 1, "y": 2}, {"y": 2, "x": 1})
    )
    assert prompt_key(called) != prompt_key(other)
