"""The tokenizer is part of what a resumed run has in common with the interrupted one."""

import shutil

import sentencepiece

from llava_twophase.cache.fingerprint import differences
from llava_twophase.train.identity import run_identity
from llava_twophase.train.preflight import prepare_inputs


def test_run_identity_differs_if_tokenizer_model_disappears(arguments_of, tiny_llama, image_set, tmp_path):
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    arguments = arguments_of(model_name_or_path=llm)
    with (llm / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(image_set.captions), model_writer=file, vocab_size=300, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    first = run_identity(arguments, prepare_inputs(arguments))
    assert differences(first, run_identity(arguments, prepare_inputs(arguments))) == []
    (llm / "tokenizer.model").unlink()
    second = run_identity(arguments, prepare_inputs(arguments))
    found = differences(first, second, ("the checkpoint", "this run"))
    assert "tokenizer.kind: the checkpoint has 'tokenizer.model', this run 'tokenizer.json'" in found
    assert all(line.startswith("tokenizer.") for line in found)
