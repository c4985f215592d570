"""Options of the in-process verifier: each exact against the plain forward pass, or refused."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    CONFIGS,
    LAYERS,
    assert_equals_oracle,
    build,
    draw,
    oracle,
    ragged_batch,
)

from cme_reward.errors import ConfigError
from cme_reward.verifiers.head import float32_forward
from cme_reward.verifiers.hf import TransformersVerifier
from cme_reward.verifiers.offload import OffloadedWeights

MODELS = ["llama", "gemma2", "gemma3", "qwen3", "gpt2"]


@pytest.fixture
def saved(tmp_path, bpe):
    """`(name)`: the path of a model of CONFIGS with its tokenizer."""

    def save(name: str) -> str:
        build(CONFIGS[name]).save_pretrained(tmp_path)
        bpe.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


class TestAttention:
    @pytest.mark.parametrize("name", MODELS)
    def test_sdpa_unless_it_would_leave_out_a_soft_cap(self, name, saved) -> None:
        verifier = TransformersVerifier.from_pretrained(saved(name), device="cpu")
        attention = verifier.model.config._attn_implementation
        assert attention == ("eager" if name == "gemma2" else "sdpa")
        verifier.model.set_attn_implementation("eager")  # the oracle's
        assert_equals_oracle(verifier, *ragged_batch())

    def test_sdpa_is_wrong_on_soft_capped_scores(self, bpe) -> None:
        """The reason for the refusals below: other numbers, and not a word about it."""
        model = build(CONFIGS["gemma2"])
        (prompt, response) = draw(17, 12)
        expected = oracle(model, prompt, response)
        model.config._attn_implementation = "sdpa"
        with suppress(ValueError):  # newer releases of transformers say so themselves
            assert np.abs(oracle(model, prompt, response) - expected).max() > 0.01
        with pytest.raises(ConfigError, match=r"'sdpa' leaves out the soft cap.*'eager'"):
            TransformersVerifier(model, bpe)

    @pytest.mark.parametrize("load", ["from_pretrained", "from_config"])
    def test_refusals(self, load, saved) -> None:
        load = getattr(TransformersVerifier, load)
        path = saved("gemma2")
        # Newer releases of transformers refuse it by themselves, and older ones leave it to us.
        with pytest.raises(ConfigError, match=r"attn_implementation='sdpa' .*'eager'"):
            load(path, device="cpu", attn_implementation="sdpa")
        with pytest.raises(ConfigError, match=r"'fast': expected one of .*'eager'.*'sdpa'"):
            load(path, device="cpu", attn_implementation="fast")

    def test_eager(self, saved) -> None:
        verifier = TransformersVerifier.from_pretrained(
            saved("llama"), device="cpu", attn_implementation="eager"
        )
        assert verifier.model.config._attn_implementation == "eager"
        assert_equals_oracle(verifier, *ragged_batch())


class TestFloat32Head:
    @pytest.mark.parametrize("name", [*MODELS, "llama-tied"])
    def test_head_in_float32_over_a_bf16_body(self, name, bpe) -> None:
        model = build(CONFIGS[name], torch.bfloat16, scale=3.0)
        # In one pass, as below: a prompt read by itself rounds its bf16 hidden states otherwise.
        verifier = TransformersVerifier(model, bpe, head_dtype="float32", prompt_cache_mb=0)
        plain = TransformersVerifier(model, bpe, prompt_cache_mb=0)
        prompt, response = draw(20, 60)
        # By hand: bf16 hidden states, float32 weights, the cap, log-softmax.
        ids = torch.tensor([[*prompt, *response[:-1]]])
        with torch.inference_mode():
            hidden_SD = plain.frozen.body(ids).last_hidden_state[0, len(prompt) - 1 :].float()
            logits_SV = hidden_SD @ model.get_output_embeddings().weight.float().T
            if cap := getattr(CONFIGS[name], "final_logit_softcapping", None):
                logits_SV = cap * torch.tanh(logits_SV / cap)
            expected = logits_SV.log_softmax(-1)[range(len(response)), response].numpy()
        (got,) = verifier.logprobs([prompt], [response])
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
        (rounded,) = plain.logprobs([prompt], [response])
        assert 1e-3 < np.abs(rounded - expected).max() < 0.2
        assert "forward" not in vars(model.get_output_embeddings())

    @pytest.mark.parametrize("name", MODELS)
    def test_float32_model_stays_as_it_is(self, name, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS[name]), bpe, head_dtype=torch.float32)
        assert_equals_oracle(verifier, *ragged_batch())

    def test_any_number_of_weights_at_a_time(self, monkeypatch) -> None:
        linear = torch.nn.Linear(8, 13, dtype=torch.bfloat16)
        hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(
            hidden.float(), linear.weight.float(), linear.bias.float()
        )
        for at_once in (1, 24, 2**24):
            monkeypatch.setattr("cme_reward.verifiers.head.CONVERTED_AT_ONCE", at_once)
            torch.testing.assert_close(float32_forward(linear)(hidden), expected)

    def test_head_that_rounds_again_is_refused(self, bpe) -> None:
        model = build(CONFIGS["llama"], torch.bfloat16)
        forward = model.forward

        def rounding(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = output.logits.bfloat16()
            return output

        model.forward = rounding
        with pytest.raises(ConfigError, match=r"head_dtype='float32'.*torch.bfloat16.*leave"):
            TransformersVerifier(model, bpe, head_dtype="float32")

    def test_head_without_plain_weights_is_refused(self, bpe) -> None:
        model = build(CONFIGS["llama"])
        model.lm_head = torch.nn.Sequential(model.lm_head)
        with pytest.raises(ConfigError, match=r"plain weights.*Sequential.*leave head_dtype out"):
            TransformersVerifier(model, bpe, head_dtype="float32")

    def test_unknown(self, bpe) -> None:
        with pytest.raises(ConfigError, match="head_dtype='float8': expected 'float32'"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, head_dtype="float8")


class TestCompile:
    @pytest.mark.slow
    def test_equals_full_forward(self, bpe) -> None:
        # "eager" is traced and guarded as for any backend; generating code takes a minute more.
        config = copy.deepcopy(CONFIGS["gemma3"])
        config.num_hidden_layers, config.layer_types = 2, LAYERS[:2]
        verifier = TransformersVerifier(build(config), bpe, compile="eager")
        assert verifier.frozen.run_body is not verifier.frozen.body
        assert verifier.frozen.shares
        assert_equals_oracle(verifier, *ragged_batch())

    def test_true_is_the_default_compiler(self, bpe, monkeypatch) -> None:
        asked: list[dict[str, Any]] = []

        def compile(body, **kwargs):
            asked.append(kwargs)
            return body

        monkeypatch.setattr(torch, "compile", compile)
        TransformersVerifier(build(CONFIGS["llama"]), bpe, compile=True)
        assert [(a["backend"], a["dynamic"]) for a in asked] == [("inductor", True)]

    def test_that_fails_is_refused(self, bpe, monkeypatch) -> None:
        def compile(body, **kwargs):
            raise RuntimeError("no C++ compiler\nat all")

        monkeypatch.setattr(torch, "compile", compile)
        with pytest.raises(ConfigError, match=r"'inductor'\) fails.*leave compile out.*no C\+\+"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, compile=True)

    def test_that_changes_the_result_is_refused(self, bpe, monkeypatch) -> None:
        def compile(body, **kwargs):
            def wrong(*args, **kwargs):
                output = body(*args, **kwargs)
                output.last_hidden_state = output.last_hidden_state * 1.01
                return output

            return wrong

        monkeypatch.setattr(torch, "compile", compile)
        with pytest.raises(ConfigError, match=r"changes the hidden states.*leave compile out"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, compile=True)

    def test_unknown(self, bpe) -> None:
        with pytest.raises(ConfigError, match=r"compile='fast': expected True, False or.*eager"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, compile="fast")


class CountingWeights(OffloadedWeights):
    """A device of its own kind: other memory of the CPU, and a count of transfers."""

    transfers = 0

    def _to_device(self, at_rest: torch.Tensor) -> torch.Tensor:
        self.transfers += 1
        return at_rest.clone()


class FullDevice(CountingWeights):
    """A stand-in for a GPU that has room for some of the weights; -1 for all."""

    room = -1

    def _to_device(self, at_rest: torch.Tensor) -> torch.Tensor:
        if self.transfers == self.room:
            raise torch.OutOfMemoryError("no room")
        return super()._to_device(at_rest)


class TestOffload:
    @pytest.mark.parametrize("name", [*MODELS, "llama-tied"])
    def test_weights_move_for_a_call_and_rest_between(self, name, bpe) -> None:
        model = build(CONFIGS[name])
        expected = TransformersVerifier(copy.deepcopy(model), bpe).logprobs(*ragged_batch())
        verifier = TransformersVerifier(model, bpe)
        weights = CountingWeights(model, torch.device("cpu"))
        verifier.resident = weights
        rest = [weight.data_ptr() for weight in model.parameters()]
        during: list[list[int]] = []
        hook = model.base_model.register_forward_hook(
            lambda *_: during.append([weight.data_ptr() for weight in model.parameters()])
        )
        for call in (1, 2):
            got = verifier.logprobs(*ragged_batch())
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)
            assert [weight.data_ptr() for weight in model.parameters()] == rest
            assert weights.transfers == call * len(rest)  # one each, none for a tied weight
        hook.remove()
        assert all(not set(rest) & set(pointers) for pointers in during)

    def test_weights_come_back_after_an_error(self, bpe) -> None:
        model = build(CONFIGS["llama"])
        verifier = TransformersVerifier(model, bpe)
        verifier.resident = CountingWeights(model, torch.device("cpu"))
        rest = [weight.data_ptr() for weight in model.parameters()]

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = model.model.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            verifier.logprobs(*ragged_batch())
        hook.remove()
        assert [weight.data_ptr() for weight in model.parameters()] == rest
        assert_equals_oracle(verifier, *ragged_batch())

    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    @pytest.mark.parametrize("n", [0, 1, 7, -1])
    def test_no_room_for_the_nth_weight_leaves_all_at_rest(self, name, n, bpe) -> None:
        model = build(CONFIGS[name])
        verifier = TransformersVerifier(model, bpe)
        weights = FullDevice(model, torch.device("cpu"))
        verifier.resident = weights
        rest = [weight.data_ptr() for weight in model.parameters()]
        weights.room = n % len(rest)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            verifier.logprobs(*ragged_batch())
        assert [weight.data_ptr() for weight in model.parameters()] == rest
        weights.room = -1
        assert_equals_oracle(verifier, *ragged_batch())

    def test_weights_that_find_no_place_to_rest_stay_where_they_are(self, bpe) -> None:
        model = build(CONFIGS["llama"])
        where = [weight.data_ptr() for weight in model.parameters()]

        class NoRest(CountingWeights):
            kept = 0

            def _to_rest(self, weight: torch.Tensor) -> torch.Tensor:
                self.kept += 1
                if self.kept > 7:
                    raise RuntimeError("cannot pin memory")
                return weight.clone()

        with pytest.raises(RuntimeError, match="cannot pin memory"):
            NoRest(model, torch.device("cpu"))
        assert [weight.data_ptr() for weight in model.parameters()] == where
        assert_equals_oracle(TransformersVerifier(model, bpe), *ragged_batch())

    def test_an_error_while_they_leave_does_not_keep_them(self, bpe, monkeypatch) -> None:
        """What a CUDA device failed at before shows when its cache is emptied."""
        model = build(CONFIGS["llama"])
        verifier = TransformersVerifier(model, bpe)
        verifier.resident = weights = CountingWeights(model, torch.device("cpu"))
        rest = [weight.data_ptr() for weight in model.parameters()]

        def fail() -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(torch.cuda, "empty_cache", fail)
        weights.device = torch.device("cuda")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            verifier.logprobs(*ragged_batch())
        assert [weight.data_ptr() for weight in model.parameters()] == rest
        weights.device = torch.device("cpu")
        assert_equals_oracle(verifier, *ragged_batch())

    def test_on_a_cpu_there_is_nothing_to_do(self, bpe) -> None:
        model = build(CONFIGS["llama"])
        pointers = [weight.data_ptr() for weight in model.parameters()]
        verifier = TransformersVerifier(model, bpe, offload="between_calls")
        assert not isinstance(verifier.resident, OffloadedWeights)
        assert_equals_oracle(verifier, *ragged_batch())
        assert [weight.data_ptr() for weight in model.parameters()] == pointers

    @pytest.mark.parametrize("field", ["hf_device_map", "hf_quantizer"])
    def test_weights_that_others_place_are_refused(self, field) -> None:
        model = SimpleNamespace(**{field: {"": "cuda:0"}})
        with pytest.raises(ConfigError, match=r"offload='between_calls'.*leave out one"):
            OffloadedWeights(model, torch.device("cuda"))

    def test_unknown(self, bpe) -> None:
        with pytest.raises(ConfigError, match="offload='always': expected 'between_calls'"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, offload="always")


class TestPlacement:
    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    def test_device_map(self, name, saved) -> None:
        path = saved(name)
        if find_spec("accelerate") is None:
            with pytest.raises(ConfigError, match=r"device_map=.*pip install accelerate"):
                TransformersVerifier.from_pretrained(path, device_map={"": "cpu"})
            return
        verifier = TransformersVerifier.from_pretrained(path, device_map={"": "cpu"})
        assert verifier.frozen.splits
        assert verifier.frozen.shares
        assert_equals_oracle(verifier, *ragged_batch())

    def test_options_pass_through(self, saved, monkeypatch) -> None:
        path = saved("llama")
        load = transformers.AutoModelForCausalLM.from_pretrained
        asked: dict[str, Any] = {}

        def spy(path, **kwargs):
            asked.update(kwargs)
            return load(path, dtype=kwargs["dtype"])

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
        monkeypatch.setattr("cme_reward.verifiers.pretrained.is_accelerate_available", lambda: True)
        options = {"device_map": "auto", "quantization_config": {"load_in_8bit": True}}
        TransformersVerifier.from_pretrained(path, **options, max_memory={0: "10GB"})
        assert options.items() <= asked.items()
        assert asked["max_memory"] == {0: "10GB"}

    @pytest.mark.parametrize(
        ("rank", "devices", "current", "expected"),
        [
            (None, 0, 0, "cpu"),
            (None, 2, 0, "cuda:0"),
            ("1", 2, 0, "cuda:1"),  # a process of several, before its trainer has said so
            ("1", 2, 1, "cuda"),
            ("0", 2, 1, "cuda"),
            ("1", 1, 0, "cuda"),  # the launcher shows each process its own
        ],
    )
    def test_this_processs_device(self, rank, devices, current, expected, saved, monkeypatch):
        """Where a model is sent, in a process that is told of GPUs which are not there."""
        path, sent = saved("llama"), []
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(
            transformers.PreTrainedModel, "to", lambda model, device: sent.append(device) or model
        )
        TransformersVerifier.from_pretrained(path)
        assert sent == [expected]

    def test_weights_that_were_never_filled_in_are_refused(self, bpe) -> None:
        model = build(CONFIGS["llama"], scale=0.0)
        with pytest.raises(ConfigError, match=r"embeddings are zeros, as FSDP's.*load_verifier"):
            TransformersVerifier(model, bpe)

    def test_missing_accelerate(self, saved, monkeypatch) -> None:
        monkeypatch.setattr(
            "cme_reward.verifiers.pretrained.is_accelerate_available", lambda: False
        )
        with pytest.raises(ConfigError, match=r"device_map='auto' needs .* pip install accelerate"):
            TransformersVerifier.from_pretrained(saved("llama"), device_map="auto")

    @pytest.mark.parametrize(
        "options",
        [
            {"attn_implementation": "flash_attention_2"},
            {"quantization_config": {"load_in_8bit": True}},
        ],
    )
    def test_missing_package(self, options, saved, monkeypatch) -> None:
        asked: dict[str, Any] = {}

        def load(path, **kwargs):
            asked.update(kwargs)
            raise ImportError("a package is not here")

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
        (option,) = options
        with pytest.raises(
            ConfigError, match=rf"{option}=.* not installed: install it.*a package is not here"
        ):
            TransformersVerifier.from_pretrained(saved("llama"), **options)
        assert asked[option] == options[option]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"device": "cpu", "device_map": "auto"}, "expected one of them"),
            ({"load_in_8bit": True}, "quantization_config={'load_in_8bit': True}"),
            ({"quantization_config": "8bit"}, "'8bit': expected a configuration"),
            ({"dtype": "float12"}, "'float12': expected 'float32', 'bfloat16'"),
            ({"colour": 3}, "colour=3: expected options of TransformersVerifier"),
        ],
    )
    def test_refusals(self, options, message, saved) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            TransformersVerifier.from_pretrained(saved("llama"), **options)

    def test_untrained_refuses_what_it_does_not_know(self, saved) -> None:
        with pytest.raises(ConfigError, match=r"\['device_map'\]: no options of an untrained"):
            TransformersVerifier.from_config(saved("llama"), device_map="auto")


def test_threads_take_turns(bpe) -> None:
    """Parts of the model are replaced during a call, which two calls at once would mix up."""
    verifier = TransformersVerifier(build(CONFIGS["gemma2"]), bpe, head_rows=2)
    prompts, responses = ragged_batch()
    expected = verifier.logprobs(prompts, responses)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(verifier.logprobs, prompts, responses) for _ in range(16)]
    for call in calls:
        for got, want in zip(call.result(), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_pickles(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe, head_dtype="float32")
    again = pickle.loads(pickle.dumps(verifier))
    assert_equals_oracle(again, *ragged_batch())


def test_options_together(saved) -> None:
    verifier = TransformersVerifier.from_pretrained(
        saved("gemma3"),
        device="cpu",
        dtype="bfloat16",
        head_dtype="float32",
        offload="between_calls",
        head_rows=7,
    )
    assert verifier.frozen.shares
    assert_equals_oracle(verifier, *ragged_batch(), atol=0.2)


class TestWhatIsNoVerifier:
    @pytest.mark.parametrize("is_decoder", [False, True])
    def test_a_model_that_sees_both_ways(self, is_decoder: bool, bpe: Any) -> None:
        config = transformers.BertConfig(
            vocab_size=CONFIGS["llama"].vocab_size, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64, is_decoder=is_decoder,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.BertLMHeadModel(config)
        if not is_decoder:
            with pytest.raises(ConfigError, match=r"no causal language model.*is_decoder=True"):
                TransformersVerifier(model, bpe)
            return
        assert_equals_oracle(TransformersVerifier(model, bpe), *ragged_batch())

    def test_a_tokenizer_of_another_end(self, bpe: Any, caplog: Any) -> None:
        """A base model is asked for its tokenizer's EOS, which it may never write."""
        model, own = build(CONFIGS["llama"]), copy.deepcopy(bpe)
        own.eos_token = own.convert_ids_to_tokens(7)
        for known, warned in ((7, False), ([3, 7], False), (None, False), (3, True)):
            model.config.eos_token_id = model.generation_config.eos_token_id = known
            caplog.clear()
            TransformersVerifier(model, own)
            assert ("is not among the model's own" in caplog.text) is warned, known
        own.chat_template = "{{ messages[0].content }}"  # says itself what ends a turn
        caplog.clear()
        TransformersVerifier(model, own)
        assert "is not among" not in caplog.text
