"""Files that are whole at any moment: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from heterosync.errors import UserError

_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space and run again",
    errno.EDQUOT: "the disk quota is used up: free some space and run again",
    errno.EACCES: "no permission to write there: choose another folder or change its owner",
    errno.EPERM: "no permission to write there: choose another folder or change its owner",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of that path is a file, not a folder: choose another folder",
    errno.EISDIR: "a folder stands in the place of the file: remove it or choose another name",
}


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn the usual operating-system errors of writing into a `UserError` that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the file said
        cause = _CAUSES.get(told.errno or 0) if isinstance(told, OSError) else None
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause}") from error


def make_folder(path: Path | str) -> Path:
    """Create a folder with its parents; returns it. Raises `UserError` where that is not allowed."""
    path = Path(path)
    with explained(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"cannot write {path}: a file stands there already; choose another folder") from error
    return path


def write_with(path: Path | str, write: Callable[[Path], Any]) -> Path:
    """Let `write(temporary)` make a file, then put it at `path` in one step; nothing is left behind on failure."""
    path = Path(path)
    make_folder(path.parent)
    with explained(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix or ".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    return path


def write_stream(path: Path | str, write: Callable[[BinaryIO], Any]) -> Path:
    """`write_with` for what writes into an open file."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    return write_with(path, fill)


def write_bytes(path: Path | str, data: bytes) -> Path:
    return write_with(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path | str, text: str) -> Path:
    return write_bytes(path, text.encode("utf-8"))


def link_file(source: Path | str, path: Path | str) -> Path:
    """Give a file a second name, in one step; a copy where the file system has no hard links. For files that are
    replaced and never changed."""

    if os.path.exists(path) and os.path.samefile(source, path):
        return Path(path)  # renaming a file onto its other name does nothing, and would leave the temporary name behind

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    return write_with(path, link)


def copy_file(source: Path | str, path: Path | str) -> Path:
    """`link_file` for what is appended to: what is in it now."""
    return write_with(path, lambda temporary: shutil.copyfile(source, temporary))


def write_json(path: Path | str, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read JSON; raises `UserError` when the file is absent or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): restore it or delete it") from error


def content_digest(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes; of a folder, of the names and sizes of all its files; "" where nothing is."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        digest.update(json.dumps(sorted(sizes.items())).encode())
    elif path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        return ""
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path | str, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary folder, then put it at `path`, in one step where nothing is there yet.

    replace: a folder that is there goes, as a whole, once the new one is full. Without it, raises `UserError` when
    something is there.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (replace and path.is_dir()):
        raise UserError(f"{path} exists already and is not empty: choose another folder or remove it")
    make_folder(path.parent)
    with explained(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            if replace and path.is_dir():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def own_folder(path: Path | str, mark: str, command: str) -> Path:
    """An empty folder that holds the file `mark`; what an earlier run of `command` left there is replaced.

    Raises `UserError` when it holds anything else.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        if not (path / mark).exists():
            raise UserError(f"{path} holds files that are not from `{command}`: choose another --out")
        with explained(path):
            shutil.rmtree(path)
    make_folder(path)
    write_text(path / mark, f"Written by `{command}`, which may replace this folder.\n")
    return path


def try_lock(file: IO[Any]) -> bool:
    """Whether the lock on `file` is ours now; it ends with the process. True where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


@contextmanager
def held(path: Path | str, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, until this process ends at the latest.

    Raises `UserError` with the line `busy` when another holder has it.
    """
    with explained(path):
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    with os.fdopen(handle) as file:
        if not try_lock(file):
            raise UserError(busy)
        yield
