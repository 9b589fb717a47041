"""Fine-tuning an exported model from cached features, without its vision tower."""

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_twophase import FeatureCache, load_records
from llava_twophase.deploy.export_hf import export_hf
from llava_twophase.deploy.hf import CachedFeatureCollator, drop_vision_tower, encoder_outputs
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.24 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_hf(find_projector(trained.run), tmp_path_factory.mktemp("hf") / "model")


def lora(exported):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def batch_of(exported, trained):
    samples = [{"image": record.image, "text": record.caption} for record in load_records(trained.records)[:3]]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    return samples, CachedFeatureCollator(tokenizer, FeatureCache(trained.cache))(samples)


def test_collator_masks_everything_except_the_caption(exported, trained):
    _, batch = batch_of(exported, trained)
    image_id = AutoTokenizer.from_pretrained(exported).convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [16, 16, 16]
    assert (batch["labels"][batch["input_ids"] == image_id] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"][:, 0] == -100).all()  # BOS
    learned = (batch["attention_mask"] == 1).sum(1) - 17
    assert torch.equal((batch["labels"] != -100).sum(1), learned)
    assert batch["features"].shape == (3, 16, 32)


def test_collator_learns_a_bos_token_inside_a_caption(exported, trained):
    """GPT-2 and Qwen use one token for BOS, EOS and padding; only the one in front of the image is masked."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    collate = CachedFeatureCollator(tokenizer, FeatureCache(trained.cache))
    labels = collate([{"image": trained.keys[0], "text": f"a{tokenizer.bos_token}b"}])["labels"][0]
    assert (labels == tokenizer.bos_token_id).sum() == 1 and labels[0] == -100


def test_encoder_outputs_refuses_features_of_another_width(exported):
    with pytest.raises(UserError, match="the features have the width 8, but the model's projector takes 32"):
        encoder_outputs(lora(exported), torch.zeros(1, 16, 8))


def test_lora_step_from_the_cache_equals_one_from_pixels(exported, trained):
    samples, batch = batch_of(exported, trained)
    features = batch.pop("features")
    tower = VisionTower(str(trained.tower), Preprocessor(str(trained.tower)))
    crops = [tower.preprocessor.crop(picture(trained, sample)) for sample in samples]
    pixels = tower.preprocessor.pixel_values(torch.stack([torch.from_numpy(crop) for crop in crops]))
    results = []
    for name in ("pixels", "cache"):
        model = lora(exported)
        if name == "cache":
            drop_vision_tower(model)
            output = model(**batch, mm_encoder_outputs=encoder_outputs(model, features))
        else:
            output = model(**batch, pixel_values=pixels)
        output.loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if "lora" in key and p.grad is not None}
        results.append((output.loss.item(), gradients))
    (loss, gradients), (cached_loss, cached_gradients) = results
    assert loss == cached_loss and gradients and gradients.keys() == cached_gradients.keys()
    assert all(torch.equal(gradients[key], cached_gradients[key]) for key in gradients)


def test_drop_vision_tower_frees_its_weights(exported):
    model = lora(exported)
    before = sum(parameter.numel() for parameter in model.parameters())
    drop_vision_tower(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def picture(trained, sample):
    from llava_twophase.deploy.image_features import open_image

    return open_image(trained.images / sample["image"])
