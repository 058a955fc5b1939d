"""bigq: GPTQ quantization of language models that are far larger than the machine.

    config = bigq.JobConfig(scheme=bigq.QuantScheme(bits=4, group_size=128))
    print(bigq.plan("path/or/hub-id", "out", config).table())
    report = bigq.quantize("path/or/hub-id", "out", config)
    result = bigq.evaluate("out", bigq.EvalConfig(data="text.txt"), baseline="path/or/hub-id")
    text = bigq.generate("out", "Once upon a time").text

``bigq.api`` documents every function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigq.version import __version__ as __version__

if TYPE_CHECKING:
    from bigq.api import convert as convert
    from bigq.api import evaluate as evaluate
    from bigq.api import generate as generate
    from bigq.api import load_model as load_model
    from bigq.api import model_card as model_card
    from bigq.api import plan as plan
    from bigq.api import quantize as quantize
    from bigq.api import quantize_linear as quantize_linear
    from bigq.api import report as report
    from bigq.api import status as status
    from bigq.api import verify as verify
    from bigq.config import JobConfig as JobConfig
    from bigq.conversion.convert import Conversion as Conversion
    from bigq.errors import BigqError as BigqError
    from bigq.infer.generate import Generation as Generation
    from bigq.infer.options import EvalConfig as EvalConfig
    from bigq.infer.options import GenerateConfig as GenerateConfig
    from bigq.infer.results import Evaluation as Evaluation
    from bigq.inspect.status import Status as Status
    from bigq.progress.callback import ProgressEvent as ProgressEvent
    from bigq.progress.records import Report as Report
    from bigq.quantized_weight import QuantizedWeight as QuantizedWeight
    from bigq.sched.plan.planner import Plan as Plan
    from bigq.scheme import QuantScheme as QuantScheme
    from bigq.scheme import Rule as Rule

#: The module of each public name. It is imported when the name is first used: torch alone takes seconds.
_HOMES = {
    "BigqError": "bigq.errors",
    "Conversion": "bigq.conversion.convert",
    "EvalConfig": "bigq.infer.options",
    "Evaluation": "bigq.infer.results",
    "GenerateConfig": "bigq.infer.options",
    "Generation": "bigq.infer.generate",
    "JobConfig": "bigq.config",
    "Plan": "bigq.sched.plan.planner",
    "ProgressEvent": "bigq.progress.callback",
    "QuantScheme": "bigq.scheme",
    "QuantizedWeight": "bigq.quantized_weight",
    "Report": "bigq.progress.records",
    "Rule": "bigq.scheme",
    "Status": "bigq.inspect.status",
    "convert": "bigq.api",
    "evaluate": "bigq.api",
    "generate": "bigq.api",
    "load_model": "bigq.api",
    "model_card": "bigq.api",
    "plan": "bigq.api",
    "quantize": "bigq.api",
    "quantize_linear": "bigq.api",
    "report": "bigq.api",
    "status": "bigq.api",
    "verify": "bigq.api",
}
__all__ = sorted([*_HOMES, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bigq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
