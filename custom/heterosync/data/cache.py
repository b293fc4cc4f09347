"""Decoded and resized pictures, kept between runs as one memory-mapped uint8 array per task and preprocessing.

A cache is an index (JSON) and an array (.npy) whose name follows from the content of all source files and from the
preprocessing. Files whose size and time stamps are unchanged are trusted; others are hashed again, and decoded again
when their content changed. Both parts are put in place in one step, so any number of processes may share a cache.
It holds patients' images: it lies in the site folder, or where the site's own HETEROSYNC_CACHE says, never elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from heterosync import pulse
from heterosync.data.decoding import Decoded, Decoding
from heterosync.data.grey import Window
from heterosync.data.packs import split_entry
from heterosync.errors import UserError
from heterosync.files import write_json, write_with

try:
    import fcntl
except ImportError:  # Windows: two processes may then decode the same images at once, which costs only time
    fcntl = None  # type: ignore[assignment]

VERSION = 2  # raise it when decoding or resizing changes
KEPT = 8  # indexes kept in a cache folder: primary and anchor task of four preprocessings
log = logging.getLogger(__name__)


def cache_root(
    folder: Path | str, base: Path | str | None = None, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """Where the cache of a site folder lies, made if need be: below `base`, else below HETEROSYNC_CACHE, else in the
    site folder; None when that is read-only."""
    folder = Path(folder).resolve()
    base = base or environ.get("HETEROSYNC_CACHE")
    if base:  # it may serve several site folders
        root = Path(base).expanduser().resolve() / f"{folder.name}-{_digest(str(folder))[:8]}"
    else:
        root = folder / ".heterosync" / "cache"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "lock", "a"):
            return root
    except OSError as error:
        if base:
            raise UserError(f"cache folder {base}: cannot be written ({error.strerror}): choose another") from error
        log.warning("%s is read-only, its images are decoded at every start: set HETEROSYNC_CACHE", folder.name)
        return None


def load_pictures(
    folder: Path,
    names: Sequence[str],
    size: int | None,
    channels: int = 3,
    window: Window | None = None,
    root: Path | None = None,
    task: str = "primary",
    threads: int | None = None,
    fit: str = "stretch",
) -> Decoded:
    """The pictures `names` of `folder` at `size`, fitted as by `to_size`, from the cache at `root` or else decoded and
    kept there.

    `root` None keeps nothing; `size` None only reads and hashes every picture. Never raises for a bad picture:
    each is reported in `errors`.
    """
    if not names or size is None or root is None:
        return Decoding(folder, names, size, channels, window, threads, fit).in_memory()
    cache = _Cache(root, task, folder, names, size, channels, window, fit)
    found = cache.open()
    if found is None:
        with _locked(root):
            found = cache.open()  # another process may have made it meanwhile
            if found is None:
                found = cache.build(Decoding(folder, names, size, channels, window, threads, fit))
    return found


class _Cache:
    """The cache of one task at one preprocessing."""

    def __init__(
        self,
        root: Path,
        task: str,
        folder: Path,
        names: Sequence[str],
        size: int,
        channels: int,
        window: Window | None,
        fit: str,
    ):
        self.root, self.folder, self.names = root, folder, list(names)
        self.preprocessing = [VERSION, size, channels, window, fit, PIL.__version__, np.__version__]
        self.frame = (channels, size, size)
        self.stem = f"{task}-{size}x{channels}-{_digest(self.preprocessing)[:12]}"
        self.index = root / f"{self.stem}.json"

    def open(self) -> Decoded | None:
        """The cached pictures if every source file still has the content that was decoded."""
        index = self._read_index()
        if index is None or index["rows"] != self.names:
            return None
        files = self._files(index["files"])
        if files is None or _hashes(files) != _hashes(index["files"]):
            return None
        pixels = self._map(index)
        if pixels is None:
            return None
        with suppress(OSError, UserError):  # a cache that cannot be written is still good to read
            if files != index["files"]:  # touched or copied, content the same
                write_json(self.index, index | {"files": files})
            else:
                os.utime(self.index)  # in use: pruned last
        return Decoded(pixels, index["content"])

    def build(self, decoding: Decoding) -> Decoded:
        """Decode, write array and index, drop what they replace. Bad pictures: nothing is written."""
        old = self._read_index()
        # the stamps are taken before decoding: a file edited meanwhile is noticed at the next start
        files = self._files(old["files"] if old else {})
        if files is None:
            return decoding.in_memory()
        keys = [_entry_key(name, files) for name in self.names]
        if old is not None and (pixels := self._map(old)) is not None:
            rows = {_entry_key(name, old["files"]): row for row, name in enumerate(old["rows"])}
            decoding.known = {
                row: (pixels[rows[key]], old["content"][rows[key]]) for row, key in enumerate(keys) if key in rows
            }
        data = f"{self.stem}-{_digest([self.preprocessing, keys])[:16]}.npy"
        try:
            write_with(self.root / data, lambda path: self._write(path, decoding))
        except _BadPictures:
            return decoding.result
        index = {"rows": self.names, "content": decoding.result.content, "files": files, "data": data}
        write_json(self.index, index)
        self._prune()
        decoding.result.pixels = self._map(index)
        if decoding.result.pixels is None:  # pruned by another process on a file system without locks
            return decoding.in_memory()
        return decoding.result

    def _write(self, path: Path, decoding: Decoding) -> None:
        """Plain writes, not a writable map: a full disk is then an error with a name, not a bus error."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.names), *self.frame)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for row, picture in decoding.pictures():
                file.seek(start + row * picture.nbytes)
                file.write(np.ascontiguousarray(picture).data)
        if decoding.result.errors:
            raise _BadPictures

    def _read_index(self) -> dict | None:
        try:
            index = json.loads(self.index.read_text(encoding="utf-8"))
            same = len(index["rows"]) == len(index["content"])
            return index if same and isinstance(index["files"], dict) and isinstance(index["data"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _map(self, index: dict) -> np.ndarray | None:
        try:
            pixels = np.load(self.root / index["data"], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # removed, cut short or damaged: decode again
            return None
        return pixels if pixels.shape == (len(index["rows"]), *self.frame) and pixels.dtype == np.uint8 else None

    def _files(self, known: dict[str, Any]) -> dict[str, Any] | None:
        """Stamps and SHA-256 of all source files, hashed where the stamps are not `known`; None if one is absent."""
        files = {}
        try:
            for name in dict.fromkeys(split_entry(name)[0] for name in self.names):
                status = os.stat(self.folder / name)
                stamps = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
                before = known.get(name)
                if before is None or before["stamps"] != stamps:
                    before = {"stamps": stamps, "sha256": _file_digest(self.folder / name)}
                files[name] = before
        except (OSError, KeyError, TypeError):
            return None
        return files

    def _prune(self) -> None:
        """Drop the indexes used longest ago, arrays that no index names, and temporary files of killed processes."""
        with suppress(OSError):
            indexes = sorted(self.root.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
            named = set()
            for index in indexes[:KEPT]:
                with suppress(ValueError, KeyError, TypeError, OSError):
                    named.add(json.loads(index.read_text(encoding="utf-8"))["data"])
            for path in indexes[KEPT:]:
                path.unlink(missing_ok=True)
            for path in self.root.glob("*.npy"):
                leftover = path.name.startswith(".") and time.time() - path.stat().st_mtime > 86400
                if leftover or (not path.name.startswith(".") and path.name not in named):
                    path.unlink(missing_ok=True)  # processes that still map it keep their pages


class _BadPictures(Exception):
    """Some pictures could not be decoded: the array must not be kept."""


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with its process."""
    with open(root / "lock", "a") as file:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hashes(files: dict[str, Any]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in files.items()}


def _entry_key(name: str, files: dict[str, Any]) -> str:
    file, entry = split_entry(name)
    return f"{files[file]['sha256']}#{'' if entry is None else entry}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pulse.beat()
            digest.update(block)
    return digest.hexdigest()
