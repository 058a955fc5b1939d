"""The proof that roles are right: a module that runs on rotated stand-ins, with rotated inputs, returns rotated outputs, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import UnsupportedModelError
from bigq.model.rotation.banks import ADVICE
from bigq.model.rotation.find import Call, Seen
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import STREAM_SEED, Roles, turns_of
from bigq.model.rotation.standins import Bare

#: The largest relative difference of anything that the two runs compute, in fp32.
TOLERANCE = 1e-3


def prove(bare: Bare, call: Call, hidden: Tensor, roles: Roles, *, stream_out: bool = True) -> float:
    """Run a module as it is and rotated, and compare what every Linear and norm in it returns, and its output.

    call: its output for hidden states like ``hidden``. stream_out: whether that is the stream, and not logits. Returns the largest
    difference. Raises UnsupportedModelError, naming the first module that differs.
    """
    turns = turns_of(roles, bare.width)
    scales = {name: bare.parameters[f"{name}.{bare.norms[name]}"] + offset for name, offset in roles.norms.items()}
    values = {f"{name}.{bare.norms[name]}": torch.full_like(scales[name], 1.0 - offset) for name, offset in roles.norms.items()}
    stream = Rotation(bare.width, STREAM_SEED)
    for name, norm in roles.tables.items():
        path = f"{name}.{bare.tables[name]}"
        values[path] = stream.turn(bare.parameters[path] * scales[norm])
    base, turned = Seen(), Seen()
    output = bare.run(lambda: call(hidden), base.after)
    rotated = bare.run(lambda: call(stream.turn(hidden)), turned.after, turns, values, scales)
    worst = 0.0
    for name, y in base.outputs.items():
        if name in bare.tables:
            continue
        expected = y
        if name in roles.norms:
            expected = stream.turn(y / scales[name])
        elif name in turns and (outputs := turns[name].outputs) is not None:
            expected = outputs.turn(y)
        worst = max(worst, _require_same(f"{bare.name}.{name}", turned.outputs.get(name), expected))
    return max(worst, _require_same(bare.name, rotated, stream.turn(output) if stream_out else output))


def _require_same(name: str, found: Tensor | None, expected: Tensor) -> float:
    if found is not None and found.shape == expected.shape:
        difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if difference <= TOLERANCE:
            return difference
        said = f"its output differs by {difference:.1e} of its norm" if difference == difference else "its output is not finite"
    else:
        said = "it is not called in the same way"
    raise UnsupportedModelError(f"--rotate: {name} does not compute the same once the model is rotated: {said}; {ADVICE}")
