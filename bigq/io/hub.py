"""Resolves MODEL, a folder or a hub id, to a local folder; and downloads single files of hub data sets."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, ResourceError, UnsupportedModelError
from bigq.io.containment import require_contained
from bigq.io.folders import STATE_FOLDER
from bigq.io.index import INDEX_NAME, MAX_SIZE, MAX_TENSORS, SINGLE_NAME, TensorInfo, header_entry, read_weight_map
from bigq.io.json_file import show_name

#: Files that a job needs from a hub repository besides shards: configs, the index, tokenizer, code, licence.
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md")
#: Files that planning needs.
PLANNING_FILES = ("config.json", INDEX_NAME, "*.py")
#: Headers that are fetched at a time.
HEADERS_AT_ONCE = 8
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The input of a plan, from a model's headers.

    folder: holds the config. tensors: by name, from the headers of shards on the hub; their files are names, not paths. None if the
    folder holds all shards. missing: bytes of shards that must still be downloaded, to the folder ``cache``.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo] | None = None
    missing: int = 0
    cache: Path | None = None


def resolve_model(model: str) -> Path:
    """A local folder for MODEL. If MODEL is not a folder, it is a hub id (``owner/name`` or ``owner/name@revision``) and is downloaded.

    From a hub repository, the shards that its index names (or the only shard) and small files at its top level are downloaded, and only
    code from its subfolders. All files lie in the returned folder (see ``containment``). Raises CheckpointError if MODEL is neither a
    folder nor the hub id of a model in safetensors, or a file leads out of the folder; ResourceError if the hub cannot be reached.
    """
    folder = _local_folder(model)
    if folder is not None:
        return folder
    folder = _snapshot(model, SIDE_FILES)
    # At the commit of the index, in case a newer one is pushed meanwhile.
    folder = _snapshot(model, [glob.escape(name) for name in _shards(folder)], revision=folder.name)
    if not (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
        raise _no_shards(model)
    return folder


def resolve_headers(model: str) -> Headers:
    """For planning: a local folder for MODEL and, for a hub id, the headers of its shards. No weights are downloaded.

    Raises as ``resolve_model``.
    """
    folder = _local_folder(model)
    if folder is not None:
        return Headers(folder=folder)
    folder = _snapshot(model, PLANNING_FILES)
    shards = _shards(folder)
    if all((folder / shard).exists() for shard in shards):
        return Headers(folder=folder)
    tensors, sizes = _remote_headers(model, folder, shards)
    missing = sum(size for shard, size in sizes.items() if not (folder / shard).exists())
    return Headers(folder=folder, tensors=tensors, missing=missing, cache=folder.parents[2])


def _shards(folder: Path) -> list[str]:
    """File names of the shards of a snapshot, from its index if there is one."""
    index = folder / INDEX_NAME
    return list(dict.fromkeys(read_weight_map(index).values())) if index.exists() else [SINGLE_NAME]


def _remote_headers(model: str, folder: Path, shards: Sequence[str]) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of shards on the hub, and the shards' bytes by file name. folder: the snapshot of their commit."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    name, indexed = model.partition("@")[0], (folder / INDEX_NAME).exists()

    def fetch(shard: str) -> Any:
        return huggingface_hub.parse_safetensors_file_metadata(name, shard, revision=folder.name)

    with _hub_errors(model), ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        try:
            headers = dict(zip(shards, pool.map(fetch, shards), strict=True))
        except EntryNotFoundError:
            if not indexed:
                raise _no_shards(model) from None
            raise CheckpointError(f"{model}: its index names a shard that the repository lacks; use another revision of it") from None
    index = read_weight_map(folder / INDEX_NAME) if indexed else None
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    for shard, header in headers.items():
        for tensor, info in header.tensors.items():
            said = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            entry = header_entry(Path(shard), tensor, said, 0, MAX_SIZE)
            sizes[shard] = max(sizes.get(shard, 0), entry.stop)
            if index is None or index.get(tensor) == shard:
                tensors[tensor] = entry
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{model}: holds more than {MAX_TENSORS} tensors, which is more than bigq reads")
    return tensors, sizes


def _no_shards(model: str) -> CheckpointError:
    return CheckpointError(f"{model}: has no safetensors shards; convert it to safetensors first")


def _first_line(error: Exception) -> str:
    return show_name((str(error).splitlines() or [type(error).__name__])[0])


def _local_folder(model: str) -> Path | None:
    """MODEL if it is a folder, None if it is a hub id. Raises CheckpointError if it can be neither."""
    try:
        folder = Path(model).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, of an unknown home directory, or invalid
        raise CheckpointError(f"{show_name(model)}: no such folder (and not a hub id like owner/name)") from None
    if is_folder:
        require_contained(folder)
        # The folder of an unfinished job has no config.json either; its readers say what to do with it.
        if not (folder / "config.json").exists() and not (folder / STATE_FOLDER).exists():
            if (folder / "model_index.json").exists():
                raise UnsupportedModelError(
                    f"{folder}: is a diffusion pipeline (model_index.json), not a causal language model, which bigq needs"
                )
            raise CheckpointError(
                f"{folder / 'config.json'}: missing; MODEL must be a folder with config.json and safetensors shards, or a hub id"
            )
        return folder
    if is_there:
        raise CheckpointError(f"{model}: is a file; MODEL must be a folder of safetensors shards or a hub id")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder (and not a hub id like owner/name)")
    return None


def _snapshot(model: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a hub repository's snapshot, with the files that match. revision: in place of MODEL's own."""
    import huggingface_hub

    name, _, own = model.partition("@")
    # Patterns also match in subfolders of the repository (original/, onnx/), from which only code is needed.
    inner = [f"*/{pattern}" for pattern in patterns if pattern != "*.py"]
    with _hub_errors(model):
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision or own or None, allow_patterns=list(patterns), ignore_patterns=inner)
        )
    require_contained(folder)
    return folder


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Raise CheckpointError or ResourceError in place of the hub client's errors."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    # The base class of the client's errors and of its HTTP library's, such as failed connections and timeouts.
    http_error = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(
            f"{model}: no such folder, and the hub has no such model (or it is private and you are not logged in)"
        ) from None
    except NotASafetensorsRepoError:
        raise _no_shards(model) from None
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{model}: a shard's header cannot be read: {_first_line(error)}") from error
    except LocalEntryNotFoundError:
        raise ResourceError(
            f"{model}: no such folder, and the hub cannot be reached to fetch it; download it first or check the network"
        ) from None
    except (HfHubHTTPError, http_error, OSError) as error:
        raise ResourceError(f"{model}: fetching it from the hub failed: {_first_line(error)}; run the same command again") from error
    except HFValidationError:
        raise CheckpointError(f"{model}: no such folder, and not a hub id like owner/name") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # Raised by huggingface_hub for malformed headers or listings.
        raise CheckpointError(f"{model}: the hub sent malformed data ({type(error).__name__}); try again later") from error


def fetch_dataset_file(repository: str, filename: str, option: str = "--calibration") -> Path:
    """One file of a hub data set. option: for messages. Raises ResourceError if it cannot be downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = "calibration text" if option == "--calibration" else "text"
        raise ResourceError(
            f"the {what} {repository}/{filename} cannot be fetched ({type(error).__name__}); "
            f"give your own text with {option} FILE, or use {option} builtin"
        ) from error


def cached_dataset_file(repository: str, filename: str) -> Path | None:
    """One file of a hub data set if it was fetched before. Asks no server."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, filename, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None
