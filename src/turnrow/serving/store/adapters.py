"""The adapters that can be asked for by name, their versions, and their weights in host memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from turnrow.errors import AdapterError, UserError, near_matches
from turnrow.serving.layers import served_layers
from turnrow.serving.store.names import BASE, check_name, folder_inside
from turnrow.serving.store.parts import Parts
from turnrow.serving.store.reading import Reader, Stamp, stamp_of

__all__ = ["AdapterStore", "Entry", "Version"]


@dataclass(eq=False)
class Version:
    """The files of an adapter as they were when it was registered or reloaded."""

    name: str
    number: int
    """1 at registration, one more with every reload."""
    folder: Path
    stamp: Stamp
    method: str
    failure: str | None = None
    """Why it cannot be loaded, once that was tried."""
    loading: bool = False
    wanted: bool = False
    """A request waits for its weights, so that they stay in memory until they are taken."""
    nbytes: int = 0
    """On the host, once it was loaded."""


@dataclass(eq=False)
class Entry:
    """A name that requests can ask for. A request keeps its entry, and takes the version that is current when it begins to run."""

    name: str
    version: Version
    """The current one."""
    removed: bool = False


class AdapterStore:
    """Adapters by name: on disk, and as many as fit in host memory.

    Thread-safe. Files are read by a thread of the store's own, so that no request waits for another's adapter. Of weights that
    do not fit in `host_bytes`, the longest unused go; they are read again from disk when they are asked for.

    Args:
        model: the base model, plain. One short forward pass is run to see its layers.
        root: the adapters' folder, where `load` looks and nowhere else; None to allow none.
        host_bytes: for weights in host memory.
        check_base: refuse adapters whose fingerprint of the base differs from the model.
    """

    def __init__(
        self,
        model: nn.Module,
        root: str | os.PathLike[str] | None = None,
        *,
        host_bytes: int = 2 * 1024**3,
        check_base: bool = True,
    ) -> None:
        if host_bytes < 0:
            raise UserError(f"host_bytes is {host_bytes}; it must be 0 or more")
        self.root = None if root is None else Path(root)
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"the adapters' folder {str(root)!r} does not exist")
        self.layers = served_layers(model)
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        self.reader = Reader(model, self.layers, dtype, check_base)
        self.host_bytes = host_bytes
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._weights: OrderedDict[Version, Parts] = OrderedDict()
        self._held_bytes = 0
        self._numbers: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turnrow-adapters")
        self._loads = 0
        self.on_loaded: Callable[[], None] = lambda: None
        """Called by the loading thread when a load has ended, well or not."""

    # --- registering -----------------------------------------------------------------------------------------------

    def add(self, name: str, folder: str | os.PathLike[str], *, whole: bool = True) -> Entry:
        """Register the adapter in `folder`, which may be anywhere.

        Args:
            name: what requests call it.
            folder: in peft's layout.
            whole: read and check all of it now and keep it in memory. Otherwise only its configuration and names are looked at, and
                the rest when it is first asked for.

        Raises:
            AdapterError: the files are bad or belong to another base.
            UserError: the name is not allowed, or taken.
        """
        check_name(name)
        with self._lock:
            self._check_free(name)
        version, weights = self._read(name, Path(folder), whole)
        with self._lock:
            self._check_free(name)  # another thread may have been faster
            entry = self._entries[name] = Entry(name, version)
            self._keep(version, weights)
        return entry

    def load(self, name: str, folder: str | None = None) -> Entry:
        """Register the adapter in the subfolder `folder` (by default called like `name`) of the adapters' folder.

        Raises:
            AdapterError, UserError: as `add`; the folder would lie outside of the adapters' folder, or there is none.
        """
        check_name(name)
        return self.add(name, self._inside(name if folder is None else folder))

    def add_folder(self, root: str | os.PathLike[str] | None = None, *, whole: bool = False) -> dict[str, str]:
        """Register every adapter in the subfolders of `root` (the adapters' folder) under the name of its subfolder.

        Returns:
            The subfolders that were refused, and why.

        Raises:
            UserError: there is no such folder.
        """
        place = self.root if root is None else Path(root)
        if place is None or not place.is_dir():
            raise UserError(f"the adapters' folder {str(place)!r} does not exist")
        refused = {}
        for folder in sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")):
            reason = self._why_not(place, folder.name, whole)
            if reason is not None:
                refused[folder.name] = reason
        return refused

    def reload(self, name: str) -> Entry:
        """Read the folder of a registered adapter again. Requests that run keep what they began with, later ones get the new version.

        Raises:
            AdapterError: the files are bad now; the version of before stays.
            UserError: there is no such adapter.
        """
        entry = self.get(name)
        version, weights = self._read(name, entry.version.folder, True)
        with self._lock:
            self._drop(entry.version)
            entry.version = version
            self._keep(version, weights)
        return entry

    def remove(self, name: str) -> None:
        """Forget an adapter. Requests that were accepted still run with it, new ones are refused; the name is free at once.

        Raises:
            UserError: there is no such adapter.
        """
        with self._lock:
            entry = self.get(name)
            entry.removed = True
            del self._entries[name]
            self._drop(entry.version)

    # --- asking ----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Entry:
        """The adapter of that name.

        Raises:
            UserError: there is none; near names are told.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                hint = near_matches(name, [*self._entries, BASE])
                raise UserError(f"no adapter is called {name!r}{hint}; {len(self._entries)} are registered")
            return entry

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of an adapter, as JSON values.

        Raises:
            UserError: there is none of that name.
        """
        with self._lock:
            version = self.get(name).version
            return {
                "name": name,
                "method": version.method,
                "version": version.number,
                "folder": str(version.folder),
                "in_memory": version in self._weights,
                "bytes": version.nbytes or None,
                "failure": version.failure,
            }

    def __contains__(self, name: object) -> bool:
        """Whether an adapter is called so; at the cost of one look-up, however many there are."""
        with self._lock:
            return name in self._entries

    def names(self) -> list[str]:
        """All names, sorted; that of the base is not among them."""
        with self._lock:
            return sorted(self._entries)

    def stats(self) -> dict[str, int]:
        """How many adapters are registered and in host memory, the bytes of these, and how many were read from disk so far."""
        with self._lock:
            return {
                "registered": len(self._entries),
                "in_memory": len(self._weights),
                "bytes_in_memory": self._held_bytes,
                "loads": self._loads,
            }

    def weights(self, version: Version) -> Parts | None:
        """The weights of a version if they are in memory. Otherwise they are sent for, and `on_loaded` is called when they are there.

        Raises:
            AdapterError: they cannot be loaded.
        """
        with self._lock:
            if version.failure is not None:
                raise AdapterError(version.failure)
            parts = self._weights.get(version)
            version.wanted = parts is None
            if parts is not None:
                self._weights.move_to_end(version)
            elif not version.loading:
                version.loading = True
                self._threads.submit(self._load, version)
            return parts

    def no_longer_wanted(self, version: Version) -> None:
        """Whoever had sent for the weights of a version has gone."""
        with self._lock:
            version.wanted = False

    def close(self) -> None:
        """End the loading thread."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _why_not(self, root: Path, name: str, whole: bool) -> str | None:
        try:
            self.add(name, folder_inside(root, name), whole=whole)
        except UserError as error:
            return str(error)
        return None

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise UserError(
                f"an adapter called {name!r} is registered already, from {self._entries[name].version.folder}: reload it, or remove it first"
            )

    def _inside(self, folder: str) -> Path:
        if self.root is None:
            raise UserError("there is no adapters' folder to load from: give one when the store is made")
        return folder_inside(self.root, folder)

    def _read(self, name: str, folder: Path, whole: bool) -> tuple[Version, Parts | None]:
        stamp = stamp_of(folder)
        method = self.reader.look(folder)
        weights = self.reader.read(folder) if whole else None
        with self._lock:
            number = self._numbers[name] = self._numbers.get(name, 0) + 1
        return Version(name, number, folder.resolve(), stamp, method), weights

    def _load(self, version: Version) -> None:
        """Read a version's weights; in the loading thread."""
        failure, parts = None, None
        try:
            parts = self.reader.read(version.folder)
            if stamp_of(version.folder) != version.stamp:
                raise AdapterError(
                    f"the files of adapter {version.name!r} in {version.folder} were changed since it was registered: reload it"
                )
        except UserError as error:
            failure = str(error)
        except Exception as error:  # a file can break a library in ways that nobody foresaw; the server goes on
            failure = f"adapter {version.name!r} in {version.folder} cannot be read: {type(error).__name__}: {error}"
        with self._lock:
            version.loading, version.failure = False, failure
            if failure is None:
                self._keep(version, parts)
        self.on_loaded()

    def _keep(self, version: Version, parts: Parts | None) -> None:
        if parts is None:
            return
        self._loads += 1
        self._drop(version)
        version.nbytes = sum(part.nbytes for own in parts.values() for part in own)
        self._weights[version] = parts
        self._held_bytes += version.nbytes
        for other in list(self._weights):
            if self._held_bytes <= self.host_bytes:
                break
            if not other.wanted:
                self._drop(other)

    def _drop(self, version: Version) -> None:
        if self._weights.pop(version, None) is not None:
            self._held_bytes -= version.nbytes
