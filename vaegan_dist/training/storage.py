"""What the system says of a storage, in words that help."""

import errno
import os
import shutil
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "raise the quota or make room there",
    errno.EROFS: "mount it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the storage",
    errno.ESTALE: "mount it again",
}


def storage_trouble(error: BaseException, folder: Path) -> str:
    """Cause, free space and remedy; empty for an error that is none of the storage's."""
    if isinstance(error, FileNotFoundError) and not folder.is_dir():
        return "the folder is gone: removed, or its storage unmounted; bring it back"
    number = error.errno if isinstance(error, OSError) else None
    if number not in REMEDIES and not isinstance(error, OSError):
        # safetensors wraps the system's error into one of its own and keeps only the words.
        number = next((n for n in REMEDIES if os.strerror(n).lower() in str(error).lower()), None)
    if number not in REMEDIES:
        return ""
    return f"{os.strerror(number)}; {_space(folder)}; {REMEDIES[number]}"


def _space(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f"free space unknown ({error.strerror})"
    return f"{usage.free / 2**20:,.1f} MiB of {usage.total / 2**20:,.1f} MiB free"
