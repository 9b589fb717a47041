"""``push`` and ``pull``: copy a cache to or from a URL, shard by shard, so that an interrupted copy is resumed.

fsspec and huggingface_hub make the requests. The manifest is written last: until then, the copy is not a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_twophase.cache.check.files import Problem
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import MANIFEST, QUARANTINE, SHARDS, fingerprint_hash
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.remote import RemoteStorage
from llava_twophase.cache.remote_errors import explain
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_files import check_shard, compare_with_entry
from llava_twophase.cache.staging import copy_shard
from llava_twophase.cache.storage import is_url
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors, replace_file, require_free_space, require_writable
from llava_twophase.inspection import output
from llava_twophase.inspection.card import dataset_card
from llava_twophase.text import counted, format_bytes

_HUB = "hf://"
_READ_ONLY = ("http://", "https://")
# The Hub limits commits, not files.
_FILES_IN_A_COMMIT = 50
CARD = "README.md"


def run_push(path: str, url: str, as_json: bool) -> int:
    """Copy a cache to a URL; return 1 if the copy is not intact."""
    if is_url(path) or not is_url(url):
        raise UserError(f"push copies a folder to a URL, not {path} to {url}; pull copies a URL to a folder")
    if url.startswith(_READ_ONLY):
        raise UserError(f"{url} cannot be written: a web server is read-only; push to s3://, gs://, hf://datasets/...")
    cache, target = FeatureCache(path), RemoteStorage(url)
    _require_same(target, cache.manifest)
    waiting = [entry for entry in cache.manifest.shards if not _is_there(target, entry, cache.manifest)]
    names = [f"{SHARDS}/{entry.file}" for entry in waiting]
    names += [QUARANTINE] if (Path(path) / QUARANTINE).exists() else []
    for _ in tqdm(_upload(Path(path), target, names), total=len(names), desc="push", unit="file", disable=None):
        pass
    if url.startswith(_HUB):
        _upload_card(target, cache)
    list(_upload(Path(path), target, [MANIFEST]))
    problems = verify(url)
    values = _values(path, url, cache.manifest, len(waiting), problems)
    output.print_result(values, as_json, lambda out: output.print_line(_in_words("pushed", values), out))
    return 0 if values["ok"] else 1


def run_pull(url: str, path: str, as_json: bool) -> int:
    """Copy a cache from a URL to a folder, and compare each shard with its checksums."""
    folder = Path(path)
    if not is_url(url) or is_url(path):
        raise UserError(f"pull copies a URL to a folder, not {url} to {path}; push copies a folder to a URL")
    source = RemoteStorage(url)
    manifest = read_manifest(source)
    if not manifest.complete:
        raise UserError(f"{url} is incomplete; push it again when its extraction has ended")
    require_writable(folder, "the folder")
    existing = read_manifest(folder) if (folder / MANIFEST).exists() else manifest
    if existing != manifest:
        raise UserError(f"{path} holds another cache than {url}; give an empty folder")
    with (
        explain_os_errors(folder, "the folder", lambda: "run the same command again, which resumes it"),
        CacheSession(folder, read=False) as session,
    ):
        copied = _download(source, folder, manifest)
        quarantine = source.read_file(QUARANTINE)
        if quarantine is not None:
            with replace_file(folder / QUARANTINE) as file:
                file.write(quarantine)
        session.replace(manifest)
    values = _values(url, path, manifest, copied, [])
    output.print_result(values, as_json, lambda out: output.print_line(_in_words("pulled", values), out))
    return 0


def _download(source: RemoteStorage, folder: Path, manifest: Manifest) -> int:
    # Returns the number of copied shards; shards of an earlier, interrupted pull are complete.
    waiting = []
    for entry in manifest.shards:
        if (folder / SHARDS / entry.file).exists():
            check_shard(folder, entry, manifest.fingerprint)
        else:
            waiting.append(entry)
    needed = sum(entry.file_bytes for entry in waiting)
    require_free_space(folder, needed, counted(len(waiting), "shard"), "free some space or give another folder")
    with tqdm(total=needed, unit="B", unit_scale=True, desc="pull", disable=None) as bar:
        for entry in waiting:
            copy_shard(source.open_shard(entry.file), folder / SHARDS / entry.file, entry, manifest)
            bar.update(entry.file_bytes)
    return len(waiting)


def _require_same(target: RemoteStorage, manifest: Manifest) -> None:
    # Shards of two caches in one place would be reported as damage.
    if target.read_file(MANIFEST) is not None and read_manifest(target) != manifest:
        raise UserError(f"{target} holds another cache; give another URL, or remove what is there")


def _is_there(target: RemoteStorage, entry: ShardEntry, manifest: Manifest) -> bool:
    # The header has the checksum of the rest of the file; every bit is compared after the last upload.
    try:
        header = target.open_shard(entry.file).header()
        compare_with_entry(header, entry, fingerprint_hash(manifest.fingerprint), MANIFEST)
    except UserError:
        return False
    return True


def _upload(folder: Path, target: RemoteStorage, names: list[str]) -> Iterator[str]:
    if not str(target).startswith(_HUB):
        for name in names:
            target.upload(folder / name, name)
            yield name
        return
    for first in range(0, len(names), _FILES_IN_A_COMMIT):
        part = names[first : first + _FILES_IN_A_COMMIT]
        _commit(target, {name: folder / name for name in part})
        yield from part


def _commit(target: RemoteStorage, files: dict[str, Path | bytes]) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem

    try:
        place: Any = HfFileSystem().resolve_path(str(target).removeprefix(_HUB))
        if not hasattr(place, "repo_id"):
            raise UserError(f"{target} is not in a repository; push to hf://datasets/USER/NAME")
        HfApi().create_commit(
            repo_id=place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            operations=[
                CommitOperationAdd(
                    path_in_repo=f"{place.path_in_repo}/{name}".lstrip("/"),
                    path_or_fileobj=content if isinstance(content, bytes) else str(content),
                )
                for name, content in files.items()
            ],
            commit_message=f"Add {counted(len(files), 'file')} of a feature cache",
        )
    except FileNotFoundError:
        advice = "create the dataset first: hf repos create NAME --type dataset"
        raise UserError(f"{target} is not in a repository that these credentials can write; {advice}") from None
    except Exception as error:
        # The client's own errors about an upload say only which file it was.
        raise explain(str(target), error.__cause__ or error, "written") from error


def _upload_card(target: RemoteStorage, cache: FeatureCache) -> None:
    # A card that somebody edited is kept.
    if target.read_file(CARD) is None:
        _commit(target, {CARD: dataset_card(cache, str(target)).encode("utf-8")})


def _values(source: str, target: str, manifest: Manifest, copied: int, problems: list[Problem]) -> dict[str, Any]:
    return {
        "from": source,
        "to": target,
        "shards": len(manifest.shards),
        "copied": copied,
        "bytes": sum(entry.file_bytes for entry in manifest.shards),
        "ok": all(problem.note for problem in problems),
        "problems": [asdict(problem) for problem in problems],
    }


def _in_words(done: str, values: dict[str, Any]) -> str:
    shards = counted(values["shards"], "shard")
    text = f"{done} {shards} ({format_bytes(values['bytes'])}) to {values['to']}; {values['copied']} were copied now"
    if values["ok"]:
        return f"{text}; every checksum matches"
    wrong = "\n".join(f"  {problem['file']}: {problem['what']}" for problem in values["problems"])
    return f"{text}; the copy is not intact:\n{wrong}"
