"""The tokenizer is part of what a resumed run has in common with the interrupted one."""

import shutil

import pytest
import sentencepiece

from cache.make import make_cache
from drawn import make_record, write_records
from llava_twophase.cache.fingerprint import differences
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.identity import run_identity
from llava_twophase.train.preflight import prepare_inputs


@pytest.fixture
def identity(tiny_llama, tmp_path):
    """Writes an LLM's folder that the test may change; returns it and the identity of a run with it."""
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    cache, keys, _ = make_cache(tmp_path / "cache")
    records = write_records([make_record(key, key, "a red circle") for key in keys], tmp_path / "records.json")
    flags = {
        "model_name_or_path": llm,
        "data_path": records,
        "vision_tower": "my/tower",
        "feature_cache": cache,
        "tune_mm_mlp_adapter": True,
        "output_dir": tmp_path / "out",
        "report_to": "none",
        "use_cpu": True,
    }

    def identity():
        arguments = parse_arguments([part for name, value in flags.items() for part in (f"--{name}", str(value))])
        return run_identity(arguments, prepare_inputs(arguments))

    return llm, identity


def test_run_identity_differs_if_tokenizer_model_disappears(identity, image_set):
    llm, identity = identity
    with (llm / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(image_set.captions), model_writer=file, vocab_size=300, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    first = identity()
    assert differences(first, identity()) == []
    (llm / "tokenizer.model").unlink()
    found = differences(first, identity(), ("the checkpoint", "this run"))
    assert "tokenizer.kind: the checkpoint has 'tokenizer.model', this run 'tokenizer.json'" in found
    assert all(line.startswith("tokenizer.") for line in found)
