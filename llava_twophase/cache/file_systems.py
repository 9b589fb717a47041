"""The file system of fsspec for a URL, or what to install or to type if there is none."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from llava_twophase.cache.remote_errors import explain
from llava_twophase.errors import UserError

# Protocols whose packages the extra installs.
_OF_THE_EXTRA = ("http", "https", "s3", "s3a", "hf")


def connect(url: str, connections: int) -> tuple[Any, str]:
    """Return a new file system of fsspec, which shares no connections with others, and the URL's path in it.

    Args:
        url: The URL.
        connections: Requests at the same time.

    Raises:
        UserError: No installed package reads the URL, or the protocol's library refuses it.
    """
    protocol = url.partition("://")[0]
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
        from fsspec.registry import available_protocols, registry

        # The registry has those that were registered with a class at run time.
        known = {*available_protocols(), *registry}
        if "::" not in protocol and protocol not in known:
            raise _unknown(url, protocol, sorted(known))
        options: dict[str, Any] = {"skip_instance_cache": True}
        if protocol == "s3":  # botocore's own limit is 10 connections
            configured = conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"max_pool_connections": connections, **configured}
        if protocol in ("file", "local"):  # folders are created, as object storage needs none
            options["auto_mkdir"] = True
        files, path = url_to_fs(url, **options)
    except UserError:
        raise
    except ImportError as error:
        raise _not_installed(url, protocol, error) from error
    except (ValueError, OSError) as error:
        raise explain(url, error) from error
    return files, path


def _unknown(url: str, protocol: str, known: list[str]) -> UserError:
    close = get_close_matches(protocol.lower(), [name for name in known if name != "hdfs"], n=1)
    meant = (
        f"did you mean {close[0]}://{url.partition('://')[2]}?" if close else "expected https://, s3://, gs://, hf://"
    )
    return UserError(f"{url} cannot be read: {protocol}:// is not a protocol that fsspec reads; {meant}")


def _not_installed(url: str, protocol: str, error: ImportError) -> UserError:
    package = "'llava-twophase[remote]'" if protocol in _OF_THE_EXTRA else _package(protocol)
    found = " ".join(str(error).split()).rstrip(".")
    advice = f"; pip install {package}" if package else ""
    return UserError(f"{url} needs a package that is not installed ({found}){advice}")


def _package(protocol: str) -> str | None:
    # fsspec's table has the class of each protocol; classes of fsspec itself need other packages, which the error has.
    from fsspec.registry import known_implementations

    package = known_implementations.get(protocol, {}).get("class", "fsspec.").partition(".")[0]
    return None if package == "fsspec" else str(package).replace("_", "-")
