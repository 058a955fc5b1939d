"""Every format reads the config that it writes; what no format writes is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigq.errors import UnsupportedModelError
from bigq.io.formats import FORMATS, Quantization, read_schemes
from bigq.scheme import QuantScheme, Rule

PATH = Path("model/config.json")
BASE = QuantScheme(bits=4, group_size=64)
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def written(format: str) -> dict[str, Any]:
    packed = {NAMES[0]: BASE, NAMES[1]: QuantScheme(bits=8, group_size=32)}
    rules = (Rule.parse(r".*down_proj:bits=8,group_size=32"),)
    job = Quantization(scheme=BASE, rules=rules, packed=packed, left_out=(), others=("lm_head",), head=None, meta={})
    return FORMATS[format].config(job)


@pytest.mark.parametrize("format", [name for name, made in FORMATS.items() if not made.one_size and len(made.bits) > 1])
def test_a_format_reads_the_config_it_writes(format: str) -> None:
    schemes = read_schemes(PATH, written(format))
    assert schemes.format is FORMATS[format]
    fixed = bool(FORMATS[format].fixed)  # then rules with other bits are refused before
    assert [(schemes.scheme(name).bits, schemes.scheme(name).group_size) for name in NAMES] == [(4, 64), (4, 64) if fixed else (8, 32)]
    assert all(schemes.scheme(name).points == FORMATS[format].points for name in NAMES)


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_gptq_config_without_checkpoint_format_is_of_version_1(absent: bool) -> None:
    config = written("gptq_v2") | {"checkpoint_format": None}
    if absent:
        del config["checkpoint_format"]
    assert read_schemes(PATH, config).format is FORMATS["gptq"]


@pytest.mark.parametrize("value", ["gptq_v3", "marlin", "compressed-tensors", "", 2, ["gptq"]])
def test_an_unknown_checkpoint_format_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        read_schemes(PATH, written("gptq") | {"checkpoint_format": value})
    assert str(raised.value).startswith(f"{PATH}: quantization_config: checkpoint_format is {value!r}; bigq reads gptq and gptq_v2")
