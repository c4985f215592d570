"""Named in an import of OpenRLHF's, used for packed sequences only."""

from typing import Any

from einops import rearrange as rearrange  # pyright: ignore[reportMissingImports]


def _unavailable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("flash-attn is a stand-in here: no packed sequences")


index_first_axis = pad_input = unpad_input = _unavailable
