"""The budgets of a job, the ways in which its weights get here, and what of both is short. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bigq.config import JobConfig
from bigq.io.remote.parts import LEAST_CACHE, THREADS, part_bytes
from bigq.progress.layout import shortened
from bigq.progress.sizes import show_seconds, show_size
from bigq.sched.plan.cost import Cost
from bigq.sched.plan.shape import ModelShape

#: Bytes per second that plans expect of a network, unless ``--bandwidth`` says otherwise: 1 Gbit/s.
NETWORK_RATE = 125 * 10**6
#: The smallest cache that a plan chooses by itself for a large model, in bytes.
USUAL_CACHE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that a job may use: of device memory (0 on a CPU), of host memory, of disk space."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Shards of a hub model that are not in the hub's cache yet, and are downloaded before the job begins.

    size: bytes. folder: the cache. free: bytes free on its file system; None if OUT is on the same file system, so that one disk budget
    applies to both. rate: bytes per second.
    """

    size: int
    folder: str
    free: int | None = None
    rate: int = NETWORK_RATE

    @property
    def on_disk(self) -> int:
        """Bytes on OUT's file system."""
        return 0 if self.free is not None else self.size

    @property
    def seconds_beside(self) -> float:
        """Seconds that fetching takes during the job."""
        return 0.0

    def within(self, free: int) -> Download:
        """The same: a download cannot be smaller."""
        return self

    def text(self) -> str:
        return f"{show_size(self.size)} to {shortened(self.folder, 30)}, in {_at_rate(self.size, self.rate)}"

    def to_json(self) -> dict[str, Any]:
        return {"way": "download", "bytes": self.size, "cache_bytes": None, "bytes_per_second": self.rate}


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Shards that stay on a server; a job fetches what it needs of them.

    size: bytes of all shards. cache: bytes on OUT's file system that hold what was fetched. given: whether the user gave them, so that
    they cannot be fewer. rate: bytes per second.
    """

    size: int
    cache: int
    given: bool = False
    rate: int = NETWORK_RATE

    @property
    def on_disk(self) -> int:
        """Bytes on OUT's file system."""
        return self.cache

    @property
    def seconds_beside(self) -> float:
        """Seconds that fetching takes during the job, at least."""
        return self.size / self.rate

    def within(self, free: int) -> Streamed:
        """The same with a cache that fits into ``free`` bytes, if one does. What it cannot hold may be fetched twice."""
        return self if self.given else dataclasses.replace(self, cache=max(LEAST_CACHE, min(self.cache, free)))

    def text(self) -> str:
        return f"{show_size(self.size)} through a cache of {show_size(self.cache)}, in {_at_rate(self.size, self.rate)}"

    def to_json(self) -> dict[str, Any]:
        return {"way": "stream", "bytes": self.size, "cache_bytes": self.cache, "bytes_per_second": self.rate}


Fetch = Download | Streamed


def _at_rate(size: int, rate: int) -> str:
    return f"{show_seconds(size / rate)} at {rate / 10**6:g} MB/s"


def usual_cache(shape: ModelShape, size: int) -> int:
    """Bytes of cache for a model whose shards have ``size`` bytes: two blocks and what is on its way, or the whole model if it is small."""
    largest = max(block.stored + block.expert_bytes for block in shape.blocks)
    on_their_way = 2 * THREADS * part_bytes(2 * largest)
    return max(LEAST_CACHE, min(max(USUAL_CACHE, 2 * largest + on_their_way), _whole_parts(size)))


def _whole_parts(size: int) -> int:
    part = part_bytes(size)
    return (-(-size // part) + 1) * part


def over(cost: Cost, budgets: Budgets) -> tuple[int, ...]:
    """Bytes above each budget."""
    needs = (cost.device, cost.host, cost.on_disk)
    return tuple(max(0, need - has) for need, has in zip(needs, (budgets.device, budgets.host, budgets.disk), strict=True))


def shortages(cost: Cost, budgets: Budgets, fetch: Fetch | None, config: JobConfig, local: int = 1) -> Iterator[str]:
    """One sentence per shortage. budgets: without what is fetched. local: processes on a host, of one of which the memory is."""

    def remedy(flag: str, given: int | None, need: int) -> str:
        free = "" if given is not None else "free as much, or "
        return f"{free}give {flag} {_budget(need)} or more"

    device, host, disk = over(cost, budgets)
    if device:
        worst = max(cost.phases, key=lambda phase: phase.device)
        advice = remedy("--vram", config.vram, cost.device)
        yield f"device memory: {show_size(device)} more needed, for the phase '{worst.name}'; {advice}"
    if host:
        worst = max(cost.phases, key=lambda phase: phase.host)
        advice = remedy("--ram", config.ram, local * cost.host)
        each = f" by each of {local} processes" if local > 1 else ""
        yield f"host memory: {show_size(host)} more needed{each}, for the phase '{worst.name}'; {advice}"
    if disk:
        shared = 0 if fetch is None else fetch.on_disk
        fetched = ""
        if isinstance(fetch, Download) and shared:
            fetched = f" and {show_size(shared)} of MODEL downloaded to {fetch.folder}"
        elif isinstance(fetch, Streamed):
            fetched = f" and {show_size(shared)} of --fetch-cache"
        more = f"{show_size(disk)} more needed on OUT's file system, for {show_size(cost.on_disk - cost.scratch)} of output{fetched}"
        yield f"disk: {more}; {remedy('--disk', config.disk, cost.on_disk + shared)}"
    if isinstance(fetch, Download) and fetch.free is not None and fetch.size > fetch.free:
        more = show_size(fetch.size - fetch.free)
        yield (
            f"disk: {more} more needed in {fetch.folder}, for {show_size(fetch.size)} of MODEL (set HF_HOME to use another cache, or give "
            "--fetch stream)"
        )


def _budget(need: int) -> str:
    """A budget that is enough, as options take it: rounded up, after 1 % for what the process itself holds, which varies between runs."""
    tens = math.ceil(1.01 * need / (10 * 2**20))
    return f"{10 * tens}MiB" if tens < 1024 else f"{math.ceil(10 * 1.01 * need / 2**30) / 10:.1f}GiB"
