"""How a finished folder is loaded: a model card's last section. Statements about readers come from ``io.formats.readers``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from bigq.config import JobConfig
from bigq.inspect.history import History
from bigq.io.formats.base import Format, bank_of
from bigq.io.formats.fused import fused_linears
from bigq.io.formats.gptq import Gptq
from bigq.io.formats.readers import Written, readers_of, verdicts
from bigq.io.formats.readers_table import ROWS, Kind
from bigq.io.json_file import read_json_object
from bigq.model.architecture import auto_class_named
from bigq.reports.markdown import block

#: Significant bits of a bf16 number.
BF16_BITS = 8
#: The entry that says what is not quantized, in formats whose config says nothing else of single Linears.
_PLACES = {"awq": "`modules_to_not_convert`"}
_ASK = '"The answer is"'


def loads_with_transformers(history: History) -> bool:
    """Whether transformers can load the shards: of GPTQ optimum, its reader, packs Linears of blocks only, all of them alike."""
    config = history.config
    if config is None:
        return True
    if "transformers" not in readers_of(config.made.name):
        return False
    if _is_gptq(config):
        return history.head is None and not _sizes_differ(history) and not _written(history, config).experts
    return _refusal_of("transformers", history, config) is None


def loading(history: History) -> Iterator[str]:
    """How readers of the format load a folder with these settings, in Markdown."""
    config = history.config
    yield "## Loading\n"
    yield "`MODEL` is this repository's id, or a folder that holds its files.\n"
    if config is None:
        yield "With transformers; the packages that it needs depend on `quantization_config` in config.json:\n"
        yield _transformers(history, False)
        return
    if config.format == "gguf":
        yield from _llama_cpp()
    readers = readers_of(config.made.name)
    if _is_gptq(config):
        yield from _gptq(history, config)
    elif "compressed-tensors" in readers:
        refusal = _refusal_of("transformers", history, config) if _written(history, config).experts else None
        if refusal is None:
            yield from _compressed_tensors(history, config, _schemes(history, config))
        else:
            yield f"{refusal}.\n"
    elif config.made.name == "awq":
        yield from _awq(history, config)
    elif config.made.quantized_inputs:
        yield "With transformers (`pip install transformers compressed-tensors`):\n"
        yield _transformers(history, config.trust_remote_code)
        yield _said_of_inputs(config.made)
    elif "transformers" in readers:
        needs = next(row.needs for row in ROWS if row.reader == "transformers" and config.made.name in row.formats).replace(",", "")
        yield f"With transformers (`pip install transformers {needs}`):\n"
        yield _transformers(history, config.trust_remote_code)
        if config.made.points == "e2m1":
            yield (
                "Weights become bf16 there, in which they are exact. With `quantization_config=CompressedTensorsConfig(dequantize=True)` "
                "they take the dtype that is asked for.\n"
            )
    yield from _vllm(history, config)
    yield (
        "bigq itself reads it too:\n"
        if readers
        else f"No other program is known to read the format `{config.made.name}`. Load it with bigq:\n"
    )
    yield block(f"bigq generate MODEL --prompt {_ASK}{' --trust-remote-code' if config.trust_remote_code else ''}", "sh")


def _is_gptq(config: JobConfig) -> bool:
    """Whether optimum reads the shards for transformers, and GPTQModel by itself."""
    return isinstance(config.made, Gptq)


def _schemes(history: History, config: JobConfig) -> set[tuple[int, int, bool]]:
    """Bits, group size and whether it is symmetric of all Linears that are packed."""
    base = config.scheme
    return {(each.bits, each.group_size, bool(each.symmetric)) for each in history.linears} or {
        (base.bits, base.group_size, base.symmetric)
    }


def _sizes_differ(history: History) -> bool:
    return len({(each.bits, each.group_size) for each in history.linears}) > 1


def _said_of_inputs(made: Format) -> str:
    kind = made.quantized_inputs
    if kind == "e2m1":
        return (
            "Inputs of Linears are rounded to 4-bit floats (E2M1) while the model runs, in groups of 16, with one number for each Linear "
            "that calibration found. transformers does so unless it is asked to unpack the weights at once (`dequantize=True`), and vLLM "
            "where it has a kernel for it; elsewhere vLLM leaves inputs in 16 bits.\n"
        )
    if made.input_suffix:
        number = "fp8 (E4M3)" if kind == "e4m3" else "8 bits"
        return f"Inputs of Linears are rounded to {number} while the model runs, by a scale for each Linear that calibration found.\n"
    if kind == "e4m3":
        return "Inputs of Linears are rounded to fp8 (E4M3) for each token while the model runs.\n"
    if kind == "e4m3-groups":
        return "Inputs of Linears are rounded to fp8 (E4M3) for each token, 128 at a time, while the model runs.\n"
    return (
        "Inputs of Linears are rounded to 8 bits for each token while the model runs. compressed-tensors divides the largest one by "
        "127.5 for it, vLLM and bigq by 127, so their results differ a little.\n"
    )


def _transformers(history: History, remote_code: bool) -> str:
    more = ", trust_remote_code=True" if remote_code else ""
    path = Path(history.out) / "config.json"
    auto = auto_class_named(read_json_object(path).get("architectures")) if path.exists() else auto_class_named(None)
    return block(
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("MODEL"{more})\n'
        f'model = {auto}.from_pretrained("MODEL", device_map="auto"{more})',
        "python",
    )


def _llama_cpp() -> Iterator[str]:
    yield "`model.gguf` is the whole model for llama.cpp and programs built on it:\n"
    yield block(f"llama-cli -m model.gguf -p {_ASK}", "sh")
    yield "From Python (`pip install llama-cpp-python`):\n"
    yield block(f'from llama_cpp import Llama\n\nmodel = Llama("model.gguf")\nprint(model({_ASK})["choices"][0]["text"])', "python")
    yield "The safetensors shards beside it are the same model in the checkpoint format `gptq_v2`; model.gguf needs none of them.\n"


def _gptq(history: History, config: JobConfig) -> Iterator[str]:
    refused = config.made.name == "gptq" and not config.scheme.symmetric
    if loads_with_transformers(history):
        yield "With transformers (`pip install transformers optimum gptqmodel`):\n"
        yield _transformers(history, config.trust_remote_code)
        if refused:
            yield (
                "GPTQModel's own loader (`GPTQModel.load`) refuses asymmetric checkpoints of format `gptq` that other programs wrote; "
                "transformers takes this one. For `GPTQModel.load`, write the same weights in another format: "
                "`bigq convert MODEL NEW --to gptq_v2`.\n"
            )
    else:
        why = ["gives all Linears the same bits and group size"] if _sizes_differ(history) else []
        why += ["leaves experts random"] * bool(_written(history, config).experts)
        why += ["takes no quantized output head"] if history.head is not None else []
        can = "GPTQModel by itself can (`pip install gptqmodel`)"
        yield f"transformers cannot load this checkpoint: it reads GPTQ by way of optimum, which {' and '.join(why)}. {can}" + (
            ", but refuses asymmetric checkpoints of format `gptq` that other programs wrote. So first write the same weights in another "
            "format, to a folder NEW:\n"
            if refused
            else ":\n"
        )
        if refused:
            yield block("bigq convert MODEL NEW --to gptq_v2", "sh")
        yield _gptqmodel("NEW" if refused else "MODEL", config)
    if config.made.name == "gptq_v2":
        yield "The checkpoint format is `gptq_v2`. Readers that do not know it would read it as `gptq`, with wrong zero points.\n"


def _compressed_tensors(history: History, config: JobConfig, schemes: set[tuple[int, int, bool]]) -> Iterator[str]:
    asymmetric, three = not all(symmetric for _, _, symmetric in schemes), any(bits == 3 for bits, _, _ in schemes)
    transformers = "'transformers<5.23'" if asymmetric else "transformers"
    needed = "'compressed-tensors>=0.18'" if three else "compressed-tensors"
    yield f"With transformers (`pip install {transformers} {needed}`):\n"
    yield _transformers(history, config.trust_remote_code)
    if asymmetric:
        yield (
            "Its weights have zero points. transformers 5.23 with compressed-tensors cannot load zero points of any program; "
            "transformers up to 5.22 can (tried with compressed-tensors 0.18 to 0.20).\n"
        )
    if three:
        yield "Codes of 3 bits are packed as compressed-tensors has done it since version 0.18; older ones cannot read them.\n"


def _awq(history: History, config: JobConfig) -> Iterator[str]:
    refusal = _refusal_of("transformers", history, config)
    if refusal is None:
        yield "With transformers (`pip install transformers gptqmodel`):\n"
        yield _transformers(history, config.trust_remote_code)
        return
    yield f"{refusal}.\n"
    if _refusal_of("GPTQModel", history, config) is None:
        yield "GPTQModel by itself can load it (`pip install gptqmodel`):\n"
        yield _gptqmodel("MODEL", config)


def _gptqmodel(model: str, config: JobConfig) -> str:
    more = ", trust_remote_code=True" if config.trust_remote_code else ""
    return block(f'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{model}"{more})', "python")


def _vllm(history: History, config: JobConfig) -> Iterator[str]:
    verdict = next((each for each in verdicts(_written(history, config)) if each.reader == "vLLM"), None)
    if verdict is None:
        return
    more = " --trust-remote-code" if config.trust_remote_code else ""
    if not verdict.loads:
        yield f"{verdict.note.partition(';')[0]}.{_converted(history, config)}\n"
        return
    yield f"With vLLM{f' ({verdict.note})' if verdict.note else ''}:\n"
    if config.scheme.scale_bits is not None and config.scheme.scale_bits > BF16_BITS:
        more += " --dtype float16"  # vLLM's own choice for an fp32 source is bf16, which would round the scales
    yield block(f"vllm serve MODEL{more}", "sh")
    one_scheme = config.made.one_size or len(_schemes(history, config)) == 1
    what = [] if one_scheme else ["some Linears have other bits, groups or zero points than the rest"]
    what += ["some Linears are not quantized"] * any(each.block is not None for each in history.left_out)
    if what:
        where = "`dynamic`" if _is_gptq(config) else _PLACES.get(config.made.name, "`config_groups` and `ignore`")
        said = " and ".join(what)
        yield f"{said[0].upper()}{said[1:]} ({where} in config.json).\n"


def _written(history: History, config: JobConfig) -> Written:
    names = [linear.name if linear.block is None else f"{linear.block}.{linear.name}" for linear in history.linears]
    left_out = [left.name if left.block is None else f"{left.block}.{left.name}" for left in history.left_out]
    kinds = {name: Kind(each.bits, each.group_size, bool(each.symmetric)) for name, each in zip(names, history.linears, strict=True)}
    return Written(
        format=config.output_format,
        base=Kind.of(config.scheme),
        kinds=frozenset(kinds.values()),
        head=history.head is not None,
        static=bool(config.made.input_suffix),
        experts=frozenset(kind for name, kind in kinds.items() if bank_of(f"model.{name}") is not None),
        split=any(len({kinds.get(part) for part in fused.parts}) > 1 for fused in fused_linears([*names, *left_out])),
    )


def _refusal_of(reader: str, history: History, config: JobConfig) -> str | None:
    """Why a reader does not load the folder, without advice; None if it does."""
    verdict = next((each for each in verdicts(_written(history, config)) if each.reader == reader), None)
    return None if verdict is None or verdict.loads else verdict.note.partition(";")[0]


def _converted(history: History, config: JobConfig) -> str:
    """How to make what vLLM loads, where that is known."""
    if not _is_gptq(config):
        return ""
    other = next(
        (e for e in verdicts(dataclasses.replace(_written(history, config), format="compressed-tensors")) if e.reader == "vLLM"), None
    )
    if other is None or not other.loads:
        return ""
    return " It loads the same weights in another format: `bigq convert MODEL NEW --to compressed-tensors`."
