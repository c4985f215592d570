"""Does a loaded tokenizer do what its repository's tokenizer.json does?

transformers 5 makes the tokenizer of a class anew from the vocabulary alone, with the class's own
way of splitting and joining text. Where `tokenizer_config.json` names a class of another kind than
the vocabulary, spaces and letters are lost, silently (transformers #45488, #48206).
"""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from tokenizers import Tokenizer

from cme_reward.errors import TokenizerError
from cme_reward.spans.pieces import plain_backend, require_fast
from cme_reward.spans.prose import lost_prose

_log = logging.getLogger(__name__)

# Without the names of special tokens, which are text to us and tokens to others.
PROBE = (
    "A one. Two",
    "Größe 今天 🤷🏽",
    "two\nlines\n\n\nand three more\r\nthen\ttabs\t\tand   spaces",
    " one space before, two  within, one after ",
    "The unhappiness of one, she said, isn't another's joy; why?",
    "1234567890 3.14159 2024-05-01 12*7=84 50%",
    "def f(x):\n    return {'a': x[0] ** 2}  # <b>&amp;</b> $y_1$ ~/@\\n",
    "façade, naïve, Straße; cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "今天早上下了一场大雨。すべての人間は",
    "모든 인간은 Утром мы пили чай",
    "اشتريتُ خبزًا कल शाम हम วันนี้อากาศดี",
    "👩\u200d👩\u200d👧\u200d👦 🇳🇴 ❤️\u200d🔥",
    "x² ≤ 1 – “quoted” … ﬁne ２０ \u00a0wide",
)


class Difference(NamedTuple):
    """What one piece of text is to a tokenizer, and to its tokenizer.json."""

    text: str
    ours: list[str]
    """The tokens it is made into."""
    theirs: list[str]
    comes_back: str
    """The text that `ours` write; or what is raised in place of them."""
    is_read: str
    """The text that `theirs` write, as the loaded tokenizer decodes them."""
    damaged: bool
    """One of these two is another text than the file's, by more than case or Unicode form."""


_FAITHFUL: WeakSet[Any] = WeakSet()
_TOLD: set[str] = set()


def load_faithful(name_or_path: str, **kwargs: Any) -> Any:
    """`AutoTokenizer.from_pretrained`, but never another tokenizer than the repository's.

    Where transformers makes something else of it than tokenizer.json says, that file is loaded as
    it stands, with the special tokens, chat template, lengths and sides of its configuration, and
    this is said once, through `logging`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except TypeError as error:  # a class for vocabularies of another shape, such as T5's of BPE
        if _repository_file(name_or_path) is None:
            raise
        reason = f"the class that it names does not take its vocabulary ({error})"
    else:
        found = differences(tokenizer)
        if not found:
            _FAITHFUL.add(tokenizer)
            return tokenizer
        reason = f"as {type(tokenizer).__name__}, {_shown(found)}"
    if name_or_path not in _TOLD:
        _TOLD.add(name_or_path)
        _log.warning(
            "%s: transformers does not load this tokenizer as it is: %s. Its tokenizer.json is "
            "used as it stands. Trainers and engines that load it by themselves do not do so, "
            'before its tokenizer_config.json says "tokenizer_class": "PreTrainedTokenizerFast"',
            name_or_path,
            reason,
        )
    return PreTrainedTokenizerFast.from_pretrained(name_or_path, **kwargs)


def require_faithful(tokenizer: Any, plain: Tokenizer | None = None) -> None:
    """Raise `TokenizerError` for a tokenizer that loses text, whoever loaded it.

    Compared with its repository's tokenizer.json, where it has one, and by plain English, which
    every tokenizer has to give back (see `lost_prose`). What makes other tokens of a text and loses
    none of it, as another regular expression for digits does, is warned of, since the model has
    learnt from the file's. Left alone is what is chosen: added tokens, `add_prefix_space`,
    `legacy`, padding, truncation.

    Args:
        tokenizer: of transformers, fast.
        plain: its `plain_backend`, if that is at hand.

    Raises:
        TokenizerError: naming its class, the words it damages, and the remedy.
    """
    require_fast(tokenizer)
    if plain is None:
        plain = plain_backend(tokenizer.backend_tokenizer)
    found = [] if tokenizer in _FAITHFUL else differences(tokenizer, plain)
    if any(difference.damaged for difference in found):
        raise _unfaithful(tokenizer, found)
    lost = lost_prose(plain)
    if lost is not None:
        raise TokenizerError(
            f"tokenizer {_name(tokenizer)!r} ({type(tokenizer).__name__}) does not give back "
            f"plain English: {lost}. Expected every word, and a space where there was one, but "
            "for case and Unicode form: its normalizer, pre_tokenizer or decoder does not fit its "
            f"vocabulary. {_remedy(tokenizer)}"
        )
    if found and tokenizer.name_or_path not in _TOLD:
        _TOLD.add(tokenizer.name_or_path)
        _log.warning(
            "tokenizer %r, loaded as %s, makes other tokens of a text than its tokenizer.json: %s. "
            "No text is lost, but a model that learnt from the file's tokens is asked about "
            "others. If you did not choose this: %s",
            tokenizer.name_or_path,
            type(tokenizer).__name__,
            _shown(found),
            _remedy(tokenizer),
        )


def differences(tokenizer: Any, plain: Tokenizer | None = None) -> list[Difference]:
    """The pieces of `PROBE` of which a loaded tokenizer makes something else than its file does.

    None where there is nothing to compare: no file, one of another vocabulary, a class that is
    nothing but the file, or one that comes with the repository's own code.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if kind is PreTrainedTokenizerFast or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return []
    if kind.__module__.startswith("transformers_modules."):
        return []
    path = _repository_file(tokenizer.name_or_path)
    if path is None:
        return []
    own, file = tokenizer.backend_tokenizer, Tokenizer.from_file(str(path))
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    others = {token.content for token in tokenizer.added_tokens_decoder.values()} - added
    probe = [text for text in PROBE if not any(token in text for token in others)]
    try:
        encodings = file.encode_batch(probe, add_special_tokens=False)
    except Exception:  # the library's plainest: a closed vocabulary, and no [UNK]
        return []
    ids = {i for encoding in encodings for i in encoding.ids}
    if any(own.id_to_token(i) != file.id_to_token(i) for i in ids):
        return []  # trained anew since: nothing that its class has made of this file
    if not _compare(probe, own, file):
        return []
    # A prefix at the start of a text, padding and truncation are not compared.
    return _compare(probe, plain or plain_backend(own), plain_backend(file))


def _compare(probe: list[str], own: Tokenizer, file: Tokenizer) -> list[Difference]:
    found = []
    for text in probe:
        theirs = file.encode(text, add_special_tokens=False)
        written, is_read = file.decode(theirs.ids), own.decode(theirs.ids)
        try:
            ours = own.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises no narrower one, for an [UNK] that is none
            found.append(Difference(text, [], theirs.tokens, str(error), is_read, True))
            continue
        comes_back = own.decode(ours.ids)
        if ours.ids != theirs.ids or is_read != written:
            damaged = any(_folded(read) != _folded(written) for read in (comes_back, is_read))
            found.append(Difference(text, ours.tokens, theirs.tokens, comes_back, is_read, damaged))
    return found


def _folded(text: str) -> str:
    """Without what known normalisers change: case, Unicode form and accents."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def _repository_file(name_or_path: str) -> Path | None:
    """The tokenizer.json of a folder, or of the hub's cache."""
    from transformers.utils.hub import cached_file

    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / "tokenizer.json"
        return path if path.is_file() else None
    try:
        found = cached_file(
            name_or_path,
            "tokenizer.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no name of the hub
        return None
    return None if found is None else Path(found)


def _unfaithful(tokenizer: Any, found: list[Difference]) -> TokenizerError:
    return TokenizerError(
        f"tokenizer {tokenizer.name_or_path!r} was loaded as {type(tokenizer).__name__}, which "
        f"does not do what its tokenizer.json does: {_shown(found)} (transformers #45488, #48206). "
        f"{_remedy(tokenizer)}"
    )


def _shown(found: list[Difference]) -> str:
    """The first of the damaged pieces, or of the others."""
    found = [difference for difference in found if difference.damaged] or found
    return "; ".join(map(_sentence, found[:3])) + f"; {len(found)} of {len(PROBE)} texts tried"


def _sentence(difference: Difference) -> str:
    text, ours, theirs, comes_back, is_read, damaged = difference
    if not ours:
        return f"{text!r} cannot be encoded ({comes_back})"
    if not damaged:
        return f"{text!r} becomes {_first(ours, theirs)} in place of {_first(theirs, ours)}"
    if _folded(comes_back) != _folded(text):
        return f"{text!r} becomes {comes_back!r}"
    return f"the tokens of {text!r} are read as {is_read!r}"


def _first(tokens: list[str], others: list[str]) -> list[str]:
    """A few tokens from where they differ."""
    at = next((k for k, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), 0)
    return tokens[at : at + 4]


def _remedy(tokenizer: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        return "Mend its tokenizer.json, or use another tokenizer"
    return (
        "Load it with transformers.PreTrainedTokenizerFast.from_pretrained("
        f"{_name(tokenizer) or 'PATH'!r}), or, where a trainer loads it, write "
        '"tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json'
    )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "")
