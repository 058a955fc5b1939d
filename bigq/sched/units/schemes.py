"""The schemes of a bank of experts, by the rules of a job."""

from __future__ import annotations

from bigq.config import JobConfig
from bigq.job.settle import bank_scheme
from bigq.model.experts.pages import StoredBank
from bigq.scheme import QuantScheme


def bank_schemes(bank: StoredBank, config: JobConfig) -> dict[str, QuantScheme]:
    """The scheme of each of a bank's parameters; none if its experts stay unquantized. Raises UsageError."""
    scheme = bank_scheme(bank.base, list(bank.linears()), config)
    return {} if scheme is None else dict.fromkeys(bank.sources, scheme)
