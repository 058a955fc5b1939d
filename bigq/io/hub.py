"""From MODEL, a folder or a hub id, to a local folder; and single files of hub data sets."""

from __future__ import annotations

import re
from pathlib import Path

from bigq.errors import CheckpointError, ResourceError

#: What a quantization job needs of a hub repository: weights, configs, tokenizer, licence; no pickles.
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def resolve_model(model: str, *, metadata_only: bool = False) -> Path:
    """A local folder for MODEL, fetching a hub id (``owner/name`` or ``owner/name@revision``) where it is not a folder.

    Raises CheckpointError where it is neither, ResourceError where the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: is a file; MODEL must be a folder of safetensors shards or a hub id")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder (and not a hub id like owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = model.partition("@")
    patterns = [p for p in MODEL_FILES if not (metadata_only and p == "*.safetensors")]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(
            f"{model}: no such folder, and the hub has no such model (or it is private and you are not logged in)"
        ) from None
    except LocalEntryNotFoundError:
        raise ResourceError(
            f"{model}: no such folder, and the hub cannot be reached to fetch it; download it first or check the network"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ResourceError(f"{model}: fetching it from the hub failed: {str(error).splitlines()[0]}") from error


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
