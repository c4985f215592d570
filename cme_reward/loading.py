"""Names of tokenizers, and of things in modules, as the objects they stand for."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from cme_reward.errors import TokenizerError


def silence() -> None:
    """Keep what transformers says about its own loading out of the way, and not what we do."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore")
    assert logging.lastResort is not None
    logging.getLogger("cme_reward").addHandler(logging.lastResort)  # to standard error


def said(error: BaseException) -> str:
    """What an error of a dependency says, in one paragraph."""
    return " ".join(str(error).split()) or type(error).__name__


def of_module(where: str) -> Any:
    """What `MODULE:NAME` is, of a module in the working directory or installed.

    Raises:
        ImportError: where there is none, or the module's own code fails; says which.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise ImportError(f"{where!r} is no MODULE:NAME")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(said(error)) from error
    except Exception as error:
        raise ImportError(f"{type(error).__name__}: {said(error)}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a name on the hub, a directory, or a verifier spec; no weights are loaded.

    Raises:
        TokenizerError: if there is none, or for a spec of several verifiers.
    """
    import cme_reward.verifiers
    from cme_reward.spans.fidelity import load_faithful

    if not Path(name).exists() and len(cme_reward.verifiers.split_spec(name)) > 1:
        raise TokenizerError(
            f"{name!r} names several verifiers; expected one, since each has a tokenizer of its own"
        )
    kind, _, rest = name.partition(":")
    if kind in ("vllm", "sglang"):
        raise TokenizerError(
            f"{name!r} is a server, and its tokenizer is that of the model it runs; expected that "
            "model's name or directory, such as google/gemma-3-1b-it"
        )
    if kind == "python" and not Path(name).exists():
        raise TokenizerError(
            f"{name!r} is a verifier of your own; expected the name or directory of its tokenizer"
        )
    where = rest if kind in ("hf", "random") and rest else name
    if name == "embedded" and not Path(name).exists():
        where = str(Path(cme_reward.verifiers.__file__).parent / "embedded")
    try:
        return load_faithful(where, trust_remote_code=False)
    except Exception as error:  # of many kinds, for an unknown name, no network, a broken file
        raise TokenizerError(
            f"cannot load the tokenizer {name!r}: expected a directory with a tokenizer.json, the "
            "name of a model on the hub (check the spelling, the network and HF_TOKEN), or "
            f"embedded. transformers says: {said(error)}"
        ) from error
