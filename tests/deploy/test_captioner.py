"""Captions of a trained projector, from pixels and from the cache."""

import html
import re

import pytest
import torch
from PIL import Image

from llava_twophase import Captioner, FeatureCache, load_projector
from llava_twophase.deploy.captioner import Placement
from llava_twophase.errors import UserError


@pytest.fixture(scope="module")
def captioner(trained):
    return Captioner.load(trained.run)


def test_captioner_writes_the_captions_that_training_wrote(captioner, trained):
    (page,) = sorted((trained.run / "samples").glob("step-*.html"))[-1:]
    text = html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
    captions = [captioner(trained.images / key) for key in trained.keys[:4]]
    assert any(captions)
    assert [caption for caption in captions if " ".join(caption.split()) not in " ".join(text.split())] == []


def test_captioner_features_are_those_of_the_cache(captioner, trained):
    cached = FeatureCache(trained.cache).read_tensor(trained.keys[:3])
    assert torch.equal(captioner.features([trained.images / key for key in trained.keys[:3]]), cached)


def test_captioner_takes_paths_bytes_images_and_keys(captioner, trained):
    path = trained.images / trained.keys[0]
    expected = captioner(path)
    assert captioner(str(path)) == captioner(path.read_bytes()) == captioner(Image.open(path)) == expected
    assert Captioner.load(trained.run, feature_cache=trained.cache)(trained.keys[0]) == expected


def test_captioner_with_a_cache_loads_no_tower(trained):
    captioner = Captioner.load(trained.run, feature_cache=trained.cache, vision_tower=f"someone/{trained.tower.name}")
    assert isinstance(captioner(trained.keys[1]), str)


def test_captioner_of_a_linear_projector(trained, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(64, 32, generator=generator), "bias": torch.zeros(64)}
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in state.items()}, tmp_path / "linear.bin")
    models = {"llm": str(trained.llm), "vision_tower": str(trained.tower)}
    assert isinstance(Captioner.load(tmp_path / "linear.bin", **models)(trained.images / trained.keys[0]), str)


def test_captioner_refuses_an_image_that_cannot_be_read(captioner, tmp_path):
    with pytest.raises(UserError, match=r"absent\.jpg: .*[Nn]o such file"):
        captioner(tmp_path / "absent.jpg")
    (tmp_path / "page.jpg").write_text("<html>", encoding="utf-8")
    with pytest.raises(UserError, match=r"page\.jpg: "):
        captioner(tmp_path / "page.jpg")


def test_captioner_refuses_an_image_that_cannot_be_resized(captioner):
    with pytest.raises(UserError, match="the image: cannot be resized: it is too long and thin"):
        captioner(Image.new("RGB", (2_000_000, 1)))


def test_captioner_refuses_an_llm_of_another_width(trained, tmp_path):
    state = {"weight": torch.zeros(48, 32), "bias": torch.zeros(48)}
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in state.items()}, tmp_path / "p.bin")
    with pytest.raises(UserError, match="width 48.* takes 64"):
        Captioner.load(tmp_path / "p.bin", llm=str(trained.llm), vision_tower=str(trained.tower))


def test_placement_refuses_quantization_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UserError, match="--bits 4 needs a CUDA device"):
        Placement(bits=4).torch_device()


def test_load_projector_projects_cached_features(trained, captioner):
    features = FeatureCache(trained.cache).read_tensor(trained.keys[:2])
    projected = load_projector(trained.run)(features)
    assert projected.shape == (2, 16, 64)
    assert torch.equal(projected, captioner.model.mm_projector(features))


def test_load_projector_refuses_weights_of_another_type(trained, tmp_path):
    torch.save({"model.mm_projector.0.weight": torch.zeros(4, 4)}, tmp_path / "p.bin")
    with pytest.raises(UserError, match="a mlp1x_gelu projector has"):
        load_projector(tmp_path / "p.bin", llm="a", vision_tower="b")


def test_captioner_refuses_a_cache_of_another_layer(trained, monkeypatch):
    monkeypatch.setattr("llava_twophase.deploy.captioner.read_causal_lm", lambda *_: pytest.fail("loaded the LLM"))
    with pytest.raises(UserError, match="select_layer: the cache has -2, this run -1"):
        Captioner.load(trained.run, feature_cache=trained.cache, select_layer=-1)


@pytest.mark.parametrize("wrong", ["width", "cache", "device", "llm"])
def test_captioner_finds_problems_before_the_llm_loads(wrong, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_twophase.deploy.captioner.read_causal_lm", lambda *_: pytest.fail("loaded the LLM"))
    state = {"weight": torch.zeros(48, 32), "bias": torch.zeros(48)}
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in state.items()}, tmp_path / "p.bin")
    models = {"llm": str(trained.llm), "vision_tower": str(trained.tower)}
    calls = {
        "width": lambda: Captioner.load(tmp_path / "p.bin", **models),
        "cache": lambda: Captioner.load(trained.run, feature_cache=tmp_path),
        "device": lambda: Captioner.load(trained.run, Placement(device="cuda:99")),
        "llm": lambda: Captioner.load(trained.run, llm=str(trained.tower)),
    }
    with pytest.raises(UserError):
        calls[wrong]()


def test_captioner_checks_the_llms_embedding_input(trained, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "llava_twophase.deploy.captioner.check_embedding_input", lambda name, llm: checked.append((name, llm.training))
    )
    Captioner.load(trained.run)
    assert checked == [(str(trained.llm), False)]
