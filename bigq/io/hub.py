"""From MODEL, a folder or a hub id, to a local folder; and single files of hub data sets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from bigq.errors import CheckpointError, ResourceError
from bigq.io.containment import require_contained
from bigq.io.index import MAX_SIZE, MAX_TENSORS, TensorInfo, header_entry
from bigq.io.json_file import show_name

#: What a quantization job needs of a hub repository: weights, configs, tokenizer, licence; no pickles.
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]
#: What planning needs of it.
CONFIG_FILES = ["config.json", "*.py"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def resolve_model(model: str) -> Path:
    """A local folder for MODEL, fetching a hub id (``owner/name`` or ``owner/name@revision``) where it is not a folder.

    All its files lie in it (see ``contained``). Raises CheckpointError where it is neither, or some do not; ResourceError
    where the hub cannot be reached.
    """
    return _local_folder(model) or _snapshot(model, MODEL_FILES)


def resolve_headers(model: str) -> tuple[Path, dict[str, TensorInfo] | None]:
    """For planning: a local folder for MODEL and, of a hub id, what the headers of its shards say. No weights are fetched.

    The tensors' files are names, not paths. Raises as ``resolve_model``.
    """
    folder = _local_folder(model)
    if folder is not None:
        return folder, None
    import huggingface_hub

    folder = _snapshot(model, CONFIG_FILES)
    name, _, revision = model.partition("@")
    with _hub_errors(model):
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision or None)
    tensors: dict[str, TensorInfo] = {}
    for file, header in metadata.files_metadata.items():
        for tensor, info in header.tensors.items():
            said = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            tensors[tensor] = header_entry(Path(file), tensor, said, 0, MAX_SIZE)
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{model}: holds more than {MAX_TENSORS} tensors, which is more than bigq reads")
    return folder, tensors


def _local_folder(model: str) -> Path | None:
    """MODEL where it is a folder, None where it is a hub id. Raises CheckpointError where it can be neither."""
    try:
        folder = Path(model).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or of nobody's home, or no name at all
        raise CheckpointError(f"{show_name(model)}: no such folder (and not a hub id like owner/name)") from None
    if is_folder:
        require_contained(folder)
        return folder
    if is_there:
        raise CheckpointError(f"{model}: is a file; MODEL must be a folder of safetensors shards or a hub id")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder (and not a hub id like owner/name)")
    return None


def _snapshot(model: str, patterns: list[str]) -> Path:
    import huggingface_hub

    name, _, revision = model.partition("@")
    with _hub_errors(model):
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    require_contained(folder)
    return folder


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Tell the hub's errors in our terms."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(
            f"{model}: no such folder, and the hub has no such model (or it is private and you are not logged in)"
        ) from None
    except NotASafetensorsRepoError:
        raise CheckpointError(f"{model}: has no safetensors shards; convert it first") from None
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{model}: a shard's header cannot be read: {show_name(str(error).splitlines()[0])}") from error
    except LocalEntryNotFoundError:
        raise ResourceError(
            f"{model}: no such folder, and the hub cannot be reached to fetch it; download it first or check the network"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ResourceError(f"{model}: fetching it from the hub failed: {show_name(str(error).splitlines()[0])}") from error
    except HFValidationError:
        raise CheckpointError(f"{model}: no such folder, and not a hub id like owner/name") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # What huggingface_hub's reading of headers and listings ends in where the other side sends nonsense.
        raise CheckpointError(f"{model}: what the hub sent of it cannot be read ({type(error).__name__})") from error


def fetch_dataset_file(repository: str, filename: str) -> Path:
    """One file of a hub data set. Raises ResourceError where it cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"the calibration text {repository}/{filename} cannot be fetched ({type(error).__name__}); "
            "give your own text with --calibration FILE, or use --calibration builtin"
        ) from error
