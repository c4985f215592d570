"""One verifier for all rollout processes of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.openrlhf.settings import Settings
from cme_reward.verifiers import Ensemble, Verifier, load_verifier, split_spec
from cme_reward.verifiers.base import TokenIds
from cme_reward.verifiers.shared import shared

SERVERS = ("vllm", "sglang")


def open_verifier(settings: Settings) -> Verifier | Ensemble:
    """The verifier that the settings name, loaded at most once per run unless they say otherwise.

    Servers are asked from this process. A model with weights is asked through the Ray actor that
    the first process to come here starts, or is loaded here where Ray is not in use.

    Raises:
        VerifierError: if it does not load, or Ray finds no place for its actor in time.
    """
    members = [_open(part, settings) for part in split_spec(settings.verifier)]
    return members[0] if len(members) == 1 else Ensemble(members)


def _open(spec: str, settings: Settings) -> Verifier:
    options = dict(settings.verifier_options)
    if spec.partition(":")[0] in SERVERS:
        return _single(spec, options)
    if settings.verifier_placement == "shared" and _in_ray():
        return SharedVerifier(spec, options, settings.verifier_gpus, settings.verifier_wait)
    return shared(_single(spec, options))


def _single(spec: str, options: dict[str, Any]) -> Verifier:
    verifier = load_verifier(spec, **options)
    assert not isinstance(verifier, Ensemble)  # a spec without +
    return verifier


def _in_ray() -> bool:
    try:
        import ray  # type: ignore
    except ModuleNotFoundError:
        return False
    return ray.is_initialized()


class VerifierHost:
    """What runs in the shared Ray actor: one verifier, the calls of all processes merged."""

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self.verifier = shared(_single(spec, options))

    async def facts(self) -> dict[str, Any]:
        """What a caller has to know to ask."""
        names = ("name", "tokenizer", "max_length", "vocab_size")
        return {name: getattr(self.verifier, name) for name in names}

    async def logprobs(self, prompts: list[TokenIds], responses: list[TokenIds]) -> Any:
        """See `Verifier.logprobs`."""
        return await self.verifier.logprobs_async(prompts, responses)


class SharedVerifier:
    """A `Verifier` that asks the run's `VerifierHost`, starting it if nobody has.

    Args:
        spec: see `load_verifier`; the processes that give the same spec and options share a host.
        options: keywords of `load_verifier`.
        gpus: of the host's actor. None: 1 where Ray has GPUs, else 0.
        wait: most seconds to be placed and to load.

    Raises:
        VerifierError: if the host is not there in time, or its verifier does not load.
    """

    def __init__(self, spec: str, options: dict[str, Any], gpus: float | None, wait: float) -> None:
        import ray  # type: ignore
        from ray.util.scheduling_strategies import (  # type: ignore
            PlacementGroupSchedulingStrategy,
        )

        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]
        host = ray.remote(VerifierHost).options(
            name=f"cme-verifier {spec} {digest}",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=gpus,
            # Not in the caller's: an engine's placement group has room for the engine alone.
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
        )
        self._host: Any = host.remote(spec, options)
        facts = self._host.facts.remote()
        try:
            known = ray.get(facts, timeout=wait)
        except ray.exceptions.GetTimeoutError as error:
            # A process that still waits for an answer cannot end, and Ray would not say that it
            # failed: everyone else would wait, too.
            ray.kill(self._host)
            raise VerifierError(
                f"the shared verifier {spec!r} was not ready after {wait:g} s. It asks Ray for "
                f"{gpus:g} GPUs, of {ray.cluster_resources().get('GPU', 0):g} in all and "
                f"{ray.available_resources().get('GPU', 0):g} free now: leave one to it, set "
                "CME_VERIFIER_GPUS (0: run on the CPU), raise CME_VERIFIER_WAIT if it is still "
                "loading, or serve it outside (CME_VERIFIER=vllm:http://...)"
            ) from error
        except ray.exceptions.RayError as error:
            raise VerifierError(f"the shared verifier {spec!r} did not load: {error}") from error
        self.name: str = known["name"]
        self.tokenizer: Any = known["tokenizer"]
        self.max_length: int = known["max_length"]
        self.vocab_size: int = known["vocab_size"]

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """See `Verifier.logprobs`."""
        import ray  # type: ignore

        try:
            return ray.get(self._host.logprobs.remote(list(prompts), list(responses)))
        except ray.exceptions.RayActorError as error:
            raise self._gone() from error

    async def logprobs_async(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """`logprobs` without blocking the event loop."""
        import ray  # type: ignore

        try:
            return await self._host.logprobs.remote(list(prompts), list(responses))
        except ray.exceptions.RayActorError as error:
            raise self._gone() from error

    def close(self) -> None:
        """Nothing: the host serves others too, and ends with the run."""

    def _gone(self) -> VerifierError:
        return VerifierError(
            f"the shared verifier {self.name!r} has died; its process ran out of memory, or its "
            "log in Ray's dashboard says why"
        )
