"""Captions generated during training: the pages and their pictures."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from cache.make import FINGERPRINT, make_cache
from drawn import make_record, write_records
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.records import load_records
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.on_the_fly import Thumbnails
from llava_twophase.train.data.source import CachedFeatures
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.data.tower_check import TowerSettings
from llava_twophase.train.loop.generated_captions import CaptionSamples, generate_captions
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.projector import build_projector

SETTINGS = TowerSettings("my/tower", select_layer=-2, select_feature="patch", image_aspect_ratio="square")


@pytest.fixture
def samples_of(tiny_llama, tmp_path):
    """Makes the callback over a cache of two images, with the images or without; and evaluates at a step."""
    torch.manual_seed(0)
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(2,), fingerprint=FINGERPRINT)
    records = [make_record(key, key, f"a <b>red</b> circle {number}") for number, key in enumerate(keys)]
    records = load_records(write_records(records, tmp_path / "records.json"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    template = PlainTemplate(load_caption_tokenizer(str(tiny_llama), tokenizer), 512, 9)
    llm = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = LlavaProjectorModel(FrozenLLM(LoadedLLM(llm)), build_projector("linear", 32, llm.config.hidden_size))
    output = tmp_path / "my-run"
    output.mkdir()

    def make(thumbnails=None):
        source = CachedFeatures(FeatureCache(cache), [SETTINGS], thumbnails=thumbnails)
        return CaptionSamples(model, template, tokenizer, records, source, output)

    return make


def evaluate(samples, step, **state):
    history = [{"step": step - 1, "loss": 2.5}, {"step": step, "eval_loss": 1.25 / step}]
    args = SimpleNamespace(device=torch.device("cpu"), run_name=None, report_to=[])
    state = TrainerState(global_step=step, is_world_process_zero=True, log_history=history, **state)
    samples.on_evaluate(args, state, TrainerControl())
    return (samples.folder / "samples" / f"step-{step:06d}.html").read_text(encoding="utf-8")


def test_page_has_run_loss_step_and_links(samples_of):
    samples = samples_of()
    evaluate(samples, 4)
    page = evaluate(samples, 8)
    assert "Captions at step 8" in page and "Run my-run." in page
    assert "Loss 0.1562 on held-out records, 2.5 in training" in page
    assert 'href="index.html"' in page and 'href="step-000004.html"' in page
    index = (samples.folder / "samples" / "index.html").read_text(encoding="utf-8")
    assert all(f'href="step-{step:06d}.html"' in index for step in (4, 8))


def test_page_has_both_captions_escaped(samples_of):
    samples = samples_of()
    page = evaluate(samples, 1)
    assert page.count("true: a &lt;b&gt;red&lt;/b&gt; circle") == 2 and "<b>" not in page
    assert page.count("generated: ") == 2


def test_page_without_image_folder_says_how_to_get_pictures(samples_of, caplog):
    caplog.set_level(logging.INFO)
    page = evaluate(samples_of(), 1)
    assert "add --image_folder to the command" in page and "<img" not in page
    assert "step-000001.html; add --image_folder to the command for pictures" in caplog.text


class FakeImages:
    """Images from a function; an empty file is not a picture."""

    def __init__(self, content):
        self.content = content

    def read(self, key):
        return self.content(key)


def test_page_has_pictures_and_a_grey_square_for_a_bad_image(samples_of, image_set):
    picture = (image_set.folder / image_set.records[0]["image"]).read_bytes()
    images = FakeImages(lambda key: picture if key.endswith("0.jpg") else b"")
    page = evaluate(samples_of(Thumbnails(images)), 1)
    assert page.count('src="data:image/') == 2 and "--image_folder" not in page


def test_evaluation_restores_the_training_mode(samples_of):
    samples = samples_of()
    samples.model.train()
    evaluate(samples, 1)
    assert samples.model.training


def test_generate_captions_ends_at_the_newline(samples_of):
    samples = samples_of()
    features = samples.source.read([record.image for record in samples.records], torch.device("cpu"))
    captions = generate_captions(samples.model.eval(), samples.template, samples.tokenizer, features)
    assert len(captions) == 2 and not any("\n" in caption for caption in captions)
