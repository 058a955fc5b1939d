"""What a job does, and how it is run: the settings that a plan chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bigq.methods.base import CalibratedMethod, Method
from bigq.sched.plan.sharing import ALONE, Sharing
from bigq.scheme import QuantScheme
from bigq.solver.input_products import block_width
from bigq.vocabulary import OnNonfinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a job, independent of the machine. rows: number of calibration rows. scheme: of a Linear, by its full module name.

    tokens: distinct calibration tokens, or the maximum. on_nonfinite: see ``BlockJob``.
    tune_steps: by gradients, for each block's scales. lm_head: whether the output head is quantized too.
    gguf: whether a GGUF file is made from the shards.
    drop: whether shards are removed once a hub repository has them. rotate: whether weights are rotated as they are read.
    survey: streams of the survey that chooses bits first; 0 without one.
    sharing: the processes that share the job; rows and tokens are then those of one of them.
    """

    rows: int
    tokens: int
    scheme: Callable[[str], QuantScheme | None]
    method: Method
    true_sequential: bool
    on_nonfinite: OnNonfinite = "stop"
    lm_head: bool = False
    tune_steps: int = 0
    gguf: bool = False
    drop: bool = False
    rotate: bool = False
    survey: int = 0
    sharing: Sharing = ALONE

    @property
    def hessians(self) -> bool:
        """Whether products of all pairs of a Linear's inputs are summed and factored."""
        return isinstance(self.method, CalibratedMethod) and self.method.hessians

    def collected(self, n: int) -> float:
        """Operations for each token whose n inputs are multiplied with each other, or with their neighbours."""
        return float(n) * n if self.hessians else 2.0 * n * block_width(n)

    @property
    def streams(self) -> int:
        """How many models the rows pass through: 0: none; 1: the quantized one; 2: the quantized and the unquantized one."""
        return self.method.passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a job is run. on_gpu: whether it computes on a GPU. tier: of the activations. memo: whether outputs of modules with a shortcut
    are cached.

    experts_at_once: how many are solved side by side; None: one, and a job that goes on may choose anew.
    kept_rows: for how many rows the inputs of Linears at a block's deepest level are kept; kept_tier: where, "gpu" or "host".
    ahead: bytes for prefetched weights. beside: whether finished blocks are written in parallel with the computation (write-behind).
    checkpoints: whether activations are saved for resumed jobs.
    """

    on_gpu: bool
    tier: str
    batch: int
    memo: bool
    ahead: int
    beside: bool
    checkpoints: bool = False
    kept_rows: int = 0
    kept_tier: str = "host"
    experts_at_once: int | None = None
