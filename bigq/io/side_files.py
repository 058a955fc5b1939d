"""The files of a model folder that belong to the model besides its weights and config.json: tokenizer, templates, licence, code.

Files in subfolders belong to it too (``additional_chat_templates/``, ``1_Pooling/``). What a training run left behind does not, nor do
other copies of the weights (``original/``, ``onnx/``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import ResourceError
from bigq.io.containment import hub_blobs

#: Limits of the files in subfolders: bytes of one, bytes of all, how many, and how deep.
MAX_BYTES, MAX_TOTAL, MAX_FILES, MAX_DEPTH = 64 * 2**20, 256 * 2**20, 1000, 8

#: Weights, in every format that programs read. A subfolder with such a file is another copy of the model, or a part that it has no use for.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|gguf|ggml|onnx|onnx_data|tflite|engine|mlmodel|nemo|distcp|pkl|pickle|zip|rar|7z|tar"
    r"|t?gz|bz2|xz|zst)$",
    re.IGNORECASE,
)
#: Files that a training run leaves behind, and the bytes of compiled code.
_LEFTOVERS = re.compile(
    r"(trainer_state\.json|trainer_log\.jsonl|training_args\..*|(all|train|eval|predict)_results\.json|optimizer(\..*|_\d+.*)?|scheduler\..*"
    r"|scaler\..*|rng_state.*|random_states.*|latest|zero_to_fp32\.py|events\.out\.tfevents.*|.*\.(log|pyc|tmp|lock|bigq-tmp))$"
)
#: Folders that a training run or a program leaves behind.
_LEFTOVER_FOLDERS = re.compile(r"(checkpoint[-_]\d+|global_step\d+|runs|logs|wandb|mlruns|tensorboard|lightning_logs|__pycache__)$")
#: Described anew in the output, or about other weights.
_OWN = ("config.json", "quantize_config.json", "hf_quant_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """files: paths in the folder, with slashes, sorted. too_large: of those in subfolders that exceed the limits."""

    files: tuple[str, ...]
    too_large: tuple[str, ...]

    def warnings(self) -> tuple[str, ...]:
        """At most one sentence."""
        if not self.too_large:
            return ()
        count, first = len(self.too_large), self.too_large[0]
        what = f"{first} is" if count == 1 else f"{count} files in subfolders, such as {first}, are"
        limits = f"{MAX_BYTES // 2**20} MiB a file, {MAX_TOTAL // 2**20} MiB and {MAX_FILES} files in all"
        return (f"{what} above the limits for copies from subfolders ({limits}) and not copied; copy what the model needs",)


def is_side_file(name: str) -> bool:
    """Whether a file at the top of a model folder is a side file, by its name."""
    return name not in _OWN and not name.endswith(".index.json") and _is_kept(name)


def side_files(folder: Path) -> SideFiles:
    """The side files of a model folder; links count where they lead to a file of the same folder or hub cache. Raises ResourceError."""
    files: list[str] = []
    too_large: list[str] = []
    total = 0
    for path, size in sorted(_found(folder, "", folder.resolve())):
        if "/" in path:
            over = size > MAX_BYTES or total + size > MAX_TOTAL or sum("/" in file for file in files) >= MAX_FILES
            (too_large if over else files).append(path)
            total += 0 if over else size
        else:
            files.append(path)
    return SideFiles(files=tuple(files), too_large=tuple(too_large))


def _found(folder: Path, prefix: str, root: Path) -> Iterator[tuple[str, int]]:
    """Path and size of the side files in a folder. prefix: of its paths."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        if prefix and any(_WEIGHTS.search(entry.name) for entry in entries):
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if prefix.count("/") < MAX_DEPTH and not entry.name.startswith(".") and not _LEFTOVER_FOLDERS.match(entry.name):
                    yield from _found(Path(entry.path), f"{prefix}{entry.name}/", root)
            elif (_is_kept(entry.name) if prefix else is_side_file(entry.name)) and _is_own_file(entry, root):
                yield prefix + entry.name, entry.stat().st_size
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be listed: {error.strerror}; check the disk, then run the same command again") from error


def _is_kept(name: str) -> bool:
    return not name.startswith(".") and not _WEIGHTS.search(name) and not _LEFTOVERS.match(name)


def _is_own_file(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether an entry is a file, or a link to a file that is in the model folder, or in the blobs of its hub cache."""
    if not entry.is_file():
        return False
    target, blobs = Path(os.path.realpath(entry.path)), hub_blobs(root)
    return not entry.is_symlink() or root in target.parents or (blobs is not None and target.parent == blobs)
