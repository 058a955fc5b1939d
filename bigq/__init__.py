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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bigq.config import JobConfig as JobConfig
    from bigq.errors import BigqError as BigqError
    from bigq.report import Report as Report
    from bigq.sched.evaluate import EvalConfig as EvalConfig
    from bigq.sched.evaluate import Evaluation as Evaluation
    from bigq.sched.evaluate import evaluate as evaluate
    from bigq.sched.generate import GenerateConfig as GenerateConfig
    from bigq.sched.generate import Generated as Generated
    from bigq.sched.generate import generate as generate
    from bigq.sched.planner import Plan as Plan
    from bigq.sched.planning import plan as plan
    from bigq.sched.run import quantize as quantize
    from bigq.sched.whole import load_model as load_model
    from bigq.scheme import QuantizedWeight as QuantizedWeight
    from bigq.scheme import QuantScheme as QuantScheme
    from bigq.scheme import Rule as Rule
    from bigq.solver.gptq import quantize_linear as quantize_linear

#: Where each public name lives. They are imported when first asked for: torch alone takes seconds.
_HOMES = {
    "BigqError": "bigq.errors",
    "EvalConfig": "bigq.sched.evaluate",
    "Evaluation": "bigq.sched.evaluate",
    "GenerateConfig": "bigq.sched.generate",
    "Generated": "bigq.sched.generate",
    "JobConfig": "bigq.config",
    "Plan": "bigq.sched.planner",
    "QuantScheme": "bigq.scheme",
    "QuantizedWeight": "bigq.scheme",
    "Report": "bigq.report",
    "Rule": "bigq.scheme",
    "evaluate": "bigq.sched.evaluate",
    "generate": "bigq.sched.generate",
    "load_model": "bigq.sched.whole",
    "plan": "bigq.sched.planning",
    "quantize": "bigq.sched.run",
    "quantize_linear": "bigq.solver.gptq",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bigq' has no attribute {name!r}")
