"""Captions to ids and labels."""

import pytest
from transformers import AutoTokenizer

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer


def template(folder, model_max_length=2048, image_tokens=16, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, PlainTemplate(
        load_caption_tokenizer(str(folder), tokenizer), model_max_length, image_tokens, **options
    )


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle",
        "  two leading spaces",
        "",
        "緑の線 🟩",
        "one\ntwo ",
        "odd <unk> piece",
        "an </s> and a <s> inside",
    ],
)
def test_plain_template_makes_bos_image_caption_newline(tiny_llama, caption):
    tokenizer, plain = template(tiny_llama)
    input_ids, labels = plain(caption)
    assert input_ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels[2:] == input_ids[2:]
    assert input_ids[2:] == tokenizer(caption + "\n").input_ids[1:]
    assert plain.image_position == 1


def test_plain_template_without_bos_begins_with_the_image(tiny_llama_no_bos):
    _, plain = template(tiny_llama_no_bos)
    input_ids, labels = plain("a red circle")
    assert plain.image_position == 0
    assert input_ids[0] == IMAGE_TOKEN_INDEX
    assert labels[0] == IGNORE_INDEX
    assert labels[1:] == input_ids[1:]


def test_plain_template_learns_the_newline_of_an_empty_caption(tiny_llama):
    _, labels = template(tiny_llama)[1]("")
    assert any(label != IGNORE_INDEX for label in labels)


def test_plain_template_truncates_to_the_spliced_length(tiny_llama):
    _, plain = template(tiny_llama, model_max_length=24, image_tokens=16)
    caption = "a red circle " * 1700  # 5,100 words
    input_ids, labels = plain(caption)
    assert len(input_ids) - 1 + 16 == 24
    assert len(labels) == len(input_ids)
    assert plain.truncates(caption) and plain.count_ids(caption) > 5000
    assert not plain.truncates("") and plain.count_ids("") == len(plain("")[0])


@pytest.mark.parametrize("caption", ["a red circle", "緑の線", "ﷺﷺ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "", "  x"])
def test_plain_template_most_ids_is_an_upper_bound(tiny_llama, caption):
    _, plain = template(tiny_llama)
    assert plain.count_ids(caption) <= plain.most_ids(caption)


def test_plain_template_drops_unknown_tokens_on_request(tiny_llama):
    tokenizer, plain = template(tiny_llama)
    _, dropping = template(tiny_llama, drop_unk=True)
    kept, dropped = plain("a ж circle")[0], dropping("a ж circle")[0]
    assert tokenizer.unk_token_id in kept
    assert dropped == [token for token in kept if token != tokenizer.unk_token_id]


def test_plain_template_refuses_a_length_without_room_for_a_caption(tiny_llama):
    with pytest.raises(UserError, match="--model_max_length 17 leaves no room"):
        template(tiny_llama, model_max_length=17, image_tokens=16)
    template(tiny_llama, model_max_length=18, image_tokens=16)
