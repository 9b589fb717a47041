"""Captions to ids and labels."""

import pytest
from transformers import AutoTokenizer

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.data.conversation import PlainTemplate, text_encoder


def template(folder, model_max_length=2048, image_tokens=16):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, PlainTemplate(tokenizer, text_encoder(str(folder), tokenizer), model_max_length, image_tokens)


@pytest.mark.parametrize(
    "caption", ["a red circle", "  two leading spaces", "", "緑の線 🟩", "one\ntwo ", "odd <unk> piece"]
)
def test_sequence_is_bos_image_caption_newline(tiny_llama, caption):
    tokenizer, plain = template(tiny_llama)
    input_ids, labels = plain(caption)
    assert input_ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels[2:] == input_ids[2:]
    assert input_ids[2:] == tokenizer(caption + "\n").input_ids[1:]
    assert plain.image_at == 1


def test_tokenizer_without_bos_puts_the_image_first(tiny_llama_no_bos):
    _, plain = template(tiny_llama_no_bos)
    input_ids, labels = plain("a red circle")
    assert plain.image_at == 0
    assert input_ids[0] == IMAGE_TOKEN_INDEX
    assert labels[0] == IGNORE_INDEX
    assert labels[1:] == input_ids[1:]


def test_empty_caption_still_trains_on_its_newline(tiny_llama):
    _, labels = template(tiny_llama)[1]("")
    assert any(label != IGNORE_INDEX for label in labels)


def test_long_caption_is_cut_to_the_spliced_length(tiny_llama):
    _, plain = template(tiny_llama, model_max_length=24, image_tokens=16)
    input_ids, labels = plain("a red circle " * 50)
    assert len(input_ids) - 1 + 16 == 24
    assert len(labels) == len(input_ids)


def test_length_without_room_for_a_caption_is_refused(tiny_llama):
    with pytest.raises(UserError, match="--model_max_length 17 leaves no room"):
        template(tiny_llama, model_max_length=17, image_tokens=16)
    template(tiny_llama, model_max_length=18, image_tokens=16)
