"""The heat map of responses: structure, escaping, colours, sizes, and the terminal."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cme_reward.errors import InputError
from cme_reward.heatmap import glyphs, render
from cme_reward.heatmap.render import (
    ResponseView,
    TokenView,
    colour_step,
    print_heat_map,
    render_html,
)

NAMES: dict[str, Any] = {"title": "Demo", "verifier_name": "reader", "generator_name": "writer"}


class Page(HTMLParser):
    """What a browser would see: elements in order, token texts, and the bodies of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "i":
            self.tokens.append("")
        if tag == "script":
            self.scripts.append("")
        if tag in ("i", "script"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data):
        if self.inside == "i":
            self.tokens[-1] += data
        elif self.inside == "script":
            self.scripts[-1] += data

    def count(self, tag: str, **attributes: str | None) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def view(*rows: tuple[Any, ...]) -> TokenView:
    """Rows of (token, log-prob) or (token, log-prob, is scored)."""
    return TokenView([r[0] for r in rows], [r[1] for r in rows], [all(r[2:]) for r in rows])


def response(
    generator: TokenView, verifier: TokenView | None = None, **kwargs: Any
) -> ResponseView:
    defaults: dict[str, Any] = {"prompt": "Add.", "label": "Rollout 1", "sequence_reward": -0.5}
    return ResponseView(**(defaults | kwargs), generator=generator, verifier=verifier)


def tokens_html(*rows: tuple[Any, ...]) -> str:
    page = render_html([response(view(*rows))], **NAMES)
    return page.partition("aria-label=")[2].partition(">")[2].partition("</div>")[0]


def printed(shown: ResponseView, which: Any = "generator", **kwargs: Any) -> str:
    out = io.StringIO()
    print_heat_map(shown, Console(file=out, width=100, **kwargs), view=which)
    return out.getvalue()


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio, written out for the test."""

    def luminance(colour: str) -> float:
        total = 0.0
        for weight, start in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
            c = int(colour[start : start + 2], 16) / 255
            total += weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        return total

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_step_grows_with_surprise():
    # -ln 0.95 = 0.051 is below the first edge, -ln 0.5 = 0.69 between 0.6 and 1,
    # 3.0 is itself an edge (the seventh), 50 is past the last.
    assert [colour_step(v) for v in (0.0, -0.051, -0.69, -3.0, -50.0)] == [0, 0, 3, 7, 11]
    assert [colour_step(v) for v in (0.5, 1e-12)] == [0, 0]
    steps = [colour_step(-nats / 50) for nats in range(700)]
    assert steps == sorted(steps)
    assert set(steps) == set(range(12)) == set(range(len(render.STEP_CLASSES)))


@pytest.mark.parametrize("palette", [render.LIGHT, render.DARK], ids=["light", "dark"])
def test_palette_is_readable_and_even(palette):
    assert len(palette) == 12
    page = palette[0]
    assert all(contrast(colour, render.text_colour(colour)) >= 4.5 for colour in palette)
    distance = [contrast(colour, page) for colour in palette]
    assert distance == sorted(set(distance))


def test_page_structure():
    both = view(("2", -0.2), ("4", -1.7))
    page = Page(
        render_html(
            [
                response(both, both, label="low", sequence_reward=-2.0),
                response(both, None, prompt="Other"),
                response(both, both, label="high", sequence_reward=-1.0, dropped_nats=0.25),
            ],
            **NAMES,
        )
    )
    assert page.count("details") == 2
    assert page.count("article") == 3
    assert page.count("body", **{"data-views": "two", "data-kind": "logprob"}) == 1
    assert page.count("input", type="radio") == 2
    assert page.count("i", **{"data-v": "-1.700"}) == 5  # three responses, two of them twice
    assert page.count("link") == page.count("img") == 0


def test_best_reward_first_within_a_prompt():
    one = view(("a", -1.0))
    rewards = {"worst": -3.0, "best": -0.1, "middle": -1.0}
    page = render_html(
        [response(one, label=k, sequence_reward=v, dropped_nats=0.25) for k, v in rewards.items()],
        **NAMES,
    )
    assert re.findall(r"<h3[^>]*>(\w+)", page) == ["best", "middle", "worst"]
    assert "<b>\N{MINUS SIGN}0.100</b> nats per token" in page
    assert "1 token · 0 not scored · 0.25 nats dropped" in page


def test_switch_only_with_verifier_tokens():
    one = view(("a", -1.0))
    assert 'data-views="one"' in render_html([response(one)], **NAMES)
    assert 'data-views="two"' in render_html([response(one, one)], **NAMES)
    mixed = render_html([response(one, one), response(one)], **NAMES)
    assert mixed.count("No verifier tokens were recorded.") == 1


def test_nothing_is_loaded_or_run_but_the_own_script():
    page = render_html([response(view(("a", -1.0)))], **NAMES)
    own = Page(page).scripts[-1]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert "default-src 'none'" in page
    assert f"script-src 'sha256-{digest}'" in page
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc=|\bhref=", page)


EVIL = "</script><script>alert(1)</script><!-- \"' onload=x <img src=x onerror=y> {{ title }} {#"


@pytest.mark.parametrize("is_open", [True, False])
def test_user_text_is_inert(monkeypatch, is_open):
    if not is_open:
        monkeypatch.setattr(render, "OPEN_PROMPTS", 0)
    tokens = view((EVIL, -1.0), ("</script>", -9.0), ("<script>", 0.0, False))
    first, shown = response(view(("a", 0.0))), response(tokens, tokens, prompt=EVIL, label=EVIL)
    names: dict[str, Any] = {"title": EVIL, "verifier_name": EVIL, "generator_name": EVIL}
    page = Page(render_html([first, shown], **names))
    assert page.count("img") == 0
    assert page.count("script") == (1 if is_open else 2)
    if not is_open:
        assert page.count("script", type="text/html") == 1
        page = Page(page.scripts[0])
        assert page.count("script") == page.count("img") == 0
    assert page.tokens[-3:] == [EVIL, "</script>", "<script>"]


PLAIN_TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cf", "Cn", "Zl", "Zp"), exclude_characters="�")
    | st.sampled_from("<>&\"'\n\t  "),
    min_size=1,
).filter(lambda s: not glyphs._SPECIAL.fullmatch(s) and not glyphs._BYTE_TOKEN.fullmatch(s))


@given(st.lists(PLAIN_TEXT, min_size=1, max_size=5))
def test_copied_text_is_the_text(tokens):
    assert Page(tokens_html(*((token, -1.0) for token in tokens))).tokens == tokens


def test_whitespace_and_special_tokens_are_visible():
    assert tokens_html(("a\n\n", -1.0)) == "<i class=e data-v=-1.000>a<u></u>\n<u></u>\n</i>"
    assert tokens_html(("\tx", -1.0)) == "<i class=e data-v=-1.000><b></b>\tx</i>"
    assert "<s>     </s>if" in tokens_html(("     if", -1.0))
    assert "<kbd>&lt;|im_end|&gt;</kbd>" in tokens_html(("<|im_end|>", -1.0))
    assert "<kbd>&lt;end_of_turn&gt;</kbd>" in tokens_html(("<end_of_turn>", -1.0))
    assert "<kbd>" not in tokens_html(("<div>", -1.0))


def test_bytes_of_a_character_become_chips_and_then_the_character():
    # U+1F319 is F0 9F 8C 99 in UTF-8, here as 2 + 1 + 1 bytes, then in SentencePiece's writing.
    moon = "\U0001f319"
    raw = [b.decode("utf-8", "surrogateescape") for b in (b"\xf0\x9f", b"\x8c", b"\x99")]
    shown = "<var>F0 9F</var>", "<var>8C</var>", f"<var>99</var>{moon}"
    page = tokens_html(*((token, -1.0) for token in raw))
    assert re.findall(r">(<var>.*?)</i>", page) == list(shown)
    page = tokens_html(*((f"<0x{byte:02X}>", -1.0) for byte in moon.encode()))
    assert page.endswith(f"<var>99</var>{moon}</i>")
    assert tokens_html(("<0x0A>", -1.0)) == tokens_html(("\n", -1.0))
    assert "<var>byte</var>" in tokens_html(("\ufffd", -1.0))
    # A byte that fits nowhere does not stop the next character from being completed.
    assert "<var>A9</var>é" in tokens_html(("\udcff\udcc3", -1.0), ("\udca9", -1.0))


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\r", "\u202e", "\u2066", "\ufeff", "\ud83d", "\U000e0041"]
)
def test_hidden_characters_are_named_and_never_sent(character):
    shown = response(view((f"a{character}b", -1.0)), prompt=character, label=character)
    name = f"U+{ord(character):04X}"
    page = render_html([shown], **NAMES)
    assert character not in page
    assert f"<var>{name}</var>" in page
    page.encode()
    assert name in (text := printed(shown))
    assert character not in text


def test_masked_tokens_have_a_reason_and_no_number():
    masked = [" \n", "<eos>", "", "x", "\udcf0"]
    page = Page(tokens_html(*((token, -5.0, False) for token in masked)))
    reasons = [attributes["data-m"] for tag, attributes in page.elements if tag == "i"]
    assert reasons == ["blank", "special", "special", "other", "part"]
    assert all("data-v" not in attributes for _, attributes in page.elements)


def test_positive_values_are_marked_as_differences():
    page = render_html([response(view(("a", 0.75), ("b", -0.75)))], **NAMES)
    assert "<i class=p data-v=0.750>a</i>" in page
    assert 'data-kind="ratio"' in page
    # A rounding error above 0 and a positive value that is masked are no baseline.
    page = render_html([response(view(("a", 1e-12), ("b", 0.75, False)))], **NAMES)
    assert 'data-kind="logprob"' in page
    assert "<i class=a data-v=0.000>a</i>" in page


def test_empty_inputs():
    page = render_html([response(view(), view())], **NAMES)
    assert page.count("Empty response.") == 2
    assert "0 tokens · 0 not scored" in page
    assert "No responses." in render_html([], **NAMES)
    assert "empty response" in printed(response(view()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(value):
    with pytest.raises(InputError, match=rf"token 1 \('b'\) is {value}; expected a finite number"):
        view(("a", -1.0), ("b", value))
    with pytest.raises(InputError, match=rf"sequence_reward of response 'Rollout 1' is {value}"):
        response(view(), sequence_reward=value)
    with pytest.raises(InputError, match="dropped_nats"):
        response(view(), dropped_nats=value)


def test_lists_must_be_equally_long():
    with pytest.raises(InputError, match="2, 1 and 2 entries; expected one of each per token"):
        TokenView(["a", "b"], [-1.0], [True, True])


@pytest.mark.slow
def test_page_stays_small_and_later_prompts_wait():
    many = view(*((" token", -0.5),) * 1000)
    responses = [response(many, many, prompt=f"p{i // 8}") for i in range(80)]
    page = render_html(responses, **NAMES)
    assert page == render_html(responses, **NAMES)
    assert len(page) < 36 * 160_000 + 40_000  # " token" and at most 30 characters of markup
    parsed = Page(page)
    # 8 responses are 16,000 tokens: two prompts fit into 40,000, the others wait.
    assert parsed.count("details", open=None) == 2
    assert parsed.count("script", type="text/html") == 8
    assert parsed.count("article") == 16


@pytest.mark.slow
def test_one_crowded_prompt_is_cut_into_parts():
    many = view(*((" token", -0.5),) * 1000)
    page = render_html([response(many) for _ in range(100)], **NAMES)
    parsed = Page(page)
    assert parsed.count("article") == 40
    assert re.findall(r"<summary>(\d+) more", page) == ["40", "20"]
    assert sum(script.count("<article>") for script in parsed.scripts[:-1]) == 60


def test_terminal_without_colour_keeps_text_and_header():
    shown = response(view(("The", -0.1), (" [b]moon[/b]", -6.0), ("\n", 0.0, False)))
    lines = printed(shown, no_color=True).splitlines()
    assert lines[0] == "Add."
    assert lines[1].startswith("Rollout 1  \N{MINUS SIGN}0.500 nats per token  3 tokens · 1 not")
    assert "not scored" in lines[2]
    assert lines[3] == "The [b]moon[/b]↵"


def test_terminal_shades_by_surprise(monkeypatch):
    shown = response(view(("calm", -0.01), (" odd", -20.0)), view(("v", -1.0)))
    colour = {"force_terminal": True, "color_system": "truecolor"}
    monkeypatch.delenv("COLORFGBG", raising=False)
    # The last dark step, #e5ebfe, is 229;235;254.
    dark = printed(shown, **colour).splitlines()[3]
    assert dark.startswith("calm\x1b[1;")
    assert "48;2;229;235;254m odd" in dark
    monkeypatch.setenv("COLORFGBG", "0;15")
    # The last light step, #1f2859, is 31;40;89.
    assert "48;2;31;40;89m odd" in printed(shown, **colour)
    assert "odd" not in printed(shown, "verifier")


def test_terminal_view_must_exist():
    with pytest.raises(InputError, match="'both'; expected 'generator' or 'verifier'"):
        printed(response(view()), "both")
    with pytest.raises(InputError, match="'Rollout 1' has no verifier view"):
        printed(response(view()), "verifier")
