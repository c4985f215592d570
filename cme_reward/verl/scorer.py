"""The verifier's place in a veRL run: one named Ray actor that all reward workers ask."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cme_reward.conversation.messages import Prompt
from cme_reward.curves.samples import Kept, Picked, of_batch
from cme_reward.errors import CMEError, ConfigError, VerifierError
from cme_reward.reward import CrossModelEntropy
from cme_reward.verifiers import Ensemble, Verifier, load_verifier
from cme_reward.verifiers.shared import shared
from cme_reward.verl.channel import write_rewards
from cme_reward.verl.metrics import BusyClock, Tally
from cme_reward.verl.outputs import digest
from cme_reward.verl.settings import RewardSettings

NAME = "cme_reward_scorer"


@dataclass
class Request:
    """A response to score, after what a trajectory's earlier outputs put between it and the prompt.

    All lists are of the same length: context first, then the response.
    """

    prompt: Prompt
    ids: list[int]
    mask: list[int]
    """1 for sampled tokens."""
    start: int = 0
    """Where the response begins: tokens before it are scored elsewhere."""
    policy_logprobs: list[float] | None = None
    validate: bool = False


class Scorer:
    """`CrossModelEntropy` for single responses, with the metrics of all of them.

    Args:
        config: veRL's whole configuration.
        router_address: of the verifier that veRL hosts, if it does.
    """

    def __init__(self, config: Mapping[str, Any], router_address: str | None = None) -> None:
        settings = RewardSettings.from_config(config)
        self._clock = BusyClock()
        verifier = shared(
            open_verifier(settings, config, router_address),
            observe=lambda _: self._clock.running(),
            max_batch_tokens=settings.max_batch_tokens,
        )
        tokenizer, stops = _generator(config)
        given = config["data"].get("apply_chat_template_kwargs") or {}
        self._cme = CrossModelEntropy(
            verifier,
            tokenizer,
            settings.cme,
            eos_token_ids=stops,
            generator_template_kwargs=dict(given),
            padded_vocabulary=True,
        )
        self._tallies = {False: Tally(), True: Tally()}
        self._picked = {validate: Picked(settings.samples) for validate in (False, True)}
        self._failure: str | None = None

    async def ready(self) -> str:
        """The verifier's name."""
        return self._cme.verifier.name

    async def score(self, request: Request) -> dict[str, Any]:
        """Rewards `[T]` of the response (see `write_rewards`), its sequence reward and metrics."""
        try:
            return await self._score(request)
        except CMEError as error:
            self._failure = str(error)
            raise

    async def _score(self, request: Request) -> dict[str, Any]:
        mask = np.asarray(request.mask, dtype=bool)
        policy = None if request.policy_logprobs is None else [request.policy_logprobs]
        batch = await self._cme.score_async([request.prompt], [request.ids], [mask], policy)
        rewards, scored = batch.token_rewards[0].numpy(), batch.mask[0].numpy()
        rewards, scored = rewards[request.start :], scored[request.start :]
        sequence = float(batch.sequence_rewards[0])
        counted = rewards[scored if self._cme.config.level == "token" else rewards != 0]
        n_tokens = int(mask[request.start :].sum())
        self._tallies[request.validate].add(batch.metrics, counted, sequence, n_tokens)
        picked = self._picked[request.validate]
        if picked.n:
            # Not the first to come: those are the short ones.
            picked.offer(request.prompt, digest([], request.ids), (request, batch))
        return {
            "rewards": write_rewards(rewards, scored),
            "sequence": sequence,
            "info": {
                "cme_sequence_reward": sequence,
                "cme_token_reward": float(counted.mean()) if counted.size else 0.0,
                **{f"cme_{key}": float(batch.metrics[key]) for key in Tally.MEANS},
            },
        }

    async def metrics(self) -> dict[str, float]:
        """Metrics since the last call, as veRL logs them."""
        out = {}
        for validate, prefix in ((False, "cme"), (True, "val-cme")):
            taken = self._tallies[validate].take()
            out.update({f"{prefix}/{key}": value for key, value in taken.items()})
        if out:
            out["cme/verifier_seconds"] = self._clock.take()
        return out

    async def samples(self) -> dict[bool, list[Kept]]:
        """Responses picked since the last call, in training (False) and in validation (True)."""
        table = self._cme.table
        return {
            validate: [of_batch(r.prompt, r.ids, batch, 0, table) for r, batch in picked.take()]
            for validate, picked in self._picked.items()
        }

    async def failure(self) -> str | None:
        """What went wrong last."""
        return self._failure


def open_verifier(
    settings: RewardSettings, config: Mapping[str, Any], router_address: str | None
) -> Verifier | Ensemble:
    """The verifier of the settings, or the one that veRL hosts behind its router."""
    options = dict(settings.verifier_options)
    if settings.verifier != "hosted":
        return load_verifier(settings.verifier, **options)
    hosted = config["reward"]["reward_model"]
    engine = str(hosted["rollout"]["name"])
    if engine not in ("vllm", "sglang"):
        raise ConfigError(
            f"reward.reward_model.rollout.name={engine!r} gives no log-probs of token ids; "
            "expected vllm or sglang"
        )
    if not router_address:
        raise ConfigError(
            "the verifier is hosted by veRL, but veRL gave no reward_router_address; expected "
            "reward.reward_model.enable=True in the configuration that the trainer was started with"
        )
    where = {"tokenizer": _local(hosted["model_path"]), "model": hosted["model_path"]}
    return load_verifier(f"{engine}:http://{router_address}", **{**where, **options})


def scorer_actor(config: Any, router_address: str | None = None) -> Any:
    """The handle of the run's scorer, which is made where there is none yet."""
    import ray

    settings = RewardSettings.from_config(config)
    return (
        ray.remote(Scorer)
        .options(
            name=NAME,
            get_if_exists=True,
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_concurrency=4096,
        )
        .remote(config, router_address)
    )


async def ready(actor: Any, settings: RewardSettings) -> str:
    """The name of the verifier, once it has loaded.

    Raises:
        VerifierError: what kept it from loading; or that Ray found no place for it.
    """
    import ray

    try:
        future = asyncio.wrap_future(actor.ready.remote().future())
        return await asyncio.wait_for(future, settings.start_seconds)
    except TimeoutError as error:
        raise VerifierError(
            f"verifier {settings.verifier!r} was not ready in {settings.start_seconds:g} s: the "
            f"actor {NAME!r} loads it, or waits for num_cpus={settings.num_cpus:g} and "
            f"num_gpus={settings.num_gpus:g}, which must be free besides veRL's own pools. "
            "Available: " + str(ray.available_resources())
        ) from error
    except ray.exceptions.RayError as error:
        raise VerifierError(f"verifier {settings.verifier!r} did not load: {error}") from error


def failure() -> VerifierError:
    """Why rewards are missing."""
    import ray

    reason = None
    if ray.is_initialized():
        try:
            reason = ray.get(ray.get_actor(NAME).failure.remote(), timeout=60)
        except (ValueError, ray.exceptions.RayError) as error:
            reason = f"the actor {NAME!r}, which holds the verifier, is gone: {error}"
    return VerifierError(
        "rewards are missing, and no step is trained without them. "
        + (reason or "See the first error above in the log")
    )


def actor_metrics() -> dict[str, float]:
    """The scorer's metrics since the last call; none before the first response."""
    return _asked("metrics")


def actor_samples() -> dict[bool, list[Kept]]:
    """The scorer's `samples`; none before the first response."""
    return _asked("samples")


def _asked(method: str) -> dict[Any, Any]:
    import ray

    try:
        actor = ray.get_actor(NAME)
    except ValueError:
        return {}
    return ray.get(getattr(actor, method).remote())


def _generator(config: Mapping[str, Any]) -> tuple[Any, list[int]]:
    """The policy's tokenizer as the rollouts have it, and the ids at which its model stops."""
    from transformers import GenerationConfig
    from verl.utils import hf_tokenizer

    model = config["actor_rollout_ref"]["model"]
    path = _local(model.get("tokenizer_path") or model["path"])
    trust = bool(model.get("trust_remote_code", False))
    tokenizer = hf_tokenizer(path, trust_remote_code=trust)
    tokenizer.chat_template = model.get("custom_chat_template") or tokenizer.chat_template
    try:
        stops = GenerationConfig.from_pretrained(_local(model["path"])).eos_token_id
    except OSError:  # there is none, and the tokenizer's own EOS is all
        stops = None
    return tokenizer, [stops] if isinstance(stops, int) else list(stops or [])


@cache
def _local(path: str) -> str:
    from verl.utils.fs import copy_to_local

    return copy_to_local(path)
