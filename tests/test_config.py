"""The job as a value: what may stand in its fields, and the way from job.json back to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bigq.config import FROZEN_FIELDS, JobConfig
from bigq.errors import CheckpointError, UsageError
from bigq.options import table
from bigq.scheme import QuantScheme, Rule

#: A value other than the default for every frozen field.
OTHER: dict[str, Any] = {
    "scheme": QuantScheme(
        bits=3, group_size=32, symmetric=False, order="activation", damping=0.5, scales="search", min_zero=1, scale_bits=9
    ),
    "rules": (Rule("a", None), Rule.parse("b:c:bits=8,sym=false,damping=0.1"), Rule("d", {"symmetric": False}), Rule("e", {})),
    "bits_per_weight": 3.5,
    "chosen_rules": 1,
    "method": "rtn",
    "alpha": 0.25,
    "format": "gptq_v2",
    "input_scales": "static",
    "lm_head": True,
    "rotate": True,
    "allow_partial": True,
    "push": "owner/name",
    "push_drop": True,
    "true_sequential": False,
    "calibration": "a\udcff.txt",
    "text_field": "body",
    "samples": 7,
    "seqlen": 40,
    "seed": 3,
    "tune_steps": 4,
    "fold": "none",
    "batch": 2,
    "experts_at_once": 3,
    "attention": "fused",
    "dtype": "float16",
    "trust_remote_code": True,
    "on_nonfinite": "skip",
}


def stored(config: JobConfig) -> dict[str, Any]:
    """The settings as they come back from a file."""
    settings: dict[str, Any] = json.loads(json.dumps(config.frozen()))
    return settings


@pytest.mark.parametrize("config", [JobConfig(), JobConfig(**OTHER)], ids=["defaults", "everything else"])
def test_from_frozen_is_the_inverse_of_frozen(config: JobConfig) -> None:
    assert set(OTHER) == set(FROZEN_FIELDS)
    assert JobConfig.from_frozen(stored(config)) == config
    assert JobConfig.from_frozen(config.frozen()) == config


def test_what_is_not_frozen_has_its_default() -> None:
    assert JobConfig.from_frozen(JobConfig(ram=5, device="cpu", quiet=True, grace=3, steal_lock=True).frozen()) == JobConfig()


def test_a_field_that_older_jobs_lack_has_its_default() -> None:
    settings = stored(JobConfig(text_field="body", samples=3))
    del settings["text_field"]
    assert JobConfig.from_frozen(settings) == JobConfig(samples=3)


@pytest.mark.parametrize("name", [name for name in FROZEN_FIELDS if not table(JobConfig)[name].added])
def test_a_missing_field_is_named(name: str) -> None:
    settings = stored(JobConfig())
    del settings[name]
    with pytest.raises(CheckpointError, match=rf"^X: settings\.{name} is missing; .*start the job again in another folder"):
        JobConfig.from_frozen(settings, "X")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": "red"}, "settings.colour is not known"),
        ({"scheme": None}, "settings.scheme must be an object"),
        ({"scheme": {"bits": 4}}, "settings.scheme.group_size is missing"),
        ({"samples": "8"}, "settings.samples cannot be '8'"),
        ({"samples": 8.0}, "settings.samples cannot be 8.0"),
        ({"samples": True}, "settings.samples cannot be True"),
        ({"samples": 0}, "--samples 0"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"seed": -1}, "--seed -1"),
        ({"samples": None}, "settings.samples cannot be None"),
        ({"seqlen": "x"}, "settings.seqlen cannot be 'x'"),
        ({"batch": False}, "settings.batch cannot be False"),
        ({"true_sequential": 1}, "settings.true_sequential cannot be 1"),
        ({"trust_remote_code": "yes"}, "settings.trust_remote_code cannot be 'yes'"),
        ({"method": "magic"}, "--method magic"),
        ({"on_nonfinite": "ignore"}, "--on-nonfinite ignore"),
        ({"calibration": ["c4"]}, "settings.calibration cannot be"),
        ({"rules": {}}, "settings.rules must be a list"),
        ({"rules": ["a"]}, "settings.rules[0] must be an object"),
        ({"rules": [{"pattern": "a"}]}, "settings.rules[0].overrides is missing"),
        ({"rules": [{"pattern": 5, "overrides": None}]}, "settings.rules[0].pattern cannot be 5"),
        ({"rules": [{"pattern": "(", "overrides": None}]}, "not a regular expression"),
        ({"rules": [{"pattern": "a", "overrides": []}]}, "settings.rules[0].overrides cannot be []"),
        ({"rules": [{"pattern": "a", "overrides": {"colour": 1}}]}, "settings.rules[0].overrides.colour is not known"),
        ({"rules": [{"pattern": "a", "overrides": {"bits": "8"}}]}, "settings.rules[0].overrides.bits cannot be '8'"),
        ({"rules": [{"pattern": "a", "overrides": {"bits": 5}}]}, "bits=5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_values_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        JobConfig.from_frozen({**stored(JobConfig()), **change}, "X")
    assert str(caught.value).startswith("X: ") and says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", 5),
        ("bits", True),
        ("bits", 4.0),
        ("symmetric", 1),
        ("damping", "0.01"),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("scales", "mse"),
        ("scales", True),
        ("order", "importance"),
    ],
)
def test_wrong_values_of_the_scheme_are_named(name: str, value: Any) -> None:
    settings = stored(JobConfig())
    settings["scheme"][name] = value
    with pytest.raises(CheckpointError, match=name):
        JobConfig.from_frozen(settings)


@pytest.mark.parametrize("settings", [None, [], "x", 5])
def test_what_is_no_object_is_told(settings: Any) -> None:
    with pytest.raises(CheckpointError, match="settings must be an object"):
        JobConfig.from_frozen(settings)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"checkpoint_every": -1.0}, "--checkpoint-every -1"),
        ({"checkpoint_every": float("nan")}, "--checkpoint-every nan"),
        ({"checkpoint_every": float("inf")}, "--checkpoint-every inf"),
        ({"grace": 0.0}, "--grace 0"),
        ({"grace": -5.0}, "--grace -5"),
        ({"grace": float("nan")}, "--grace nan"),
        ({"grace": float("inf")}, "--grace inf"),
        ({"on_nonfinite": "ignore"}, "--on-nonfinite ignore"),
    ],
)
def test_values_that_make_no_sense(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: must be"):
        JobConfig(**fields)


def test_values_at_the_edge() -> None:
    assert JobConfig(checkpoint_every=0).checkpoint_every == 0
    assert JobConfig(checkpoint_every=None).checkpoint_every is None
    assert JobConfig(grace=0.5).grace == 0.5
