"""What docs/verl.md and adapters/verl say holds with the veRL that is installed."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl_rig.run import ROOT

from cme_reward.verl.launch import compose, expand, read_config
from cme_reward.verl.settings import MANAGER, RewardSettings, check_settings

PAGE = (ROOT / "docs" / "verl.md").read_text()
ADAPTER = ROOT / "adapters" / "verl"
YAML = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
KEYS = next(
    block
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    if block.startswith("algorithm.")
)


@pytest.mark.parametrize("text", YAML, ids=["in process", "hosted"])
def test_the_files_of_the_page_are_accepted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    check_settings(compose(expand(read_config(path))))


def test_the_native_keys_of_the_page_are_those_of_the_file(tmp_path: Path) -> None:
    by_keys = compose(KEYS.split())
    check_settings(by_keys)
    path = tmp_path / "config.yaml"
    path.write_text(
        "reward_fn: cme_reward.verl:CMEReward\n"
        "cme: {verifier: 'hf:google/gemma-3-1b-it', eps: 0.1}\n"
    )
    assert compose(expand(read_config(path))) == by_keys


def test_every_setting_in_the_page_exists() -> None:
    table = PAGE.partition("and these:")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
             for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    known = set(RewardSettings.__dataclass_fields__) - {"cme"}
    assert named == known
    config = OmegaConf.to_container(compose([]))
    for key in re.findall(r"^\| `((?:algorithm|trainer|reward)\.[\w.]+)`", PAGE, re.MULTILINE):
        section: Any = config
        for part in key.split("."):
            assert part in section, key
            section = section[part]
    assert MANAGER in KEYS


def test_the_papers_file_is_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Appendix E of arXiv 2605.29009, value by value."""
    config = compose(expand(read_config(ADAPTER / "paper.yaml")))
    settings = check_settings(config)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-0.5B"
    assert settings.verifier == "hf:google/gemma-3-1b-it"
    assert settings.cme.level == "token"
    assert config.data.train_batch_size * rollout.n == 128
    assert actor.ppo_mini_batch_size == config.data.train_batch_size
    assert actor.ppo_epochs == 1
    assert (rollout.n, rollout.temperature, rollout.top_p) == (8, 1.0, 1.0)
    assert rollout.top_k == -1
    assert config.data.max_response_length == 2048
    assert (actor.clip_ratio, actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.2, 0.2)
    assert not actor.use_kl_loss
    assert not config.algorithm.use_kl_in_reward
    assert actor.entropy_coeff == 0
    assert actor.loss_agg_mode == "seq-mean-token-mean"
    assert actor.policy_loss.loss_mode == "vanilla"
    assert actor.grad_clip == 1.0
    assert (actor.optim.lr, actor.optim.lr_warmup_steps) == (3e-6, 20)
    assert (actor.optim.lr_scheduler_type, actor.optim.optimizer) == ("cosine", "AdamW")
    assert actor.fsdp_config.model_dtype == "fp32"
    assert actor.fsdp_config.dtype == "bfloat16"
    assert config.trainer.total_epochs == 1


def test_the_multi_node_file_differs_in_where_things_run() -> None:
    paper, multinode = (
        OmegaConf.to_container(compose(expand(read_config(ADAPTER / f"{name}.yaml"))))
        for name in ("paper", "multinode")
    )
    check_settings(multinode)  # type: ignore[arg-type]
    flat = [dict(leaves(config)) for config in (paper, multinode)]
    changed = {key for key in {*flat[0], *flat[1]} if flat[0].get(key) != flat[1].get(key)}
    assert all(key.startswith(("reward.", "trainer.")) for key in changed), changed
    assert flat[1]["reward.reward_model.enable_resource_pool"] is True
    assert flat[1]["trainer.nnodes"] == 2


def leaves(config: Any, path: str = "") -> Any:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, config


@pytest.mark.parametrize("name", ["paper", "multinode"])
def test_the_launch_scripts_pass_arguments_on(name: str) -> None:
    done = subprocess.run(
        ["sh", str(ADAPTER / f"{name}.sh"), "cme.eos=mask", "trainer.nnodes=3", "--print-config"],
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "eos: mask" in done.stdout
    assert done.stdout.rstrip().endswith("trainer.nnodes=3")
    assert ("address=auto" in done.stdout) == (name == "multinode")


def make_data(*arguments: str) -> int:
    path = ADAPTER / "make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


def test_the_data_script_makes_what_verl_reads(
    tmp_path: Path, policy: Path, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    lines = [{"prompt": f"{i} plus 3 equals"} for i in range(20)] * 2  # twice each
    lines.append({"messages": [{"role": "user", "content": "Anna"},
                               {"role": "assistant", "content": "dropped"}]})  # type: ignore  # fmt: skip
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = [
        "--prompts",
        str(source),
        "--output",
        str(tmp_path / "data"),
        "--n-validation",
        "5",
    ]
    assert make_data(*arguments, "--n-prompts", "12", "--system-prompt", "says") == 0
    assert "train.parquet: 12 prompts" in capsys.readouterr().out
    rows = {}
    for name in ("train", "val"):
        dataset = RLHFDataset(
            str(tmp_path / "data" / f"{name}.parquet"),
            AutoTokenizer.from_pretrained(policy),
            config.data,
        )
        rows[name] = [dataset[i] for i in range(len(dataset))]
    assert (len(rows["train"]), len(rows["val"])) == (12, 5)
    contents = [row["raw_prompt"][-1]["content"] for name in rows for row in rows[name]]
    assert len(set(contents)) == 17
    assert "dropped" not in contents
    assert {row["raw_prompt"][0]["role"] for row in rows["train"]} == {"system"}

    assert make_data(*arguments, "--n-validation", "50") == 2
    assert "expected more than --n-validation=50" in capsys.readouterr().err
    source.write_text('{"text": "x"}')
    with pytest.raises(SystemExit, match="row 0 has the keys text; expected `prompt`"):
        make_data(*arguments)
