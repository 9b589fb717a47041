"""Which ids captions become, and what rows begin with, whatever a tokenizer's files say."""

import json
import pickle

import pytest
import sentencepiece
from tokenizers import processors
from transformers import AutoTokenizer

import tiny
from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer, most_tokens

BOS = 1


@pytest.fixture
def load(tmp_path, image_set):
    """Writes a tokenizer, changes its settings, and loads it for captions."""

    def load(settings=None, add_bos=True, template=None, **tokens):
        tokenizer = tiny.train_tokenizer(image_set.captions, add_bos)
        if template is not None:
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=ids
            )
        for name, token in tokens.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        content = json.loads(path.read_text(encoding="utf-8")) | (settings or {})
        path.write_text(json.dumps(content), encoding="utf-8")
        return load_caption_tokenizer(str(tmp_path), AutoTokenizer.from_pretrained(tmp_path))

    return load


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("flag", [True, False, None])
def test_load_caption_tokenizer_honours_add_bos_token(load, add_bos, flag, caplog):
    tokenizer = load({} if flag is None else {"add_bos_token": flag}, add_bos)
    begins_with_bos = add_bos if flag is None else flag
    assert tokenizer.bos == (BOS if begins_with_bos else None)
    plain = pickle.loads(pickle.dumps(PlainTemplate(tokenizer, 512, 16)))
    input_ids, labels = plain("a red circle")
    assert (input_ids[0] == BOS) is begins_with_bos and plain.image_position == int(begins_with_bos)
    assert labels[: len(plain.prompt)] == [-100] * len(plain.prompt) and -100 not in labels[len(plain.prompt) :]
    # The file and the tokenizer differ: said once.
    assert sum("add_bos_token" in message for message in caplog.messages) == (flag is not None and flag != add_bos)


def test_load_caption_tokenizer_takes_one_of_two_bos(load, caplog):
    tokenizer = load(template="<s> <s> $A")
    assert PlainTemplate(tokenizer, 512, 16)("a")[0].count(BOS) == 1
    assert "adds BOS 2 times; rows have it once" in caplog.text


@pytest.mark.parametrize(("settings", "template"), [({}, "<s> $A </s>"), ({"add_eos_token": True}, None)])
def test_load_caption_tokenizer_adds_no_eos_and_says_so(load, settings, template, caplog):
    tokenizer = load(settings, template=template)
    assert PlainTemplate(tokenizer, 512, 16)("a")[0][-1] != 2
    assert "a caption ends with its newline" in caplog.text


def test_load_caption_tokenizer_takes_no_added_eos_for_a_bos(load):
    """GPT-2 and others have one token for BOS and EOS."""
    assert load(template="$A </s>", bos_token="</s>").bos is None


def test_load_caption_tokenizer_without_a_bos_token_begins_with_the_image(load, caplog):
    tokenizer = load({"add_bos_token": True, "bos_token": None}, add_bos=False)
    assert tokenizer.bos is None and PlainTemplate(tokenizer, 512, 16).image_position == 0
    assert "has no BOS token" in caplog.text


def test_identity_differs_with_the_vocabulary_and_is_equal_in_another_process(load, tmp_path, image_set):
    tokenizer = load()
    code = (
        "import sys, json; from transformers import AutoTokenizer;"
        "from llava_twophase.train.data.tokenizer import load_caption_tokenizer as load;"
        "print(json.dumps(dict(load(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[1])).identity)))"
    )
    assert json.loads(run(["python", "-c", code, tmp_path]).stdout) == dict(tokenizer.identity)
    tiny.train_tokenizer(image_set.captions[:3]).save_pretrained(tmp_path)
    changed = load_caption_tokenizer(str(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
    assert changed.identity != tokenizer.identity


def test_most_tokens_covers_characters_that_normalization_decomposes():
    assert most_tokens("ﷺ") >= 33 and most_tokens("abc") == 5


def test_identity_names_the_file_that_ids_come_from(load, tmp_path, image_set, caplog):
    rebuilt = load()
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(image_set.captions), model_writer=file, vocab_size=300, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    original = load_caption_tokenizer(str(tmp_path), tokenizer)
    assert "tokenizer.model and tokenizer.json give different ids" in caplog.text
    assert (rebuilt.identity["kind"], original.identity["kind"]) == ("tokenizer.json", "tokenizer.model")
    assert original.identity == load_caption_tokenizer(str(tmp_path), tokenizer).identity
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("{", '{"legacy": false, ', 1), encoding="utf-8")
    assert load_caption_tokenizer(str(tmp_path), tokenizer).identity == {**original.identity, "legacy": False}


def test_load_caption_tokenizer_refuses_a_git_lfs_pointer(load, tmp_path):
    load()
    (tmp_path / "tokenizer.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"tokenizer\.model is a Git LFS pointer.*git lfs pull"):
        load()


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"", b"\x00\x01"])
def test_load_caption_tokenizer_ignores_a_tokenizer_model_of_another_kind(load, tmp_path, content):
    """Llama 3 and others name a tiktoken file so."""
    expected = load()
    (tmp_path / "tokenizer.model").write_bytes(content)
    found = load()
    assert found.identity == expected.identity and found.encode("a red circle") == expected.encode("a red circle")
