"""Servers for tests of remote caches."""

import pytest

from remote_servers import FolderServer, Proxy, s3_server


@pytest.fixture
def web(tmp_path):
    """An HTTP server of the test's folder."""
    server = FolderServer(tmp_path)
    yield server
    server.close()


@pytest.fixture(scope="session")
def moto():
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(moto, monkeypatch):
    """A proxy in front of an S3 server; `s3.upload(folder, url)` copies a folder to it."""
    import fsspec

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
