"""Plans for real models and machines: what there is to know is looked up here and handed to the planner."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bigq.config import JobConfig
from bigq.conversion.gguf import check_gguf_job
from bigq.errors import UnsupportedModelError, UsageError
from bigq.io.folders import STATE_FOLDER
from bigq.io.hub import resolve_headers
from bigq.io.index import Checkpoint, TensorInfo, read_json_object
from bigq.job.settle import check_shapes, head_scheme, row_length, settled_scheme
from bigq.machine.budget import GPU_RESERVE, disk_budget, gpu_budget, host_budget
from bigq.machine.ceilings import KNOWN, Ceilings, measure
from bigq.machine.device import choose_device
from bigq.methods import method_of
from bigq.model import skeleton
from bigq.model.blocks import find_blocks
from bigq.model.description import ModelDescription
from bigq.model.pager import Pager
from bigq.progress.records import host_memory
from bigq.sched.plan.cost import Work
from bigq.sched.plan.planner import Budgets, Plan, make_plan
from bigq.sched.plan.survey import Outline, survey
from bigq.scheme import QuantScheme, scheme_for


def plan(model: str, out: str | Path = ".", config: JobConfig | None = None, on: str = "this") -> Plan:
    """What quantizing a model folder or hub id takes; no weights are read.

    out: where the output would lie. on: "this" machine, or the GPU to plan for, one of ``ceilings.KNOWN``. A folder needs
    nothing but a config.json; of a hub id config and headers are fetched.
    Raises UsageError, DataError or ResourceError.
    """
    config = config or JobConfig()
    if on != "this" and on not in KNOWN:
        raise UsageError(f"--on {on}: must be this, {', '.join(KNOWN)}")
    skeleton.silence_transformers()
    folder, tensors = resolve_headers(model)
    with torch.no_grad():
        outline, model_config = _outline(folder, tensors, config)
        seqlen = row_length(model_config, config)
        config = _checked(ModelDescription(folder, model_config, outline.model, dict(outline.sources)), config)
        shape = survey(outline, seqlen)
        work = _work(config, config.samples, config.samples * seqlen)
        device = torch.device("cpu") if on in KNOWN else choose_device(config.device)
        ceilings = KNOWN[on] if on in KNOWN else measure(device, outline.dtype)
        on_gpu = bool(ceilings.memory)
        budgets = _budgets(config, device, Path(out), ceilings)
        return make_plan(shape, work, config, on_gpu=on_gpu, base=host_memory(), budgets=budgets, ceilings=ceilings)


def _checked(model: ModelDescription, config: JobConfig) -> JobConfig:
    """The job with its scheme settled. Raises UsageError, UnsupportedModelError where ``quantize`` would refuse it."""
    config = dataclasses.replace(config, scheme=settled_scheme(model, config))
    check_shapes(model, config)
    head_scheme(model, config)
    if config.format == "gguf":
        check_gguf_job(model, config)
    return config


def plan_job(pager: Pager, rows: Tensor | None, config: JobConfig, out: Path) -> Plan:
    """The plan of a job that is about to begin in ``out`` or to go on there. Its row length is settled."""
    assert config.seqlen is not None
    outline = Outline(
        model=copy.deepcopy(pager.model),
        blocks_path=pager.blocks_path,
        dtype=pager.dtype,
        sources=pager.sources,
        stored=sum(info.nbytes for info in pager.checkpoint.tensors.values()),
    )
    shape = survey(outline, config.seqlen)
    work = _work(config, 0 if rows is None else len(rows), 0 if rows is None else len(rows.unique()))
    ceilings = measure(pager.device, pager.dtype)
    if pager.device.type == "cuda":
        torch.cuda.empty_cache()
    budgets = _budgets(config, pager.device, out, ceilings)
    there = sum(path.stat().st_size for pattern in ("model-*", f"{STATE_FOLDER}/activations-*") for path in out.glob(pattern))
    budgets = dataclasses.replace(budgets, disk=budgets.disk + there)
    return make_plan(shape, work, config, on_gpu=pager.device.type == "cuda", base=host_memory(), budgets=budgets, ceilings=ceilings)


def _work(config: JobConfig, rows: int, tokens: int) -> Work:
    def scheme(name: str) -> QuantScheme | None:
        return scheme_for(name, config.base_scheme, config.rules)

    return Work(
        rows=rows,
        tokens=tokens,
        scheme=scheme,
        method=method_of(config),
        true_sequential=config.true_sequential,
        on_nonfinite=config.on_nonfinite,
        lm_head=config.lm_head,
        gguf=config.format == "gguf",
    )


def _budgets(config: JobConfig, device: torch.device, out: Path, ceilings: Ceilings) -> Budgets:
    """What the flags say, else what is free."""
    vram = gpu_budget(device) if device.type == "cuda" else max(0, ceilings.memory - GPU_RESERVE)
    return Budgets(
        device=config.vram if config.vram is not None else vram,
        host=config.ram if config.ram is not None else host_budget(host_memory()),
        disk=config.disk if config.disk is not None else disk_budget(out),
    )


def _outline(folder: Path, tensors: Mapping[str, TensorInfo] | None, config: JobConfig) -> tuple[Outline, object]:
    """The model of a config, and of headers where there are some; and its config. Raises CheckpointError, UnsupportedModelError."""
    if "quantization_config" in read_json_object(folder / "config.json"):
        raise UnsupportedModelError(f"{folder}: is already quantized; give the original model")
    if tensors is None and any(folder.glob("*.safetensors")):
        tensors = Checkpoint.open(folder).tensors
    tensors = tensors or {}
    model_config = skeleton.load_config(folder, trust_remote_code=config.trust_remote_code)
    dtype = skeleton.compute_dtype(model_config, config.dtype, (t.dtype for t in tensors.values()))
    model = skeleton.build(model_config, dtype, trust_remote_code=config.trust_remote_code, initialised=False)
    path, _ = find_blocks(model)
    sources = {target: tensors[name] for name, target in skeleton.map_names(model, tensors).items()}
    stored = sum(info.nbytes for info in tensors.values()) or None
    return Outline(model=model, blocks_path=path, dtype=dtype, sources=sources, stored=stored), model_config
