"""bigq: GPTQ quantization of language models that are far larger than the machine.

report = bigq.quantize("path/or/hub-id", "out", bigq.JobConfig(scheme=bigq.QuantScheme(bits=4)))
result = bigq.evaluate("out", bigq.EvalConfig(data="text.txt"), baseline="path/or/hub-id")
weight = bigq.quantize_linear(w, hessian, bigq.QuantScheme(bits=4, group_size=128))
model = bigq.load_model("out")
text = bigq.generate("out", "Once upon a time").text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigq.version import __version__ as __version__

if TYPE_CHECKING:
    from bigq.config import JobConfig as JobConfig
    from bigq.errors import BigqError as BigqError
    from bigq.infer.evaluate import Evaluation as Evaluation
    from bigq.infer.evaluate import evaluate as evaluate
    from bigq.infer.generate import Generated as Generated
    from bigq.infer.generate import generate as generate
    from bigq.infer.load import load_model as load_model
    from bigq.infer.options import EvalConfig as EvalConfig
    from bigq.infer.options import GenerateConfig as GenerateConfig
    from bigq.progress.records import Report as Report
    from bigq.quantized_weight import QuantizedWeight as QuantizedWeight
    from bigq.sched.plan.inputs import plan as plan
    from bigq.sched.plan.planner import Plan as Plan
    from bigq.sched.run import quantize as quantize
    from bigq.scheme import QuantScheme as QuantScheme
    from bigq.scheme import Rule as Rule
    from bigq.solver.gptq import quantize_linear as quantize_linear

#: Where each public name lives. They are imported when first asked for: torch alone takes seconds.
_HOMES = {
    "BigqError": "bigq.errors",
    "EvalConfig": "bigq.infer.options",
    "Evaluation": "bigq.infer.evaluate",
    "GenerateConfig": "bigq.infer.options",
    "Generated": "bigq.infer.generate",
    "JobConfig": "bigq.config",
    "Plan": "bigq.sched.plan.planner",
    "QuantScheme": "bigq.scheme",
    "QuantizedWeight": "bigq.quantized_weight",
    "Report": "bigq.progress.records",
    "Rule": "bigq.scheme",
    "evaluate": "bigq.infer.evaluate",
    "generate": "bigq.infer.generate",
    "load_model": "bigq.infer.load",
    "plan": "bigq.sched.plan.inputs",
    "quantize": "bigq.sched.run",
    "quantize_linear": "bigq.solver.gptq",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bigq' has no attribute {name!r}")
