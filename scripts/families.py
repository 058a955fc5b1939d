#!/usr/bin/env python3
"""Stream and quantize a tiny random model of every causal and multimodal type that transformers knows.

    python scripts/families.py --json docs/results/families.json [TYPE …]

Each type is built, saved, and streamed by text; the logits are compared with those of transformers' own forward. Transformers runs experts
one after the other here (``eager``), as bigq does; its other ways sum in another order. Then the model is quantized, by rounding and by
GPTQ, and the output is compared with the source by ``family_output``. A job plans
the model on meta before it begins, and so does this script for a type that is refused.

Each type ends in one of five ways: "equal", where the logits have the same bits; "refused", with bigq's reason; "not built", where this
script finds no tiny config that transformers can build; "different", which is a fault; or "crashed", where bigq raises what is no
BigqError, or the process ends. Exit code 1 if a type is different or crashed, or if its output is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from composite_families import TEXT
from facts import host, revision, versions
from family_configs import configs
from family_output import compare_output
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import bigq
from bigq.errors import BigqError
from bigq.infer.evaluate import Stream
from bigq.model import skeleton
from bigq.model.pager import Pager
from bigq.sched.plan.survey import Outline, survey

ROWS, TOKENS, SEQLEN, BATCH = 3, 24, 32, 2
#: Seconds of CPU time that a type may take, and of time on the clock.
CPU_SECONDS, SECONDS = 240, 600
MOST_PARAMETERS = 30_000_000
#: Which types: the tables of transformers that name them, and the class that builds them.
TABLES = {
    "causal": (("CAUSAL_LM",), "AutoModelForCausalLM"),
    "multimodal": (("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"), "AutoModelForMultimodalLM"),
}
#: Groups of 16 inputs: the widths of all tiny models are multiples.
SCHEME = bigq.QuantScheme(bits=4, group_size=16, scales="minmax")
FAULTS = ("different", "crashed")
METHODS = ("rtn", "gptq")


def types(table: str) -> list[str]:
    """The model types of a table."""
    names = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in TABLES[table][0])
    return sorted({kind for mapping in names for kind in mapping})


def make(kind: str, table: str, folder: Path) -> tuple[str, str | None]:
    """Save a random model with random norms and biases. Returns its class's name, and why its own forward fails on text, if it does.

    Raises ValueError, with the reasons, where no config makes a model. A causal model whose forward fails is none.
    """
    auto, problems = getattr(transformers, TABLES[table][1]), []
    for config in configs(kind, table):
        try:
            return _make(auto, config(), folder, required=table == "causal")
        except Exception as error:
            problems.append(_line(error))
    raise ValueError(" / ".join(dict.fromkeys(problems)))


def _make(auto: Any, config: Any, folder: Path, *, required: bool) -> tuple[str, str | None]:
    with torch.device("meta"):
        whole = auto.from_config(config)
    count = sum(p.numel() for p in whole.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.15) if param.ndim >= 2 else param.add_(torch.randn_like(param) * 0.1)
        # Training leaves this row 0, and transformers zeroes it when it loads a Youtu model.
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        model.tie_weights()
        failure = None
        try:
            if not torch.isfinite(model(input_ids=rows()[:1], use_cache=False).logits).all():
                raise ValueError("its logits are not finite")
        except Exception as error:
            if required:
                raise
            failure = _line(error)
    model.save_pretrained(folder, max_shard_size="2MB")
    try:
        _, found = auto.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"transformers cannot load what it saved: {_line(error)}") from error
    if found["missing_keys"]:
        raise ValueError(f"transformers does not find all that it saved, such as {sorted(found['missing_keys'])[0]}")
    return type(model).__name__, failure


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def rows(count: int = ROWS) -> Tensor:
    """Ids of tokens that are text."""
    ids: Tensor = torch.randint(3, TEXT, (count, TOKENS), generator=torch.Generator().manual_seed(3))
    return ids


def whole_model(table: str, folder: Path) -> nn.Module:
    """The model as transformers loads it, its experts one after the other."""
    model: Any = getattr(transformers, TABLES[table][1]).from_pretrained(folder, dtype=torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    for param in model.parameters():
        param.data = param.data.clone()  # mapped shards are not aligned, and the bits of a product depend on that on some processors
    loaded: nn.Module = model.eval()
    return loaded


def streamed(folder: Path) -> Tensor:
    """The logits as bigq streams them, in batches of ``BATCH`` rows. Raises BigqError."""
    pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
    stream = Stream(pager, rows(), BATCH)
    with stream.tail_ready():
        return torch.cat([stream.logits(lo, min(lo + BATCH, ROWS)) for lo in range(0, ROWS, BATCH)])


def compare(folder: Path, table: str, failure: str | None) -> dict[str, Any]:
    """The streamed logits against those of the whole model, in the same batches; and what the plan says of a model that is refused.

    failure: why the model's own forward fails on text; bigq must then refuse it.
    """
    found: dict[str, Any] = {"own_forward": failure} if failure else {}
    with torch.no_grad():
        try:
            got = streamed(folder)
        except BigqError as error:
            return {"result": "refused", "reason": str(error), "plan": planned(folder), **found}
        if failure:
            return {"result": "different", "reason": "bigq streams what transformers cannot run", **found}
        whole = whole_model(table, folder)
        expected = torch.cat([whole(input_ids=part, use_cache=False).logits for part in rows().split(BATCH)])
    found["bytes"] = torch.equal(got, expected)
    found["difference"] = float((got - expected).abs().max() / expected.abs().max())
    return {"result": "equal" if found["bytes"] else "different", **found}


def planned(folder: Path) -> str:
    """The plan's own view of the model: "fits", or why it refuses."""
    with torch.no_grad():
        try:
            pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
            survey(Outline(model=pager.model, blocks_path=pager.blocks_path, dtype=pager.dtype, sources=pager.sources), SEQLEN)
        except BigqError as error:
            return str(error)
    return "fits"


def quantized(folder: Path, method: str) -> dict[str, Any]:
    """A job on the model, and its output against the source: see ``compare_output``. "refused" with a reason where bigq refuses."""
    with tempfile.TemporaryDirectory() as place:
        out, ids = Path(place) / "out", Path(place) / "ids.safetensors"
        save_file({"input_ids": rows(4)}, ids)
        calibration = {"calibration": str(ids), "samples": 4, "seqlen": TOKENS} if method == "gptq" else {}
        job = bigq.JobConfig(scheme=SCHEME, method=method, device="cpu", quiet=True, allow_partial=True, **calibration)  # type: ignore[arg-type]
        try:
            bigq.quantize(folder, out, job)
        except BigqError as error:
            return {"result": "refused", "reason": str(error).replace(place, "OUT")}
        return compare_output(folder, out, rounded=method == "rtn")


def family(kind: str, table: str = "causal", methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """What becomes of one type."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"took more than {CPU_SECONDS} seconds of CPU time")

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made, failure = make(kind, table, Path(folder))
        except Exception as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            return {"result": "not built", "reason": str(error).replace(folder, "MODEL")}
        found = _guarded(lambda: compare(Path(folder), table, failure))
        if found["result"] == "equal":
            found |= {method: _guarded(lambda method=method: quantized(Path(folder), method)) for method in methods}
        signal.setitimer(signal.ITIMER_PROF, 0)
    return _without(folder, {"class": made, **found})


def _guarded(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return step()
    except Exception as error:
        return {"result": "crashed", "reason": _line(error)}


def _without(folder: str, value: Any) -> Any:
    """A result without the name of a folder."""
    if isinstance(value, dict):
        return {key: _without(folder, inner) for key, inner in value.items()}
    return value.replace(folder, "MODEL") if isinstance(value, str) else value


def warm_up() -> None:
    """Import what transformers imports late, which the processes of the types then share."""
    with tempfile.TemporaryDirectory() as folder:
        make("llama", "causal", Path(folder))
        compare(Path(folder), "causal", None)


def in_child(kind: str, table: str, methods: Sequence[str]) -> dict[str, Any]:
    """``family`` in a process of its own, so that one that ends or hangs is seen."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run(answer: Connection) -> None:
        answer.send(family(kind, table, methods))

    child = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    child.start()
    theirs.close()
    try:
        return dict(ours.recv()) if ours.poll(SECONDS) else {"result": "crashed", "reason": f"did not end within {SECONDS} seconds"}
    except EOFError:
        child.join()
        return {"result": "crashed", "reason": f"the process ended with {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def counted(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many types ended in each way, and how many of the equal ones each method quantized so that the output is right."""
    outputs = {method: Counter(one[method]["result"] for one in found.values() if method in one) for method in METHODS}
    return {"types": len(found), **Counter(one["result"] for one in found.values()), **{m: n for m, n in outputs.items() if n}}


def faulty(one: dict[str, Any]) -> bool:
    return one["result"] in FAULTS or any(one.get(method, {}).get("result") in FAULTS for method in METHODS)


def write(path: Path | None, results: dict[str, dict[str, Any]]) -> None:
    """Write the results so far."""
    if path is not None:
        counts = {table: counted(found) for table, found in results.items()}
        report = {"revision": revision(), "host": host(), "versions": versions(), "counts": counts, "families": results}
        path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--table", choices=sorted(TABLES), help="only the causal types, or only the multimodal ones")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="how to quantize; both ways by default")
    parser.add_argument("--json", type=Path, help="write the results here; those of types that are not asked for are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    skeleton.silence_transformers()
    warm_up()
    results: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    if args.json and args.types and args.json.exists():
        results = json.loads(args.json.read_text())["families"]
    for table in [args.table] if args.table else list(TABLES):
        for kind in [kind for kind in types(table) if not args.types or kind in args.types]:
            one = results[table][kind] = in_child(kind, table, args.methods)
            outputs = ", ".join(f"{method} {one[method]['result']} {one[method].get('reason', '')}" for method in METHODS if method in one)
            write(args.json, results)
            print(f"{table} {kind}: {one['result']} {one.get('reason', '')} | {outputs}", flush=True)
    print(json.dumps({table: counted(found) for table, found in results.items()}, indent=1))
    return int(any(faulty(one) for found in results.values() for one in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
