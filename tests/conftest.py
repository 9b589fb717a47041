"""Session-wide fixtures, all offline, seeded and tiny. Read-only: a test that changes one copies it first."""

import os
import signal
import subprocess

# Before anything imports a Hugging Face library: tests use no hub, and libraries start no threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import drawn
import helpers


def pytest_configure():
    """Handle Ctrl-C: background shells ignore it, and the commands that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where torch sees no accelerator."""
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def shared_memory():
    """Remove the shared memory that DeepSpeed leaves."""
    yield
    helpers.free_shared_memory()


@pytest.fixture(scope="session")
def image_set(tmp_path_factory):
    """Drawn images of every unusual kind with their records: see `drawn.ImageSet`."""
    return drawn.write_image_set(tmp_path_factory.mktemp("image_set"))


@pytest.fixture(scope="session")
def plain_set(image_set, tmp_path_factory):
    """The twelve plain scenes of `image_set`."""
    root = tmp_path_factory.mktemp("plain_set")
    records = image_set.records[: drawn.PLAIN]
    json_path = drawn.write_records(records, root / "records.json")
    return drawn.ImageSet(image_set.folder, json_path, drawn.write_records(records, root / "records.jsonl"), records)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Folder of a CLIPVisionModel and its preprocessor_config.json: 17 tokens (CLS + 16 patches) of 32, four layers."""
    import tiny

    return tiny.write_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_clip_full(tiny_clip, tmp_path_factory):
    """Folder of a CLIPModel with text tower, as published on the hub, with the vision weights of `tiny_clip`."""
    import tiny

    return tiny.write_clip_full(tmp_path_factory.mktemp("tiny_clip_full"), tiny_clip)


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    """Folder of a SiglipVisionModel and its preprocessor_config.json: 16 patches of 32, no CLS, four layers."""
    import tiny

    return tiny.write_siglip(tmp_path_factory.mktemp("tiny_siglip"))


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory):
    """Folder of a Dinov2Model and its preprocessor_config.json: 17 tokens (CLS + 16 patches) of 32, four layers."""
    import tiny

    return tiny.write_dinov2(tmp_path_factory.mktemp("tiny_dinov2"))


@pytest.fixture(scope="session")
def tiny_llama(image_set, tmp_path_factory):
    """Folder of a LlamaForCausalLM (width 64, two layers) and a tokenizer that adds <s>."""
    import tiny

    return tiny.write_llama(tmp_path_factory.mktemp("tiny_llama"), image_set.captions)


@pytest.fixture(scope="session")
def tiny_llama_no_bos(image_set, tmp_path_factory):
    """The same LLM with a tokenizer that knows <s> and does not add it."""
    import tiny

    return tiny.write_llama(tmp_path_factory.mktemp("tiny_llama_no_bos"), image_set.captions, add_bos=False)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs with these options; skip the test if that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


@pytest.fixture
def web(tmp_path):
    """An HTTP server of the test's folder."""
    from remote_servers import FolderServer

    server = FolderServer(tmp_path)
    yield server
    server.close()


@pytest.fixture(scope="session")
def moto():
    from remote_servers import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture
def s3(moto, monkeypatch):
    """A proxy in front of an S3 server; `s3.upload(folder, url)` copies a folder to it."""
    import fsspec

    from remote_servers import Proxy

    proxy = Proxy(moto)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)

    def upload(folder, url):
        files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        if not files.exists(path.partition("/")[0]):
            files.mkdir(path.partition("/")[0])
        files.put(f"{folder}/", path, recursive=True)

    proxy.upload = upload
    yield proxy
    proxy.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face Hub with the dataset `user/features`, and its client directed to it."""
    import fsspec
    from huggingface_hub import constants

    from hub_server import HubServer

    (tmp_path / "hub").mkdir()
    server = HubServer(tmp_path / "hub", "user/features")
    # The client reads these from the environment when it is imported.
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()
    fsspec.get_filesystem_class("hf").clear_instance_cache()
