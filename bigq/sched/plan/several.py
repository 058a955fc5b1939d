"""The plan of one of several processes: with what they exchange, and what they gain over a job of one."""

from __future__ import annotations

import dataclasses

from bigq.config import JobConfig
from bigq.sched.plan.costs.traffic import job_traffic
from bigq.sched.plan.planner import Machine, Plan, make_plan
from bigq.sched.plan.scaling import Scaling, reads_of_host, with_traffic
from bigq.sched.plan.sharing import ALONE


def with_scaling(found: Plan, rows: int, config: JobConfig, machine: Machine) -> Plan:
    """A plan of a job that processes share, with their traffic in its times. Others are returned as they are. rows: of the whole job."""
    sharing, shape = found.work.sharing, found.shape
    if sharing.ranks == 1:
        return found
    traffic = job_traffic(shape, found.work, found.choice)
    scaling = Scaling(
        sharing=sharing,
        rows=rows,
        traffic=traffic,
        reads=reads_of_host(shape, found.choice, sharing, found.cost.host, machine.budgets.host),
        links=None if machine.ceilings is None else machine.ceilings.links,
    )
    found = dataclasses.replace(found, scaling=scaling, seconds=with_traffic(found.seconds, traffic, sharing, machine.ceilings))
    if machine.ceilings is None:
        return found
    tokens = min(sharing.ranks * found.work.tokens, rows * shape.seqlen)
    whole = dataclasses.replace(machine.budgets, host=sharing.local * machine.budgets.host)
    one = dataclasses.replace(found.work, rows=rows, tokens=tokens, sharing=ALONE)
    alone = make_plan(shape, one, config, dataclasses.replace(machine, budgets=whole))
    return dataclasses.replace(found, scaling=dataclasses.replace(scaling, times=found.times, alone=alone.times))
