"""The tensors of a finished folder's shards, compared with its index, its configs, and the model that they describe.

Every function returns problems as (file, problem). Knows nothing of hashes or records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.config import JobConfig
from bigq.inspect.scan import Scan
from bigq.io.formats import PackedLinear
from bigq.io.formats.base import module_of
from bigq.io.index import INDEX_NAME, TensorInfo, read_json_object
from bigq.io.remote.shards import RemoteShards
from bigq.job.finish import quantization_of
from bigq.job.journal import Commit
from bigq.model import skeleton
from bigq.model.blocks import block_linears, find_blocks
from bigq.model.experts.stored import expert_parts
from bigq.model.pager import Pager
from bigq.model.plain import PlainModules, plain_modules
from bigq.model.quantization import original_dtype
from bigq.model.skeleton import linear_weight
from bigq.scheme import scheme_for

Problems = Iterator[tuple[str, str]]


def index_problems(index: Mapping[str, Any], scans: Mapping[str, Scan], total: int) -> Problems:
    """Whether the index names exactly the tensors of the shards, each with its file. scans: of all shards. total: their bytes."""
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    indexed = weight_map if isinstance(weight_map, dict) else {}
    count = Counter(name for scan in scans.values() for name in scan.tensors)
    for file, scan in scans.items():
        for name in scan.tensors:
            if count[name] > 1:
                yield file, f"tensor {name} is in {count[name]} shards"
        astray = [name for name in scan.tensors if indexed.get(name) != file and count[name] == 1]
        if astray:
            where = f"says that {astray[0]} is in {indexed[astray[0]]}" if astray[0] in indexed else f"does not name {astray[0]}"
            more = "" if len(astray) == 1 else f"; the same for {len(astray) - 1} more"
            yield INDEX_NAME, f"{where}, which is in {file}{more}"
    for name in indexed.keys() - count.keys():
        yield INDEX_NAME, f"names tensor {name}, which is in no shard"
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        yield INDEX_NAME, f"its total_size is not {total}"


def config_problems(
    out: Path, job: JobConfig, commits: Sequence[Commit], scans: Mapping[str, Scan], *, trust_remote_code: bool
) -> Problems:
    """Whether config.json and the format's own config file say how the job quantized. Raises DataError where one cannot be parsed."""
    tensors = {name: info for scan in scans.values() for name, info in scan.tensors.items()}
    dtype = original_dtype(read_json_object(out / "config.json"))
    quantization = quantization_of(commits, job, _modules(out, tensors, trust_remote_code=trust_remote_code), {}, dtype)
    if not quantization.packed:
        if "quantization_config" in read_json_object(out / "config.json"):
            yield "config.json", "has a quantization_config, but nothing is quantized"
        return
    expected = job.made.config(quantization)
    files = [("config.json", "quantization_config")] + [(file, None) for file in (job.made.config_file,) if file is not None]
    for file, key in files:
        value = read_json_object(out / file)
        found = value if key is None else value.get(key)
        if not isinstance(found, dict) or {**found, "meta": {}} != {**expected, "meta": {}}:
            yield file, "differs from the settings in the job's record"


def _modules(out: Path, tensors: Mapping[str, TensorInfo], *, trust_remote_code: bool) -> PlainModules:
    """The modules of the model that config.json describes, and of the tensors of the shards."""
    skeleton.silence_transformers()
    config = skeleton.load_config(out, trust_remote_code=trust_remote_code)
    model = skeleton.build(config, torch.float32, trust_remote_code=trust_remote_code)
    return plain_modules(model, find_blocks(model)[0], tensors, experts=expert_parts(model, tensors))


def model_problems(
    out: Path,
    job: JobConfig,
    left_out: tuple[str, ...],
    scans: Mapping[str, Scan],
    remote: RemoteShards | None = None,
    *,
    trust_remote_code: bool,
) -> Problems:
    """Whether the model has all its parameters, and every Linear of its blocks is packed, or not, as the job says.

    remote: has the shards, if ``out`` lacks some. Index and configs must be sound. Raises DataError for what does not fit config.json.
    """
    skeleton.silence_transformers()
    with torch.no_grad():
        pager = Pager(out, device=torch.device("cpu"), dtype="float32", trust_remote_code=trust_remote_code, remote=remote)
    linears = {prefix: linear for scan in scans.values() for prefix, linear in scan.linears.items()}
    zeros = {prefix: seen for scan in scans.values() for prefix, seen in scan.zeros.items()}
    belonging, mark = set(), job.made.mark
    for linear in _linears(pager, head=job.lm_head):
        full, prefix = linear.name, linear.prefix
        scheme = None if full in left_out else scheme_for(full, job.base_scheme, job.rules)
        if scheme is None or prefix is None:
            if scheme is not None:
                yield linear.file, f"{full} is not packed, although the job says that it is"
            continue
        belonging.add(prefix)
        m, n = linear.shape
        expected = PackedLinear(bits=scheme.bits, outputs=m, inputs=n, groups=n // scheme.group_width(n))
        file, middle = pager.checkpoint[job.made.tensor(prefix, mark)].file.name, 2 ** (scheme.bits - 1)
        if f"{full}.weight" in pager.sources:
            yield file, f"tensor {pager.sources[f'{full}.weight'].name} exists although its Linear is packed"
        if prefix not in linears:
            continue  # its tensors do not fit each other, which the scan reports
        if linears[prefix] != expected:
            yield file, f"tensor {job.made.tensor(prefix, mark)} is packed as {linears[prefix]}; the model and the job make it {expected}"
        elif scheme.symmetric and zeros.get(prefix, (middle, middle)) != (middle, middle):
            tensor = job.made.tensor(prefix, job.made.zeros)
            yield file, f"tensor {tensor} holds zero points other than {middle}, although the job is symmetric"
    for prefix in sorted(linears.keys() - belonging):
        yield pager.checkpoint[job.made.tensor(prefix, mark)].file.name, f"{module_of(prefix)} is packed, although the job does not pack it"


@dataclass(frozen=True, slots=True)
class _Linear:
    """A Linear that a job may quantize: its name, its shape, the prefix of its packed tensors (None if it is not packed), and a file that
    holds it."""

    name: str
    shape: tuple[int, int]
    prefix: str | None
    file: str


def _linears(pager: Pager, *, head: bool) -> Iterator[_Linear]:
    """Those of the blocks, of the experts, and the output head if it counts."""
    modules = {f"{pager.blocks_path}.{i}.{name}": m for i, block in enumerate(pager.blocks) for name, m in block_linears(block).items()}
    if head:
        modules[pager.head_name] = pager.head
    for name, module in modules.items():
        m, n = linear_weight(module).shape
        source = pager.source_of(f"{name}.weight")
        yield _Linear(name, (m, n), pager.packed.get(f"{name}.weight"), source.tensors[0].file.name)
    for bank in pager.banks.values():
        for key, sources in bank.sources.items():
            m, n, _ = bank.shapes[key]
            for e, expert in enumerate(sources):
                file = next(expert.tensors).file.name
                for name, prefix in zip(bank.matrices(key, e), bank.packed_prefixes(key, e), strict=True):
                    yield _Linear(name, (m, n), prefix, file)
