"""A job's settings as flags: what they ask for is that job."""

from __future__ import annotations

from typing import Any

import pytest

from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.config import JobConfig
from bigq.job.command import flags
from bigq.scheme import QuantScheme, Rule

CONFIGS: list[dict[str, Any]] = [
    {},
    {"scheme": QuantScheme(bits=3, group_size=-1, symmetric=False, order="activation", damping=0.025, scales="search")},
    {"rules": (Rule("a.*b", None), Rule.parse(r".*\.x:bits=8,sym=false,damping=0.5"), Rule.parse("y:order=activation,group_size=-1"))},
    {"method": "rtn", "format": "gptq_v2", "dtype": "bfloat16", "on_nonfinite": "skip", "trust_remote_code": True},
    {"scheme": QuantScheme(damping=0.0123456789, scale_bits=8), "method": "gptaq", "alpha": 1 / 3, "lm_head": True},
    {"true_sequential": False, "calibration": "builtin", "samples": 7, "seqlen": 33, "seed": 5, "batch": 3},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: " ".join(changes) or "defaults")
def test_flags_ask_for_the_job_that_they_are_of(changes: dict[str, Any]) -> None:
    config = JobConfig(**changes)
    args = build_parser().parse_args(["quantize", "MODEL", "OUT", *flags(config)])
    assert job_config(args).frozen() == config.frozen()
    assert bool(flags(config)) == bool(changes)


def test_every_kept_setting_has_its_flag() -> None:
    """One that is added to a job later is told too, or this fails."""
    known = build_parser().parse_args(["quantize", "MODEL", "OUT"])
    config = JobConfig()
    for name in config.frozen().keys() - {"scheme", "rules", "chosen_rules"}:
        assert hasattr(known, name), f"{name} has a flag of another name"
    for name in config.frozen()["scheme"].keys() - {"min_zero", "points", "scale_form"}:
        assert hasattr(known, name), f"{name} has a flag of another name"


def test_the_folder_of_the_calibration_text_is_left_out() -> None:
    assert flags(JobConfig(calibration="/home/somebody/secret/text.jsonl")) == ["--calibration", "text.jsonl"]


def test_options_that_the_command_line_refuses_are_left_out() -> None:
    """Python may give them; nothing comes of them."""
    assert flags(JobConfig(alpha=0.25)) == []
    assert flags(JobConfig(alpha=0.25, method="gptaq")) == ["--method", "gptaq", "--alpha", "0.25"]
