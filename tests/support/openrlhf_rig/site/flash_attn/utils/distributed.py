from typing import Any


def all_gather(*_: Any, **__: Any) -> Any:
    raise RuntimeError("flash-attn is a stand-in here")
