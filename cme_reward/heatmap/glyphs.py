"""How a token's text is made visible: white space, bytes and controls as glyphs and chips."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_SPECIAL = re.compile(
    r"<\|[^<>|]+\|>|<\uff5c[^<>]+\uff5c>|</?s>|<(?:[a-z]+_of_turn|bos|eos|pad|unk)>"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Controls, bidirectional overrides and invisible format characters could hide or reorder text.
_CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f"
)
_SEGMENTS = re.compile(
    f"(?P<newline>\n)|(?P<tab>\t)|(?P<bytes>[\udc80-\udcff]+)|(?P<lost>\ufffd+)"
    f"|(?P<control>[{_CONTROLS}])|(?P<spaces> {{2,}})|(?P<text>(?:(?!  )[^\n\t\ufffd{_CONTROLS}])+)"
)


def _byte(match: re.Match[str]) -> str:
    return bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape")


def with_characters(tokens: Sequence[str]) -> Iterator[str]:
    """Write a character that is split over tokens once more, after the byte that completes it."""
    pending = b""
    for token in tokens:
        token = _BYTE_TOKEN.sub(_byte, token)
        if token.isascii():
            pending = b""
            yield token
            continue
        shown = ""
        for character in token:
            shown += character
            if not "\udc80" <= character <= "\udcff":
                pending = b""
                continue
            byte = ord(character) - 0xDC00
            pending = bytes([byte]) if byte >= 0xC0 else pending + bytes([byte])
            try:
                shown += pending.decode()
                pending = b""
            except UnicodeDecodeError:
                continue
        yield shown


def segments(token: str) -> Iterator[tuple[str, str]]:
    """Cut a token's text into (kind, what is shown of it); the kinds are the group names of
    `_SEGMENTS`, "special" and "empty". What has no glyph is shown by its name: bytes as `F0 9F`,
    a control as `U+200B`, a character that is lost as `byte`."""
    if _SPECIAL.fullmatch(token):
        yield "special", token
    elif not token:
        yield "empty", "∅"
    else:
        for match in _SEGMENTS.finditer(token):
            kind, text = match.lastgroup or "text", match[0]
            if kind == "bytes":
                text = " ".join(f"{ord(c) - 0xDC00:02X}" for c in text)
            elif kind == "control":
                text = f"U+{ord(text):04X}"
            elif kind == "lost":
                text = "byte"
            yield kind, text


def segment_terminal(kind: str, text: str) -> str:
    if kind in ("bytes", "lost", "control"):
        return f"⟨{text}⟩"
    return {"newline": "↵\n", "tab": "⇥\t"}.get(kind, text)


def plain_terminal(text: str) -> str:
    return re.sub(f"[{_CONTROLS}]", "\ufffd", text)
