"""Plans for real models and machines: looks up config, headers, budgets and rates, and passes them to the planner."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq.calibration import Made, foretell
from bigq.config import JobConfig
from bigq.conversion.gguf import check_gguf_job
from bigq.errors import ResourceError, UsageError
from bigq.io.folders import STATE_FOLDER
from bigq.io.hub import Headers, resolve_headers
from bigq.io.index import REMOTE_SAMPLE, Checkpoint, TensorInfo, unread_warnings
from bigq.io.remote.shards import RemoteShards
from bigq.io.side_files import side_files
from bigq.io.sources.plain import PlainSource
from bigq.job.adapt import Adapted
from bigq.job.journal import read_commits, read_job
from bigq.job.request import require_same_code
from bigq.job.settle import check_shapes, for_ranks, head_scheme, require_format, require_shareable, row_length, settled
from bigq.kernels.pick import compiled_bytes, load_compiled
from bigq.machine.budget import GPU_RESERVE, disk_budget, gpu_budget, host_budget
from bigq.machine.ceilings import DISK_RATE, KNOWN, Ceilings, measure
from bigq.machine.device import choose_device
from bigq.machine.ranks import OneProcess, Ranks
from bigq.methods import method_of
from bigq.mixed.loss import streams_of
from bigq.mixed.settings import with_chosen, without_chosen
from bigq.model import skeleton
from bigq.model.blocks import find_blocks
from bigq.model.description import ModelDescription
from bigq.model.experts.pages import stored_banks
from bigq.model.experts.source import ExpertSource, expert_sources
from bigq.model.experts.stored import merged_beside, merged_parts
from bigq.model.extras import Extras, find_extras
from bigq.model.folding.around import model_folds
from bigq.model.folding.fold import BlockFolds
from bigq.model.forward.fused_attention import fuse_attention
from bigq.model.names import require_parameters
from bigq.model.pager import Pager
from bigq.model.quantization import coded_warnings, decoded_source, refuse_quantized_tensors
from bigq.model.rotation.checkpoint import described_rotation, untie
from bigq.model.tied import tie_warnings
from bigq.progress.records import host_memory
from bigq.sched.plan.budgets import NETWORK_RATE, Budgets, Download, Fetch, Streamed, usual_cache
from bigq.sched.plan.costs.survey import quantized_groups
from bigq.sched.plan.planner import Machine, Plan, make_plan
from bigq.sched.plan.several import with_scaling
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.share import require_share
from bigq.sched.plan.sharing import Assumed, Sharing
from bigq.sched.plan.survey import Outline, survey
from bigq.sched.plan.work import Work
from bigq.scheme import QuantScheme, scheme_for


def plan(model: str, out: str | Path = ".", config: JobConfig | None = None, on: str = "this", assumed: Assumed | None = None) -> Plan:
    """Predict the memory, disk space and time of quantizing a model folder or hub id. No weights are read.

    out: where the output would go. on: "this" machine, or the GPU to plan for, one of ``ceilings.KNOWN``. A folder needs only a
    config.json. For a hub id, config and headers are downloaded, and the shards that the job would download count as disk space.
    assumed: how many processes share the job, and the rate of the disk.
    Raises UsageError, DataError or ResourceError. A job that does not fit is not an error: see ``Plan.fits``.
    """
    config, assumed = config or JobConfig(), assumed or Assumed()
    if on != "this" and on not in KNOWN:
        raise UsageError(f"--on {on}: must be this, {', '.join(KNOWN)}")
    headers = resolve_headers(model)
    device = torch.device("cpu") if on in KNOWN else choose_device(config.device)
    sharing = Sharing(ranks=assumed.ranks, local=assumed.ranks // assumed.hosts)
    rates = _Rates(lambda dtype: KNOWN[on] if on in KNOWN else measure(device, dtype), assumed.disk_rate or DISK_RATE)
    found = _plan(headers, Path(out), config, device, rates, sharing)
    if not found.work.method.calibrated:
        return found
    return dataclasses.replace(found, texts=_texts(config, headers.folder, found.shape.seqlen, found.shape.vocabulary))


def _texts(config: JobConfig, folder: Path, seqlen: int, vocabulary: int) -> tuple[Made, ...]:
    """What would be made of the calibration text, as far as text and tokenizer are here."""
    return foretell(
        config.calibration,
        folder,
        vocabulary=vocabulary,
        samples=config.samples,
        seqlen=seqlen,
        seed=config.seed,
        text_field=config.text_field,
        trust_remote_code=config.trust_remote_code,
    )


def plan_before_fetch(model: str, out: Path, config: JobConfig, ranks: Ranks | None = None) -> tuple[Headers, Plan | None]:
    """What is known of a model, and the plan of its job; no plan if all shards are here.

    config: of the job, new or resumed. ranks: the processes that share it. Only config, index, code and headers are downloaded.
    Raises ResourceError if the job or its download does not fit, and UsageError or DataError if ``quantize`` would refuse it.
    """
    headers = resolve_headers(model)
    if headers.remote is None:
        return headers, None
    before = read_job(out)
    if before is not None and config.trust_remote_code:
        require_same_code(out, before, headers.folder)  # before any code of the model runs
    found = _plan(headers, out, config, choose_device(config.device), _Rates(), Sharing.of(ranks or OneProcess()))
    if not found.fits:
        raise ResourceError(f"{model}: the job does not fit, so nothing is fetched: {'; '.join(found.shortages)}")
    return headers, found


@dataclass(frozen=True, slots=True)
class _Rates:
    """device: for a dtype; None if times are not needed. disk: bytes per second."""

    device: Callable[[torch.dtype], Ceilings | None] = lambda dtype: None
    disk: float = DISK_RATE


def _plan(headers: Headers, out: Path, config: JobConfig, device: torch.device, rates: _Rates, sharing: Sharing) -> Plan:
    """The plan of a model whose config and headers are known."""
    require_format(config)
    skeleton.silence_transformers()
    with torch.no_grad():
        outline, model_config, warnings = _outline(headers.folder, headers.remote, config)
        seqlen = row_length(model_config, config)
        experts = outline.expert_linears()
        adapted = _checked(ModelDescription(headers.folder, model_config, outline.model, dict(outline.sources), experts), config)
        config = adapted.config
        ceilings = rates.device(outline.dtype)
        on_gpu = device.type == "cuda" or (ceilings is not None and bool(ceilings.memory))
        shape = survey(dataclasses.replace(outline, fused=on_gpu), seqlen)
        samples = config.samples if method_of(config).calibrated else 0
        if sharing.ranks > 1:
            stays = headers.remote is not None and (headers.missing is None or config.fetch == "stream")
            require_shareable(config, method_of(config), remote=stays, rows=samples, ranks=sharing.ranks)
            config = for_ranks(config, sharing.ranks, "cuda" if on_gpu else "cpu")
        own = sharing.part(samples)
        work = _work(adapted, shape, own, own * seqlen, sharing)
        if not on_gpu and ceilings is not None:  # measuring has loaded some of the kernels
            load_compiled(device)
        base = host_memory() + (0 if on_gpu else compiled_bytes(device))
        budgets = _budgets(config, device, out, ceilings)
        budgets = dataclasses.replace(budgets, host=budgets.host // sharing.local)
        machine = Machine(on_gpu=on_gpu, base=base, budgets=budgets, ceilings=ceilings, disk_rate=rates.disk)
        kept = require_share(shape, adapted)
        said = (*warnings, *adapted.said, *_fetch_warnings(config, headers.remote))
        ways = _ways(headers, out, shape, config)
        if sharing.ranks > 1:
            ways = [way for way in ways if not isinstance(way, Streamed)]
        plans = [make_plan(shape, work, config, machine, fetch=way, warnings=said) for way in ways]
        found = next((found for found in plans if found.fits), min(plans, key=lambda found: found.disk))
        return dataclasses.replace(with_scaling(found, samples, config, machine), kept=kept)


def _ways(headers: Headers, out: Path, shape: ModelShape, config: JobConfig) -> list[Fetch | None]:
    """The ways in which the shards may get here, the preferred one first. Raises UsageError for a URL that is to be downloaded."""
    if headers.remote is None:
        return [None]
    ways: list[Fetch | None] = [stream_of(headers.remote, shape, config)]
    if headers.missing is None:
        if config.fetch == "download":
            raise UsageError("--fetch download: MODEL is a URL, which is always streamed; leave out --fetch")
        return ways
    if config.fetch == "stream":
        return ways
    assert headers.cache is not None
    free = None if _file_system(headers.cache) == _file_system(out) else disk_budget(headers.cache)
    download = Download(size=headers.missing, folder=str(headers.cache), free=free, rate=config.bandwidth or NETWORK_RATE)
    if config.fetch == "download":
        return [download]
    # A job that has streamed goes on doing so.
    return [*ways, download] if any(commit.source.startswith(REMOTE_SAMPLE) for commit in read_commits(out)[0]) else [download, *ways]


def _fetch_warnings(config: JobConfig, remote: RemoteShards | None) -> tuple[str, ...]:
    """At most one sentence. remote: the shards that are not here."""
    if config.fetch != "stream" or remote is not None:
        return ()
    return ("--fetch stream has no effect: all shards of MODEL are on this machine",)


def stream_of(remote: RemoteShards, shape: ModelShape, config: JobConfig) -> Streamed:
    """How shards on a server are streamed."""
    size = sum(remote.sizes.values())
    cache = usual_cache(shape, size) if config.fetch_cache is None else config.fetch_cache
    return Streamed(size=size, cache=cache, given=config.fetch_cache is not None, rate=config.bandwidth or NETWORK_RATE)


def _file_system(folder: Path) -> int:
    """The device number of a folder's file system. The folder need not exist."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _checked(model: ModelDescription, config: JobConfig) -> Adapted:
    """The job with its format and scheme settled. Raises UsageError or UnsupportedModelError if ``quantize`` would refuse it."""
    found = check_shapes(model, without_chosen(settled(model, config)))
    found = dataclasses.replace(found, config=with_chosen(found.config, config.rules[len(config.given_rules) :]))
    head_scheme(model, found.config)
    if found.config.format == "gguf":
        check_gguf_job(model, found.config)
    return found


def plan_job(
    pager: Pager, rows: Tensor | None, adapted: Adapted, out: Path, texts: Sequence[Made] = (), ranks: Ranks | None = None
) -> Plan:
    """The plan of a job that is about to begin or resume in ``out``. Its row length is settled. texts: what ``rows`` were made of.

    ranks: the processes that share it. The plan is that of the one with most rows, whichever asks, so that all choose alike.

    Raises UsageError if too much of the blocks would stay unquantized.
    """
    config = adapted.config
    assert config.seqlen is not None
    outline = Outline(
        model=copy.deepcopy(pager.model),
        blocks_path=pager.blocks_path,
        dtype=pager.dtype,
        sources=pager.sources,
        stored=_kept_bytes(pager.checkpoint.tensors, pager.extras),
        coded=_coded_bytes(pager.checkpoint.tensors),
        folds=pager.folds,
        banks=pager.banks,
        fused=pager.device.type == "cuda",
    )
    shape = survey(outline, config.seqlen)
    kept = require_share(shape, adapted)
    ranks = ranks or OneProcess()
    sharing, count, tokens = Sharing.of(ranks), 0, 0
    if rows is not None:
        span = ranks.rows(len(rows))
        count, tokens = len(rows), len(rows[span.start : span.stop].unique())
    work = _work(adapted, shape, sharing.part(count), tokens, sharing)
    ceilings = measure(pager.device, pager.dtype)
    load_compiled(pager.device)
    if pager.device.type == "cuda":
        torch.cuda.empty_cache()
    budgets = _budgets(config, pager.device, out, ceilings)
    # What is free is for all of this host's processes; what each holds now is in it once.
    now = 0 if config.ram is not None else host_memory()
    budgets = dataclasses.replace(budgets, host=now + (budgets.host - now) // sharing.local)
    machine = Machine(on_gpu=pager.device.type == "cuda", base=host_memory(), budgets=budgets, ceilings=ceilings)
    fetch = None if pager.remote is None else stream_of(pager.remote, shape, config)
    said = (*pager.warnings, *adapted.said, *_fetch_warnings(config, pager.remote))
    found = make_plan(shape, work, config, machine, fetch=fetch, warnings=said, texts=texts)
    return dataclasses.replace(with_scaling(found, count, config, machine), kept=kept)


def _work(adapted: Adapted, shape: ModelShape, rows: int, tokens: int, sharing: Sharing) -> Work:
    config = adapted.config
    base = config.base_scheme
    surveyed = () if config.chosen_rules else quantized_groups(adapted.groups, shape)

    def scheme(name: str) -> QuantScheme | None:
        return scheme_for(name, base, config.rules)

    return Work(
        rows=rows,
        tokens=tokens,
        scheme=scheme,
        method=method_of(config),
        true_sequential=config.true_sequential,
        on_nonfinite=config.on_nonfinite,
        lm_head=config.lm_head,
        tune_steps=config.tune_steps,
        gguf=config.format == "gguf",
        drop=config.push_drop,
        rotate=config.rotate,
        survey=len(streams_of(surveyed, shape.path, len(shape.blocks))),
        sharing=sharing,
    )


def _budgets(config: JobConfig, device: torch.device, out: Path, ceilings: Ceilings | None) -> Budgets:
    """The budgets of the options; they default to what is free. Files that an earlier run of the job wrote count as free."""
    vram = gpu_budget(device) if device.type == "cuda" else max(0, (0 if ceilings is None else ceilings.memory) - GPU_RESERVE)
    written = 0
    if (out / STATE_FOLDER).is_dir():
        written = sum(path.stat().st_size for pattern in ("model-*", f"{STATE_FOLDER}/**/activations-*") for path in out.glob(pattern))
    return Budgets(
        device=config.vram if config.vram is not None else vram,
        host=config.ram if config.ram is not None else host_budget(host_memory()),
        disk=(config.disk if config.disk is not None else disk_budget(out)) + written,
    )


def _outline(folder: Path, remote: RemoteShards | None, config: JobConfig) -> tuple[Outline, object, tuple[str, ...]]:
    """The model described by a config and by headers, if there are any; its config; and warnings.

    Raises CheckpointError, UnsupportedModelError.
    """
    local = remote is None
    tensors: Mapping[str, TensorInfo] = {}
    if not local or any(folder.glob("*.safetensors")):
        tensors = Checkpoint.open(folder, remote).tensors
    tensors = decoded_source(folder, tensors, integers=True)
    model_config = skeleton.load_config(folder, trust_remote_code=config.trust_remote_code)
    if config.rotate:
        untie(model_config)
    dtype = skeleton.compute_dtype(model_config, config.dtype, (t.dtype for t in tensors.values()))
    model = skeleton.build(model_config, dtype, trust_remote_code=config.trust_remote_code, initialised=False)
    if config.attention == "fused":
        fuse_attention(model)
    path, _ = find_blocks(model)
    warned = coded_warnings(folder, tensors)
    folds: tuple[BlockFolds, ...] = ()
    if config.rotate or method_of(config).scaling is not None:
        whole = skeleton.build(model_config, dtype, trust_remote_code=config.trust_remote_code)
        described = ModelDescription(folder, model_config, whole, {})
        if config.rotate:
            tensors = described_rotation(described, tensors)
        if method_of(config).scaling is not None:
            folds = model_folds(described)
    placement = skeleton.place(model, tensors)
    beside = merged_beside(model, placement.merged)
    placed, parts = dict(placement.whole), merged_parts({name: m for name, m in placement.merged.items() if name not in beside})
    merged = {name: part.parameter for name, part in parts.items()}
    sources = {target: tensors[name] for name, target in placed.items()}
    experts: dict[str, tuple[ExpertSource, ...]] = {}
    if tensors:
        unplaced = [name for name in tensors if name not in placed and name not in merged and name not in beside]
        refuse_quantized_tensors(folder, unplaced)
        experts = expert_sources(model, {name: PlainSource(tensors[name]) for name in (*placed, *merged)}, placed, parts)
        made = [target for merge in beside.values() for target in merge.targets]
        require_parameters(folder, model, [*sources, *experts, *made], unplaced)
        for name, param in model.named_parameters():
            if name in sources and name not in experts:
                PlainSource(sources[name]).check(tuple(param.shape))
    banks = stored_banks(model, experts) if tensors else {}
    extras = find_extras(model, model_config, path, tensors, placed | merged | dict.fromkeys(beside, ""))
    stored = _kept_bytes(tensors, extras) or None
    files = (*unread_warnings(folder, tensors), *side_files(folder).warnings()) if local else ()
    warnings = (*warned, *extras.warnings(), *tie_warnings(model, sources), *files)
    coded = _coded_bytes(tensors)
    outline = Outline(model=model, blocks_path=path, dtype=dtype, sources=sources, stored=stored, coded=coded, banks=banks, folds=folds)
    return outline, model_config, warnings


def _coded_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """By how many bytes the files of weights that are decoded as they are read are smaller than these."""
    return sum(info.nbytes - info.stored_bytes for info in tensors.values())


def _kept_bytes(tensors: Mapping[str, TensorInfo], extras: Extras) -> int:
    """Bytes of all tensors but those that the output leaves out."""
    dropped = set(extras.dropped)
    return sum(info.nbytes for name, info in tensors.items() if name not in dropped)
