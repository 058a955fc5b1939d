"""Files of object stores and other file systems that fsspec opens: s3, gs, az, …"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigq.errors import CheckpointError, ResourceError, UsageError
from bigq.io.remote.transport import Status, Transient, changed, too_large


class ObjectFolder:
    """A ``Transport`` to a folder by its URL. Raises UsageError for a protocol that fsspec does not know, ResourceError for one whose
    package is missing.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ResourceError(f"{url}: {error}") from None
        except ValueError as error:
            raise UsageError(f"{url}: {error}") from None
        self._root, self._url = str(root).rstrip("/"), url.rstrip("/")

    def address(self, name: str) -> str:
        return f"{self._url}/{name}"

    def status(self, name: str) -> Status:
        path = f"{self._root}/{name}"
        info = self._ask(name, lambda: self._files.info(path))
        return Status(size=int(info["size"]), version=str(self._ask(name, lambda: self._files.ukey(path))))

    def stream(self, name: str, status: Status, start: int, stop: int) -> Iterator[bytes]:
        path = f"{self._root}/{name}"
        if self.status(name) != status:
            raise changed(self.address(name))
        yield self._ask(name, lambda: self._files.cat_file(path, start=start, end=stop))

    def whole(self, name: str, limit: int) -> bytes | None:
        """A small file; None if there is none. Raises ResourceError if it has more than ``limit`` bytes."""
        path = f"{self._root}/{name}"
        if not self._ask(name, lambda: self._files.isfile(path)):
            return None
        if self.status(name).size > limit:
            raise too_large(self.address(name), limit)
        return bytes(self._ask(name, lambda: self._files.cat_file(path)))

    def names(self) -> list[str]:
        """The files of the folder and of its subfolders."""
        found = self._ask("", lambda: self._files.find(self._root))
        self._files.invalidate_cache()  # so that a changed file is noticed
        return [str(path).removeprefix(self._root).lstrip("/") for path in found]

    def _ask(self, name: str, request: Any) -> Any:
        try:
            return request()
        except FileNotFoundError:
            raise CheckpointError(f"{self.address(name)}: is not there; check the address") from None
        except PermissionError as error:
            raise ResourceError(f"{self.address(name)}: access is denied ({error}); check your credentials") from None
        except Exception as error:  # each file system of fsspec has its own errors
            raise Transient(f"{type(error).__name__}: {error}") from error
