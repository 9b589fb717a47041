"""The mmproj file: its tensors and keys, and llama.cpp's own result with it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, linear
from transformers import CLIPVisionModel

from commands import use_command
from helpers import run
from llava_twophase.deploy.export_gguf import export_gguf
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.model.projector import read_projector

gguf = pytest.importorskip("gguf")
CYLLAMA = Path(sys.prefix) / "peers" / "cyllama"  # has llama.cpp's libmtmd
WIDTH, SIDE = 64, 56


@pytest.fixture(scope="module")
def mmproj(trained, tmp_path_factory):
    return export_gguf(find_projector(trained.run), tmp_path_factory.mktemp("gguf") / "mmproj.gguf")


def test_export_gguf_tensors_equal_the_weights(mmproj, trained):
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(mmproj).tensors}
    for name, tensor in read_projector(trained.run / "mm_projector.bin").items():
        np.testing.assert_array_equal(found[f"mm.{name}"], tensor.numpy())
    tower = CLIPVisionModel.from_pretrained(trained.tower).state_dict()
    weights = {name.removeprefix("vision_model."): tensor.numpy() for name, tensor in tower.items()}
    np.testing.assert_array_equal(found["v.class_embd"], weights["embeddings.class_embedding"])
    np.testing.assert_array_equal(found["v.blk.1.ffn_up.weight"], weights["encoder.layers.1.mlp.fc1.weight"])
    assert "v.blk.2.ln1.bias" in found and "v.blk.3.ln1.bias" not in found  # four layers, select_layer -2


def test_export_gguf_keys(mmproj):
    fields = {name: field.contents() for name, field in gguf.GGUFReader(mmproj).fields.items()}
    assert fields["general.architecture"] == "clip" and fields["general.type"] == "mmproj"
    assert fields["clip.projector_type"] == "mlp" and fields["clip.use_gelu"] is False
    assert fields["clip.vision.block_count"] == 3 and fields["clip.vision.feature_layer"] == [3]
    assert fields["clip.vision.image_size"] == SIDE


def test_export_gguf_refuses_other_towers(trained, tiny_siglip, tmp_path):
    projector = find_projector(trained.run, vision_tower=str(tiny_siglip))
    with pytest.raises(UserError, match="goes with CLIP only; use --to hf"):
        export_gguf(projector, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_export_gguf_refuses_cls_features(trained, tmp_path):
    with pytest.raises(UserError, match="cls_patch"):
        export_gguf(find_projector(trained.run, select_feature="cls_patch"), tmp_path / "out.gguf")


def test_export_command_tells_llama_cpps_faults(trained, tmp_path):
    done = run(["python", *use_command("export", trained.run, tmp_path / "out.gguf", to="gguf")])
    assert "convert_hf_to_gguf.py" in done.stdout and "25814" in done.stderr and "pads images" in done.stderr
    assert "n_tensors" not in done.stderr


def test_export_gguf_reports_a_full_disk(trained, small_disk):
    disk = small_disk("size=8k")
    with pytest.raises(UserError, match="the disk of OUT .* is full: free some space, then run the same command"):
        export_gguf(find_projector(trained.run), disk / "out.gguf")
    assert list(disk.iterdir()) == []


@pytest.mark.skipif(not CYLLAMA.is_dir(), reason="needs the wheel cyllama: make peers")
def test_llama_cpp_gives_the_embeddings_of_its_graph(mmproj, trained, tmp_path):
    write_tiny_llm(tmp_path / "llm.gguf")
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)
    script = """
import sys, numpy as np
from cyllama.llama import llama_cpp
llm, mmproj, image, out, width = sys.argv[1:]
pixels = np.load(image)
model = llama_cpp.LlamaModel(llm)
params = llama_cpp.MtmdContextParams(use_gpu=False, n_threads=1, print_timings=False, warmup=False)
context = llama_cpp.MtmdContext(mmproj, model, params)
bitmap = llama_cpp.MtmdBitmap.create_image(pixels.shape[1], pixels.shape[0], pixels.tobytes())
for chunk in context.tokenize(llama_cpp.get_default_media_marker(), [bitmap], True, True):
    if chunk.n_tokens > 1:
        assert context.encode_chunk(chunk) == 0
        np.save(out, np.array(context.get_output_embeddings(chunk.n_tokens, int(width)), np.float32))
"""
    paths = [tmp_path / "llm.gguf", mmproj, tmp_path / "image.npy", tmp_path / "out.npy"]
    run(["python", "-c", script, *paths, WIDTH], PYTHONPATH=CYLLAMA)
    found = np.load(tmp_path / "out.npy")
    expected = llama_cpp_graph(trained, image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3


@torch.no_grad()
def llama_cpp_graph(trained, image):
    """The computation of llama.cpp's CLIP graph, with its CLS token after the patches (ggml-org/llama.cpp#25814)."""
    tower = CLIPVisionModel.from_pretrained(trained.tower, attn_implementation="eager").eval()
    tower = getattr(tower, "vision_model", tower)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)[None]  # [1, 3, S, S]
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [1, L, D]
    hidden = torch.cat([patches, tower.embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    hidden = tower.pre_layrnorm(hidden + tower.embeddings.position_embedding.weight)
    for layer in tower.encoder.layers[:3]:
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
    weights = read_projector(Path(trained.run) / "mm_projector.bin")
    inner = gelu(linear(hidden[0, 1:], weights["0.weight"], weights["0.bias"]))
    return linear(inner, weights["2.weight"], weights["2.bias"]).numpy()


def write_tiny_llm(path):
    """A one-layer LLaMA with random weights: llama.cpp opens a tower only beside an LLM of its width."""
    vocabulary, inner, heads = 256, 128, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // heads)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", "\n"] + [f"<0x{byte:02X}>" for byte in range(vocabulary - 4)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, 1] + [6] * (vocabulary - 4))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, WIDTH),
        "output": (vocabulary, WIDTH),
        **{f"blk.0.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        "blk.0.ffn_gate": (inner, WIDTH),
        "blk.0.ffn_up": (inner, WIDTH),
        "blk.0.ffn_down": (WIDTH, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32) / 20)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
