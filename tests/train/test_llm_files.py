"""What identifies the LLM of a run."""

import pytest

from llava_twophase.train import llm_files
from llava_twophase.train.llm_files import llm_identity


def test_llm_identity_of_a_hub_id_is_the_id():
    assert llm_identity("owner/name") == "owner/name"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_llm_identity_samples_large_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(llm_files, "_SAMPLED_FROM", 1 << 10)
    monkeypatch.setattr(llm_files, "_STRETCH", 1 << 9)
    monkeypatch.setattr(llm_files, "_BLOCK", 16)
    file = tmp_path / f"weights.{suffix}"
    content = bytearray(1 << 12)
    file.write_bytes(content)
    identity = llm_identity(str(tmp_path))
    assert list(identity) == [file.name]
    changed = [content[:1024] + b"x" + content[1025:], content + b"x"]  # in a sampled block; longer
    for other in changed:
        file.write_bytes(other)
        assert llm_identity(str(tmp_path)) != identity
    file.write_bytes(content[:1000])  # a small file is read completely
    small = llm_identity(str(tmp_path))
    file.write_bytes(content[:999] + b"x")
    assert llm_identity(str(tmp_path)) != small
