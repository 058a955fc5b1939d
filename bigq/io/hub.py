"""Resolves MODEL, a folder, a hub id or a URL, to a local folder and, where shards are not downloaded, to those on the server.

Also downloads single files of hub data sets.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import CheckpointError, ResourceError, UnsupportedModelError, UsageError
from bigq.io.adapter import ADAPTER_CONFIG, refuse_adapter
from bigq.io.containment import require_contained
from bigq.io.folders import STATE_FOLDER
from bigq.io.index import INDEX_NAME, SINGLE_NAME, read_weight_map
from bigq.io.json_file import show_name
from bigq.io.remote.http import HubFolder
from bigq.io.remote.shards import RemoteShards
from bigq.io.remote.url import is_url, open_url

#: Files that a job needs from a hub repository besides shards: configs, the index, tokenizer, code, licence.
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md")
#: Patterns that count in subfolders too.
_FROM_SUBFOLDERS = ("*.py", "*.jinja")
#: Files that planning needs.
PLANNING_FILES = ("config.json", INDEX_NAME, ADAPTER_CONFIG, "*.py")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What is known of a model before its weights are fetched.

    folder: holds the config. remote: the shards, with their headers; None if the folder holds them all. missing: bytes of shards that a
    download would fetch, to the folder ``cache``; None for a model that cannot be downloaded.
    """

    folder: Path
    remote: RemoteShards | None = None
    missing: int | None = 0
    cache: Path | None = None


def resolve_model(model: str) -> Path:
    """A local folder for MODEL. If MODEL is not a folder, it is a hub id (``owner/name`` or ``owner/name@revision``) and is downloaded.

    From a hub repository, the shards that its index names (or the only shard) and small files at its top level are downloaded, and only
    code from its subfolders. All files lie in the returned folder (see ``containment``). Raises CheckpointError if MODEL is neither a
    folder nor the hub id of a model in safetensors, or a file leads out of the folder; ResourceError if the hub cannot be reached;
    UsageError for a URL.
    """
    if is_url(model):
        raise UsageError(f"{model}: only bigq quantize and bigq plan read a model from a URL; download it into a folder, and give that")
    folder = _local_folder(model)
    if folder is not None:
        return folder
    folder = _snapshot(model, SIDE_FILES)
    _require_one_model(model, folder)
    # At the commit of the index, in case a newer one is pushed meanwhile.
    folder = _snapshot(model, [glob.escape(name) for name in _shards(folder)], revision=folder.name)
    if not (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
        raise _no_shards(model)
    return folder


def resolve_headers(model: str) -> Headers:
    """For planning: a local folder for MODEL and, for a hub id or a URL, the headers of its shards. No weights are downloaded.

    Raises as ``resolve_model``.
    """
    if is_url(model):
        folder, remote = open_url(model)
        _local_folder(str(folder))
        remote.fetch_headers(_shards(folder))
        return Headers(folder=folder, remote=remote, missing=None)
    local = _local_folder(model)
    if local is not None:
        return Headers(folder=local)
    folder = _snapshot(model, PLANNING_FILES)
    shards = _shards(folder)
    if all((folder / shard).exists() for shard in shards):
        return Headers(folder=folder)
    _require_one_model(model, folder)
    remote = _remote_shards(model, folder, shards)
    missing = sum(size for shard, size in remote.sizes.items() if not (folder / shard).exists())
    return Headers(folder=folder, remote=remote, missing=missing, cache=folder.parents[2])


def require_model(model: str) -> None:
    """Raise as ``resolve_model`` if MODEL is not there, as far as a folder's name or the config of a hub repository shows. URLs pass."""
    if not is_url(model) and _local_folder(model) is None:
        _snapshot(model, ["config.json"])


def resolve_streamed(model: str, headers: Headers) -> Path:
    """The local folder of a model whose shards stay on a server: all that a job needs besides them. headers: of the same model.

    Raises as ``resolve_model``.
    """
    return headers.folder if is_url(model) else _snapshot(model, SIDE_FILES, revision=headers.folder.name)


def _shards(folder: Path) -> list[str]:
    """File names of the shards of a snapshot, from its index if there is one."""
    index = folder / INDEX_NAME
    return list(dict.fromkeys(read_weight_map(index).values())) if index.exists() else [SINGLE_NAME]


def _require_one_model(model: str, folder: Path) -> None:
    """Raise CheckpointError if a repository holds a single file beside the index of other shards. Asked only before shards are fetched."""
    shards = _shards(folder)
    if SINGLE_NAME in shards or all((folder / shard).exists() for shard in shards):
        return
    import huggingface_hub

    with _hub_errors(model):
        both = huggingface_hub.file_exists(model.partition("@")[0], SINGLE_NAME, revision=folder.name)
    if both:
        raise CheckpointError(
            f"{model}: holds {SINGLE_NAME} beside {INDEX_NAME}, which names other files ({min(shards)}); transformers loads the single "
            "file, bigq the shards: download the one that is your model into a folder, and give that"
        )


def _remote_shards(model: str, folder: Path, shards: Sequence[str]) -> RemoteShards:
    """Shards on the hub, with their headers. folder: the snapshot of their commit."""
    import huggingface_hub

    name = model.partition("@")[0]
    if not (folder / INDEX_NAME).exists():
        with _hub_errors(model):
            there = huggingface_hub.file_exists(name, SINGLE_NAME, revision=folder.name)
        if not there:
            raise _no_shards(model)
    remote = RemoteShards(HubFolder(name, folder.name))
    remote.fetch_headers(shards)
    return remote


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
        refuse_adapter(folder)
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
    # Patterns also match in subfolders of the repository (original/, onnx/), from which only code and templates are needed, and the
    # settings of sentence-transformers (1_Pooling/), which are named in full.
    inner = [f"*/{pattern}" for pattern in patterns if pattern not in _FROM_SUBFOLDERS]
    if "*.json" in patterns:
        inner = [*(pattern for pattern in inner if pattern != "*/*.json"), "[!0-9]*/*.json", "*/*/*.json"]
    with _hub_errors(model):
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision or own or None, allow_patterns=list(patterns), ignore_patterns=inner)
        )
    require_contained(folder)
    refuse_adapter(folder)
    return folder


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Raise CheckpointError or ResourceError in place of the hub client's errors."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base class of the client's errors and of its HTTP library's, such as failed connections and timeouts.
    http_error = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(
            f"{model}: no such folder, and the hub has no such model (or it is private and you are not logged in)"
        ) from None
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
