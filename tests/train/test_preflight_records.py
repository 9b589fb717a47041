"""Records with absolute image paths, and records that do not fit the LLM."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from drawn import make_record, write_records
from llava_twophase.errors import UserError
from llava_twophase.train.preflight import prepare_inputs


def test_prepare_inputs_makes_absolute_image_paths_relative_to_the_image_folder(arguments_of, tmp_path):
    images = tmp_path / "images"
    inputs = prepare_inputs(arguments_of(lambda key: images / key, image_folder=images))
    assert [record.image for record in inputs.records] == arguments_of.keys


def test_prepare_inputs_asks_for_the_image_folder_of_absolute_paths(arguments_of, tmp_path):
    arguments = arguments_of(lambda key: tmp_path / "images" / key)
    with pytest.raises(UserError, match=r"is absolute: give --image_folder"):
        prepare_inputs(arguments)


def test_prepare_inputs_identifies_a_record_that_does_not_fit_by_image_and_caption(arguments_of, tiny_llama, tmp_path):
    """Held-out records are drawn at random, so a position would not be that of the data file."""
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["<zebra>"])
    tokenizer.save_pretrained(llm)
    arguments, keys = arguments_of(model_name_or_path=llm, eval_fraction=0.5), arguments_of.keys
    captions = {keys[-1]: "a <zebra> here"}
    records = [make_record(key, key, captions.get(key, "a red circle")) for key in keys]
    write_records(records, Path(arguments.data.data_path))
    with pytest.raises(UserError, match=rf"record of {re.escape(keys[-1])} \('a <zebra> here'\) contains token id"):
        prepare_inputs(arguments)
