"""What the adapter takes for granted in veRL: another veRL breaks a test, and not a run."""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from verl.experimental.agent_loop import agent_loop
from verl.experimental.reward_loop import reward_loop, reward_model
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer import main_ppo
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo import reward as verl_reward
from verl.trainer.ppo.v1 import agent_loop_tq, trainer_base
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.import_utils import load_class_from_fqn, load_extern_object
from verl.utils.tracking import Tracking

import cme_reward.verl
from cme_reward.verl.loop import CMEAgentLoopWorker, TokenRewardOutput
from cme_reward.verl.metrics import log_along, note


def parameters(function: Any) -> list[str]:
    # Ray adds one to the methods of an actor.
    return [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"]


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def test_signatures() -> None:
    assert parameters(RewardManagerBase.__init__) == [
        "self",
        "config",
        "tokenizer",
        "compute_score",
    ]
    assert parameters(RewardManagerBase.assemble_rm_scores) == ["data", "scores"]
    worker = CMEAgentLoopWorker.__mro__[1]
    assert parameters(worker._compute_score) == ["self", "outputs", "kwargs"]
    assert parameters(worker._agent_loop_postprocess) == ["self", "output", "validate", "kwargs"]
    assert parameters(AgentLoopManagerTQ.__init__) == ["self", "args", "kwargs"]
    assert inspect.iscoroutinefunction(AgentLoopManagerTQ._init_agent_loop_workers)
    assert "await instance._init_agent_loop_workers()" in source(AgentLoopManagerTQ.create)
    assert parameters(agent_loop.AgentLoopManager.__init__)[1] == "config"
    assert parameters(agent_loop.AgentLoopOutput.as_dict) == ["self"]
    log = getattr(Tracking.log, "__wrapped__", Tracking.log)
    assert parameters(log) == ["self", "data", "step", "backend"]


def test_the_estimator_gets_the_rewards_the_mask_the_groups_and_its_section() -> None:
    text = source(ray_trainer.compute_advantage)
    for line in (
        '"token_level_rewards": data.batch["token_level_rewards"]',
        '"response_mask": data.batch["response_mask"]',
        '"config": config',
        'adv_kwargs["index"] = data.non_tensor_batch["uid"]',
    ):
        assert line in text
    text = source(trainer_base.PPOTrainer._compute_advantage)
    assert 'data.batch["token_level_scores"] = data.batch["rm_scores"]' in text
    assert 'data.batch["token_level_rewards"] = data.batch["token_level_scores"]' in text
    assert "config=self.config.algorithm" in text


def test_the_manager_is_asked_only_with_a_custom_reward_function() -> None:
    text = source(reward_loop.RewardLoopWorker.compute_score)
    assert "custom_reward_function.path is not None" in text
    assert "compute_score_disrm" in text


def test_a_hosted_verifier_sleeps_until_a_colocated_reward_wakes_it() -> None:
    """Why `free_cache_engine` has to be off in a pool of its own."""
    init = source(reward_model.RewardModelManager.__init__)
    assert "if self.config.rollout.free_cache_engine:" in init
    assert "self.sleep()" in init
    for module in (main_ppo, trainer_base, agent_loop, agent_loop_tq):
        assert "reward_model_manager" not in source(module)
    assert "wake_up" in source(reward_loop.RewardLoopManager.compute_rm_score)


def test_each_output_is_scored_by_the_base_class_into_reward_score() -> None:
    text = source(agent_loop.AgentLoopWorker._compute_score)
    assert 'final_output.reward_score = result["reward_score"]' in text
    assert 'final_output.extra_fields["reward_extra_info"] = result["reward_extra_info"]' in text
    assert "**{k: np.array([v] * n) for k, v in kwargs.items()}" in text


def test_outputs_replaced_in_the_list_are_the_ones_written() -> None:
    text = source(agent_loop_tq)
    after = text.partition("await self._compute_score(outputs, kwargs=kwargs)")[2]
    assert "final_output = outputs[-1]" in after
    assert "field = output.as_dict()" in after
    assert "field.update(kwargs)" in after  # which carries the notes to a colocated reward


def test_the_colocated_route_hands_over_the_prompt_and_cuts_the_padding() -> None:
    text = source(trainer_base.PPOTrainer._compute_reward_colocate)
    assert 'fields = ["prompts", "responses", "raw_prompt"]' in text
    assert "padded_rm_scores[i, : response_lengths[i]]" in text
    assert "assemble_rm_scores(data, scores)" in source(
        reward_loop.RewardLoopManager.compute_rm_score
    )


def test_the_agent_loop_manager_is_made_from_its_name_in_the_trainers_process() -> None:
    text = source(main_ppo)
    assert '.get("agent_loop_manager_class")' in text
    assert "config=self.config" in text
    name = "cme_reward.verl.CMEAgentLoopManager"
    assert load_class_from_fqn(name) is cme_reward.verl.CMEAgentLoopManager


def test_a_list_in_verls_own_output_is_lost() -> None:
    """The reason for an output class of our own: veRL writes one number, at the end."""
    fields: dict[str, Any] = {
        "prompt_ids": [1],
        "response_ids": [2, 3, 4],
        "response_mask": [1, 1, 0],
        "metrics": {},
    }
    stock = agent_loop.AgentLoopOutput(**fields, reward_score=-2.0)
    assert stock.as_dict()["rm_scores"].tolist() == [0, 0, -2.0]
    ours = TokenRewardOutput(**fields, reward_score=-2.0, token_rewards=[-0.5, -1.5, 0.0])
    written = ours.as_dict()
    assert written["rm_scores"].tolist() == [-0.5, -1.5, 0]
    assert written["rm_scores"].dtype == torch.float32
    assert written.keys() == stock.as_dict().keys()  # one batch may hold both
    short = TokenRewardOutput(**fields, reward_score=0.0, token_rewards=[-0.5])
    with pytest.raises(cme_reward.InputError, match="3 tokens has 1 rewards"):
        short.as_dict()


def test_pkg_paths_find_all_that_is_named_in_a_configuration() -> None:
    for name in ("CMEReward", "compute_score"):
        found = load_extern_object("pkg://cme_reward.verl", name)
        assert found is getattr(cme_reward.verl, name)
    assert "load_extern_object" in source(verl_reward.resolve_reward_manager_cls)


@pytest.mark.parametrize("name", sorted(cme_reward.verl.__all__))
def test_public_names_pickle(name: str) -> None:
    thing = getattr(cme_reward.verl, name)
    assert pickle.loads(pickle.dumps(thing)) is thing
    assert thing.__doc__


def test_the_no_op_says_so_when_called() -> None:
    with pytest.raises(cme_reward.InputError, match="is no reward"):
        cme_reward.verl.compute_score(data_source="x", solution_str="y")


def run(code: str, **environ: str) -> str:
    """What a process without the rig prints."""
    plain = {"VERL_USE_EXTERNAL_MODULES": "", "VERL_PLATFORM": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | plain | environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


GET = "from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as r; print('cme_grpo' in r)"


def test_the_estimator_is_registered_by_the_plugin_and_by_the_module_alone() -> None:
    (plugin,) = (p for p in entry_points(group="verl.plugins") if p.name == "cme_reward")
    assert plugin.value == "cme_reward.verl.plugin"
    assert run(f"import verl; {GET}") == "True"
    assert run(f"import verl; {GET}", VERL_USE_EXTERNAL_PLUGINS="none") == "False"
    module = (
        "from verl.utils.import_utils import load_extern_object as load; "
        "load('pkg://cme_reward.verl', 'CMEReward')"
    )
    assert run(f"{module}; {GET}", VERL_USE_EXTERNAL_PLUGINS="none") == "True"


def test_the_plugin_takes_no_model_code_into_every_process() -> None:
    loaded = run("import sys, verl; print(*sys.modules)").split()
    assert "cme_reward.verl.advantages" in loaded
    for module in ("cme_reward.verl.reward", "cme_reward.reward", "verl.trainer.ppo.v1"):
        assert module not in loaded


def test_metrics_are_logged_with_verls_own() -> None:
    class Logger:
        def __init__(self) -> None:
            self.entries: list[tuple[dict[str, float], int]] = []

        def log(self, data: dict[str, float], step: int) -> None:
            self.entries.append((data, step))

    class Fresh(Tracking):
        log = getattr(Tracking.log, "__wrapped__", Tracking.log)

    tracking = Fresh("p", "n", [])
    tracking.logger["console"] = logger = Logger()
    log_along(Fresh, lambda: {"cme/coverage": 1.0})
    log_along(Fresh, lambda: {"cme/coverage": 0.5})  # a second manager in one process
    note(credited=0.25)
    tracking.log(data={"a": 1}, step=7)
    tracking.log(data={"a": 2}, step=8)
    assert logger.entries == [
        ({"a": 1, "cme/coverage": 0.5, "cme/credited": 0.25}, 7),
        ({"a": 2, "cme/coverage": 0.5}, 8),
    ]
