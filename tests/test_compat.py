"""Each undocumented API that `compat.py` relies on still exists and does what the package expects of it."""

import json
import sys
import threading
import time
from types import ModuleType

import pytest
import torch
import torch.distributed.elastic.agent.server.api as elastic_api
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.utils import store as store_util
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_twophase import compat
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


def parse(tmp_path, **flags):
    """Phase two's parsed command line; the paths in it need not exist."""
    known = {
        "model_name_or_path": "llm",
        "vision_tower": "tower",
        "data_path": "records.json",
        "feature_cache": "cache",
        "tune_mm_mlp_adapter": True,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "report_to": "none",
    }
    return parse_arguments([part for name, value in (known | flags).items() for part in (f"--{name}", str(value))])


@pytest.fixture
def zero3(tmp_path, monkeypatch):
    """The training arguments of a run with a ZeRO-3 configuration of its own."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # TrainingArguments sets it; restored after the test
    config = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "train_micro_batch_size_per_gpu": "auto",
    }
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    yield parse(tmp_path, deepspeed=path).training
    unset_hf_deepspeed_config()


def test_is_zero3_enabled_without_deepspeed():
    assert not compat.is_zero3_enabled()


def test_is_zero3_enabled_with_a_stage_3_configuration(zero3):
    assert compat.is_zero3_enabled()


def test_unpartitioned_loads_a_complete_tower_under_zero3(zero3, tiny_clip):
    fingerprint = VisionTower(str(tiny_clip), Preprocessor(str(tiny_clip))).fingerprint()
    with compat.unpartitioned():
        assert not compat.is_zero3_enabled()
    assert compat.is_zero3_enabled()
    unset_hf_deepspeed_config()
    assert fingerprint == VisionTower(str(tiny_clip), Preprocessor(str(tiny_clip))).fingerprint()


def test_deepspeed_config_is_accelerates_own_dictionary(zero3):
    config = compat.deepspeed_config(zero3)
    assert config["zero_optimization"]["stage"] == 3
    config["zero_optimization"].pop("offload_param")
    assert "offload_param" not in zero3.deepspeed_plugin.deepspeed_config["zero_optimization"]


def test_zero_stage_and_mismatches_of_a_configuration(zero3):
    assert compat.zero_stage(zero3) == 3
    assert compat.deepspeed_mismatches(zero3) == []
    zero3.deepspeed_plugin.hf_ds_config.mismatches.append("- ds optimizer.params.lr=1 vs hf learning_rate=2")
    assert compat.deepspeed_mismatches(zero3) == ["- ds optimizer.params.lr=1 vs hf learning_rate=2"]


def test_deepspeed_functions_without_deepspeed(tmp_path):
    training = parse(tmp_path).training
    assert compat.deepspeed_config(training) is None
    assert compat.zero_stage(training) is None
    assert compat.deepspeed_mismatches(training) == []


def test_apply_liger_patches_the_given_instance(monkeypatch):
    """With a stand-in for liger-kernel, which needs Triton and a GPU."""
    calls = []
    kernels = ModuleType("liger_kernel.transformers")
    kernels._apply_liger_kernel_to_instance = lambda model, **options: calls.append((model, options))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    llm = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    compat.apply_liger(llm, {"rope": False})
    compat.apply_liger(llm, None)
    assert calls == [(llm, {"rope": False}), (llm, {})]


def test_parameter_shape_of_a_plain_and_of_a_partitioned_parameter():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    assert compat.parameter_shape(parameter) == (3, 4)
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert compat.parameter_shape(parameter) == (3, 4)


def test_tokenizer_settings_reads_the_file(tmp_path):
    assert compat.tokenizer_settings(str(tmp_path)) == {}
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}', encoding="utf-8")
    assert compat.tokenizer_settings(str(tmp_path)) == {"legacy": False}


def test_find_file_returns_none_for_a_missing_file(tmp_path):
    assert compat.find_file(str(tmp_path), "tokenizer.model") is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert compat.find_file(str(tmp_path), "tokenizer.model") == str(tmp_path / "tokenizer.model")


def test_find_file_returns_none_for_an_unreachable_hub():
    assert compat.find_file("some/model", "tokenizer.model") is None  # the tests run offline


def test_image_outputs_keep_the_tensors():
    tensors = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert compat.image_outputs(tensors).pooler_output is tensors


def test_is_tracker_installed():
    assert compat.is_tracker_installed("tensorboard")
    assert not compat.is_tracker_installed("mlflow")
    with pytest.raises(ValueError, match="nowhere is not supported"):
        compat.is_tracker_installed("nowhere")


def test_set_hub_offline_stops_requests(monkeypatch):
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    compat.set_hub_offline()
    with pytest.raises(OfflineModeIsEnabled):
        get_session().head("http://127.0.0.1:9")


def test_is_lost_rank_knows_the_errors_of_gloo_and_nccl():
    """Text that gloo raised when a process was killed; test_agreement.py has a real one."""
    closed = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:33146"
    assert compat.is_lost_rank(RuntimeError(closed))
    assert compat.is_lost_rank(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not compat.is_lost_rank(RuntimeError("shapes differ"))


@pytest.fixture
def torchrun_store(monkeypatch):
    """The store that torchrun keeps on the first of two nodes, and the variables of rank 0 there."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    variables = {"RANK": 0, "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": store.port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_wait_for_torchrun_returns_when_the_other_nodes_have_ended(torchrun_store):
    """The other node calls torch's own barrier, as torchrun does at its end."""
    agent, other = (PrefixStore("none", TCPStore("127.0.0.1", torchrun_store.port)) for _ in range(2))
    agent.set("torchelastic/assigned_ranks/0", "[]")
    ended = []

    def end():
        ended.append(True)
        store_util.barrier(other, 2, elastic_api._TERMINAL_STATE_SYNC_ID, barrier_timeout=30)

    timer = threading.Timer(0.3, end)
    timer.start()
    compat.wait_for_torchrun()
    assert ended
    store_util.barrier(agent, 2, elastic_api._TERMINAL_STATE_SYNC_ID, barrier_timeout=30)
    timer.join()


def test_wait_for_torchrun_waits_only_as_long_as_it_is_told(torchrun_store):
    PrefixStore("none", torchrun_store).set("torchelastic/assigned_ranks/0", "[]")
    started = time.monotonic()
    compat.wait_for_torchrun(seconds=0.3)
    assert 0.3 <= time.monotonic() - started < 30  # the default is longer


@pytest.mark.parametrize("change", [{"RANK": 1}, {"GROUP_WORLD_SIZE": 1}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}])
def test_wait_for_torchrun_asks_only_on_rank_0_of_several_nodes(torchrun_store, monkeypatch, change):
    connections = []

    def connect(*address, **options):
        connections.append(address)
        return torchrun_store

    monkeypatch.setattr(torch.distributed, "TCPStore", connect)
    compat.wait_for_torchrun(seconds=0.3)
    assert connections == [("127.0.0.1", torchrun_store.port)]
    for name, value in change.items():
        monkeypatch.setenv(name, str(value))
    compat.wait_for_torchrun()
    assert len(connections) == 1


def test_wait_for_torchrun_does_not_wait_for_another_rendezvous(torchrun_store):
    """With --rdzv_backend c10d, the store's keys have another prefix."""
    started = time.monotonic()
    compat.wait_for_torchrun(seconds=60)
    assert time.monotonic() - started < 50


def test_gradient_clipping_without_deepspeed(tmp_path):
    assert compat.gradient_clipping(parse(tmp_path, max_grad_norm=0.5).training) == 0.5


def test_gradient_clipping_of_a_deepspeed_configuration_is_off_unless_it_is_set(zero3):
    """LLaVA's zero2.json does not set it, and its DeepSpeed did not clip then."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = zero3.deepspeed_plugin.deepspeed_config
    assert compat.gradient_clipping(zero3) == 0.0
    assert (
        DeepSpeedConfig({"train_batch_size": 1, "gradient_clipping": config["gradient_clipping"]}).gradient_clipping
        == 0
    )
    config["gradient_clipping"] = 0.25
    assert compat.gradient_clipping(zero3) == 0.25
    config["gradient_clipping"] = "auto"
    assert compat.gradient_clipping(zero3) == zero3.max_grad_norm
