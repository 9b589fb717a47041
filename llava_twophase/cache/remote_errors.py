"""Errors of fsspec and of the libraries below it: which are final, and what a user can do about them.

The libraries are not imported: each protocol has its own, and none is needed to read a local cache.
"""

from __future__ import annotations

import errno

from llava_twophase.errors import UserError

_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GatedRepoError")
_DENIED = (401, 403)
_FINAL_NUMBERS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
# Status codes below 500 after which the same request may succeed.
_TEMPORARY = (408, 421, 425, 429)


class RangesIgnored(UserError):
    """A server sent a complete file instead of the range that was requested."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, None if it carries none."""
    for value in (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)):
        if isinstance(value, int):
            return value
    return None


def is_missing(error: BaseException) -> bool:
    """Return whether an error says that there is no such file."""
    return isinstance(error, FileNotFoundError) or status_of(error) in (404, 410)


def is_denied(error: BaseException) -> bool:
    """Return whether an error says that credentials are missing or refused."""
    if isinstance(error, PermissionError) or status_of(error) in _DENIED:
        return True
    return type(error).__name__ in _NO_CREDENTIALS


def is_final(error: BaseException) -> bool:
    """Return whether the same request cannot succeed later."""
    if isinstance(error, (UserError, ImportError)) or is_missing(error) or is_denied(error):
        return True
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TEMPORARY
    return isinstance(error, OSError) and error.errno in _FINAL_NUMBERS


def explain(url: str, error: BaseException, action: str = "read") -> UserError:
    """Return what to tell a user about an error that was final, or that repeated requests did not remove.

    Args:
        url: What was requested.
        error: The error.
        action: What could not be done, a participle.
    """
    if isinstance(error, UserError):
        return error
    if is_missing(error):
        return UserError(f"{url} does not exist")
    if is_denied(error):
        return UserError(
            f"{url} cannot be {action}: credentials are missing or were refused ({_reason(error)}); give them as "
            "fsspec reads them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE for s3://, HF_TOKEN or hf "
            "auth login for hf://, a file in ~/.config/fsspec for all"
        )
    if status_of(error) == 416 or isinstance(error, OSError) and error.errno == errno.EINVAL:
        return UserError(f"{url} is truncated, or was replaced by a shorter file ({_reason(error)})")
    return UserError(f"{url} cannot be {action} ({_reason(error)}); check the URL and the network")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name
