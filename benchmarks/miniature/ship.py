"""The demo's two models as files: `python -m benchmarks.miniature.ship FOLDER` makes them again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.miniature.cast import Cast, Scale
from benchmarks.miniature.conditions import STRONGEST

FOLDER = Path(__file__).parent / "trained"
NAMES = ("pretrained", STRONGEST)


def ship(folder: Path, scale: Scale = Scale()) -> None:  # noqa: B008 (frozen)
    """Train the models from seed 0 and write them in half precision, as a `Cast` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as full:
        cast = Cast(Path(full), scale)
        for name in NAMES:
            cast.model(name)
        for file in Path(full).iterdir():
            weights = {key: value.half() for key, value in load_file(file).items()}
            save_file(weights, folder / file.name, metadata={"format": "pt"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    ship(Path(sys.argv[1]))
