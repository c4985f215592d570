"""A verifier's weights in CPU memory while nobody asks it anything."""

from __future__ import annotations

from typing import Any

import torch

from cme_reward.errors import ConfigError


class OffloadedWeights:
    """The weights of a frozen model: on `device` inside ``with``, in CPU memory outside.

    They are never written, so the copy in CPU memory stays valid and only the way to the device
    costs a transfer; that copy is page-locked for CUDA devices, which makes the transfer faster.
    Where the device has no room for all of them, none stays there, and the error is raised.
    Buffers, which are small, stay on the device.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        if getattr(model, "hf_device_map", None) or getattr(model, "hf_quantizer", None):
            raise ConfigError(
                "offload='between_calls' moves plain weights of one device, and this model has a "
                "device_map or quantised weights: leave out one of the two"
            )
        self.device = device
        self.weights = list(model.parameters())
        self.at_rest = [self._to_rest(weight.data) for weight in self.weights]
        self.__exit__()

    def __enter__(self) -> None:
        try:
            for weight, at_rest in zip(self.weights, self.at_rest, strict=True):
                weight.data = self._to_device(at_rest)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: Any) -> None:
        for weight, at_rest in zip(self.weights, self.at_rest, strict=True):
            weight.data = at_rest
        if self.device.type == "cuda":
            # Else torch keeps the memory, and a generator in another process cannot have it.
            torch.cuda.empty_cache()

    def _to_rest(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.cpu()
        return weight.pin_memory() if self.device.type == "cuda" else weight

    def _to_device(self, at_rest: torch.Tensor) -> torch.Tensor:
        return at_rest.to(self.device, non_blocking=True)
