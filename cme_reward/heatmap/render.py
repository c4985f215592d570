"""Pictures of token rewards: the heat map of responses, as one HTML file or in the terminal.

Every token is shaded by its surprise, `-log p` in nats (the token-level view of Figure 1 of
arXiv 2605.29009). The steps of the scale are fixed, so two reports can be compared by eye.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from cme_reward.errors import InputError
from cme_reward.heatmap.glyphs import (
    plain_terminal,
    segment_terminal,
    segments,
    with_characters,
)
from cme_reward.heatmap.pages import template

if TYPE_CHECKING:
    import jinja2
    from rich.console import Console

# Surprise in nats at which the next of the 12 steps begins: fine where text is predictable,
# coarse in the tail (10 nats: 1 in 22,000).
EDGES = (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
# One hue (OKLCH 272 degrees) in even steps of lightness away from the page, whichever that is;
# black or white on any of them has a contrast of at least 4.5 (WCAG AA).
LIGHT = (
    "#ffffff", "#dfe6ff", "#c3d1ff", "#a8bbfe", "#8ea4fe", "#798fef",
    "#667bdd", "#5568c8", "#4556af", "#374694", "#2b3677", "#1f2859",
)  # fmt: skip
DARK = (
    "#15171c", "#1e2753", "#2a366f", "#38468a", "#4758a4", "#586abc",
    "#6a7ed2", "#7e92e5", "#93a8f5", "#acbefe", "#c7d4ff", "#e5ebfe",
)  # fmt: skip
STEP_CLASSES = "abcdefghijkl"
BOLD_STEP = bisect_right(EDGES, 3.0)
# An aligned log-prob is a difference of sums, so certainty can come out a rounding error above 0.
ROUNDING = 1e-6
# Browsers stay quick with this many token elements; the rest waits as inert text until opened.
OPEN_TOKENS = 40_000
OPEN_PROMPTS = 4


@dataclass(frozen=True)
class TokenView:
    """One tokenisation of one response: three lists with one entry per token."""

    tokens: Sequence[str]
    """Text of each token. Bytes of a character that is split over tokens are shown as bytes if
    given as `bytes.decode("utf-8", "surrogateescape")` or as `<0xE2>`."""
    logprobs: Sequence[float]
    """Log-prob in nats; above 0 only where the reward has a policy baseline."""
    mask: Sequence[bool]
    """False: this token is not scored."""

    def __post_init__(self) -> None:
        sizes = len(self.tokens), len(self.logprobs), len(self.mask)
        if len(set(sizes)) > 1:
            raise InputError(
                "tokens, logprobs and mask have {}, {} and {} entries; expected one of each per "
                "token".format(*sizes)
            )
        for position, value in enumerate(self.logprobs):
            if not math.isfinite(value):
                raise InputError(
                    f"log-prob of token {position} ({self.tokens[position]!a}) is {value}; "
                    "expected a finite number of nats; for none give 0.0 with mask False"
                )


@dataclass(frozen=True)
class ResponseView:
    """One response to one prompt, its sequence reward in nats, and one or two tokenisations."""

    prompt: str
    label: str
    sequence_reward: float
    generator: TokenView
    verifier: TokenView | None = None
    dropped_nats: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sequence_reward", "dropped_nats"):
            if not math.isfinite(value := getattr(self, name)):
                raise InputError(
                    f"{name} of response {self.label!a} is {value}; expected finite nats"
                )


def colour_step(logprob: float) -> int:
    """Step of a log-prob in nats: 0 (expected, also anything above 0) to 11 (very surprising)."""
    return bisect_right(EDGES, -logprob)


def text_colour(background: str) -> str:
    """Black or white, whichever contrasts more with a `#rrggbb` background (WCAG 2.2)."""
    channels = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0b0e14" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def render_html(
    responses: Sequence[ResponseView],
    *,
    title: str,
    verifier_name: str = "",
    generator_name: str = "",
    above: str = "",
    in_order: bool = False,
) -> str:
    """The heat map as one HTML page that needs no network, for light and dark screens.

    Responses to one prompt stand side by side, highest sequence reward first, or `in_order` as
    they come. Names that are not given are not shown. Where any response
    has verifier tokens, a switch turns the whole page from one tokenisation to the other. All
    text is escaped, and a content security policy allows no script but the page's own. Without
    responses the page says so. `above` is HTML that stands before them as it is, escaped by who
    made it. Raises nothing: the views have checked their numbers.
    """
    views = [v for r in responses for v in (r.generator, r.verifier) if v is not None]
    return _template().render(
        title=title,
        verifier_name=verifier_name,
        generator_name=generator_name,
        above=above,
        prompts=_prompts(responses, in_order),
        has_verifier=any(response.verifier for response in responses),
        # A log-prob is never above 0: then a baseline was subtracted, and exp() is no probability.
        is_ratio=any(
            value > ROUNDING and scored
            for view in views
            for value, scored in zip(view.logprobs, view.mask, strict=True)
        ),
        scale=[
            (step, edge, _percent(math.exp(-edge)))
            for step, edge in zip(STEP_CLASSES, (0.0, *EDGES), strict=True)
        ],
        light=_palette(LIGHT),
        dark=_palette(DARK),
    )


def print_heat_map(
    response: ResponseView,
    console: Console | None = None,
    *,
    view: Literal["generator", "verifier"] = "generator",
) -> None:
    """Print one response shaded by surprise, after its prompt, its numbers and the scale.

    Works on any terminal: without colours the text remains, and tokens from 3 nats on are bold
    where the terminal has bold. Control characters are printed as escapes, never sent. Raises
    InputError for an unknown view, or for "verifier" where the response has no verifier tokens.
    """
    import rich.console
    from rich.text import Text

    if view not in ("generator", "verifier"):
        raise InputError(f"view is {view!r}; expected 'generator' or 'verifier'")
    tokens = getattr(response, view)
    if tokens is None:
        raise InputError(f"response {response.label!a} has no verifier view; use view='generator'")
    console = console or rich.console.Console()
    is_light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    styles = [
        f"{'bold ' * (step >= BOLD_STEP)}{text_colour(colour)} on {colour}" if step else ""
        for step, colour in enumerate(LIGHT if is_light else DARK)
    ]
    console.print(Text(plain_terminal(response.prompt), style="dim"))
    head = Text(plain_terminal(response.label), style="bold")
    head.append(f"  {_nats(response.sequence_reward)} nats per token", style="bold")
    head.append("  " + _counts(tokens, response.dropped_nats), style="not bold")
    console.print(head)
    scale = Text("surprise in nats, from: ")
    for edge, style in zip((0.0, *EDGES), styles, strict=True):
        scale.append(f" {edge:g} ", style=style)
    console.print(scale.append("  ").append("not scored", style="dim underline"))
    body = Text()
    for text, value, scored in _rows(tokens):
        shown = "".join(segment_terminal(*segment) for segment in segments(text))
        body.append(shown, style=styles[colour_step(value)] if scored else "dim underline")
    console.print(body if tokens.tokens else Text("empty response", style="dim"))


def _size(response: ResponseView) -> int:
    verifier = response.verifier
    return len(response.generator.tokens) + (len(verifier.tokens) if verifier else 0)


def _rows(view: TokenView) -> Iterator[tuple[str, float, bool]]:
    return zip(with_characters(view.tokens), view.logprobs, view.mask, strict=True)


@cache
def _template() -> jinja2.Template:
    """The page, compiled once."""
    return template(
        "cme_reward.heatmap",
        counts=_counts,
        nats=_nats,
        plain=plain_terminal,
        sha256=_sha256,
        tokens=_tokens,
    )


@dataclass(frozen=True)
class _Prompt:
    """The responses to one prompt, in parts of which only the first may be open at once."""

    text: str
    count: int
    parts: list[list[ResponseView]]
    is_open: bool


def _prompts(responses: Sequence[ResponseView], in_order: bool) -> list[_Prompt]:
    by_prompt: dict[str, list[ResponseView]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt, []).append(response)
    prompts, used = [], 0
    for number, (text, group) in enumerate(by_prompt.items(), 1):
        if not in_order:
            group.sort(key=lambda response: -response.sequence_reward)
        used += sum(map(_size, group))
        is_open = number == 1 or (number <= OPEN_PROMPTS and used <= OPEN_TOKENS)
        prompts.append(_Prompt(text, len(group), _parts(group), is_open))
    return prompts


def _parts(group: list[ResponseView]) -> list[list[ResponseView]]:
    parts, room = [], 0
    for response in group:
        if not parts or room < _size(response):
            parts.append([])
            room = OPEN_TOKENS
        parts[-1].append(response)
        room -= _size(response)
    return parts


_segments = lru_cache(maxsize=1 << 16)(lambda token: tuple(segments(token)))


def _tokens(view: TokenView) -> Iterator[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """Of each token its class (`m`: masked), its nats or why it is masked, and its segments."""
    for token, value, scored in _rows(view):
        if scored:
            step = "p" if value > ROUNDING else STEP_CLASSES[colour_step(value)]
            yield step, f"{value:.3f}", _segments(token)
        else:
            yield "m", _mask_reason(token), _segments(token)


def _mask_reason(token: str) -> str:
    """Why a token is probably masked, as far as its text tells: a key of the page's own table."""
    kinds = {kind for kind, _ in _segments(token)}
    if kinds & {"special", "empty"}:
        return "special"
    return "part" if kinds & {"bytes", "lost"} else "other" if token.strip() else "blank"


def _palette(colours: Sequence[str]) -> list[tuple[str, str, str]]:
    pairs = zip(STEP_CLASSES[1:], colours[1:], strict=True)
    return [(step, colour, text_colour(colour)) for step, colour in pairs]


def _sha256(script: str) -> str:
    """What a content security policy calls a script by."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _nats(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(probability: float) -> str:
    digits = 0 if probability >= 0.01 else 1 - math.ceil(math.log10(100 * probability))
    return f"{100 * probability:.{digits}f}%"


def _counts(view: TokenView, dropped_nats: float) -> str:
    masked = len(view.mask) - sum(map(bool, view.mask))
    tokens = f"{len(view.tokens):,} token{'s' * (len(view.tokens) != 1)}"
    return f"{tokens} · {masked:,} not scored · {_nats(dropped_nats, 2)} nats dropped"
