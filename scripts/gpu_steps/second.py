"""What the time that is left after a first session is best spent on. Decided from its results alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_steps.aims import missed
from gpu_steps.runner import DEBUG, LONG, PROFILE, Step

#: By the value of their evidence: is it right; how long do whole models take; the rest.
VALUE = ("kernels", "jobs", "bloom", "deepseek", "llama", "qwen3", "gpu-tests", "benchmarks", "large")
#: Steps whose inputs the step shards writes.
NEED_SHARDS = ("bloom", "deepseek", "llama", "qwen3")
#: A step is not started with less time than this; it would only be cut off.
LEAST_SECONDS = 40.0
#: Seconds that a step gets beyond what it took in the first session.
MORE_SECONDS = 20.0
#: Seconds of the step shards where nothing else runs beside it, and of the profiles of one step.
SHARDS_SECONDS, PROFILE_SECONDS = 40.0, 100.0
PREFIX = "results"


def read_earlier(place: Path) -> dict[str, Any]:
    """The results in a folder, or in one file. Of several sessions in a folder, the last one that ran a step counts.

    Raises ValueError if there are none.
    """
    files = [place] if place.is_file() else sorted(place.glob(f"{PREFIX}*.json"), key=number_of)
    try:
        found = [json.loads(file.read_text()) for file in files]
        steps = {name: step for one in found for name, step in one["steps"].items()}
        return {**found[-1], "steps": steps}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{place}: holds no results of a session: {type(error).__name__}") from error


def number_of(path: Path) -> int:
    """1 for results.json, 2 for results-2.json."""
    number = path.stem.removeprefix(PREFIX).removeprefix("-")
    return int(number) if number.isdigit() else 1


def next_stem(out: Path) -> str:
    """results-2, or the first number that no file in ``out`` has."""
    number = 2
    while (out / f"{PREFIX}-{number}.json").exists():
        number += 1
    return f"{PREFIX}-{number}"


def choose(earlier: Mapping[str, Any], boxes: Mapping[str, float], sources: str, seconds: float) -> tuple[list[Step], dict[str, str]]:
    """The steps to run within ``seconds``, best first, and why others are left out.

    boxes: the time box of every step. sources: hash of today's sources. A step that failed with other sources runs again as it
    was; with the same sources it would fail alike, so its kernels then run one at a time, and the error names the one that failed.
    """
    left_out: dict[str, str] = {}
    wanted = [step for name in VALUE if (step := unfinished(name, earlier, boxes[name], sources, left_out))]
    wanted += [step for name in VALUE if (step := unmet(name, earlier))]
    wanted += [step for step in extra(earlier, boxes) if step.name not in {one.name for one in wanted}]
    chosen: list[Step] = []
    left, together, shards = seconds, 0.0, False
    for step in wanted:
        cost = max(0.0, step.seconds - together) if step.together else step.seconds
        needs = step.name in NEED_SHARDS and not shards
        if needs:
            cost += max(0.0, SHARDS_SECONDS - together)
        if cost and left < min(LEAST_SECONDS, cost):
            left_out[step.name] = f"{step.reason}; no time left"
            continue
        if needs:
            shards, together = True, max(together, SHARDS_SECONDS)
        chosen.append(step)
        if step.together:
            together = max(together, step.seconds)
        left -= min(cost, left)
    if shards:
        chosen.append(Step(name="shards", seconds=boxes["shards"], together=True, reason="inputs of the steps that follow"))
    return sorted(chosen, key=lambda step: not step.together), left_out


def unfinished(name: str, earlier: Mapping[str, Any], box: float, sources: str, left_out: dict[str, str]) -> Step | None:
    """The step, if the first session did not bring it to a good end."""
    step = earlier["steps"].get(name, {"status": "not run"})
    status, together = step["status"], name in ("kernels", "jobs", "gpu-tests")
    if status == "passed":
        return None
    if reason := step.get("found", {}).get("not possible"):
        left_out[name] = f"not possible on that machine: {reason}"
        return None
    if status == "not run":
        return Step(name=name, seconds=box, together=together, reason="was not run")
    if status in ("cut off", "running"):
        took = float(step.get("seconds", box))
        return Step(name=name, seconds=max(box, 1.5 * took), together=together, reason=f"was cut off after {took:.0f} s")
    tests = tuple(failure.split(": ", 1)[1] for failure in step.get("failures", []) if "::" in failure)
    again = {"seconds": min(box, float(step.get("seconds", box)) + MORE_SECONDS), "together": together, "focus": tests[:20]}
    count = f"failed ({len(step.get('failures', []))} findings)"
    if earlier.get("sources") == sources:
        return Step(name=name, reason=f"{count}; the sources are the same, so it runs with blocking launches", mode=DEBUG, **again)
    return Step(name=name, reason=f"{count}; the sources have changed since", **again)


def unmet(name: str, earlier: Mapping[str, Any]) -> Step | None:
    """The step with a profile, if it passed and its measurements missed their aims. Of the benchmarks, only those that did."""
    step = earlier["steps"].get(name, {})
    names = missed(step)
    if step.get("status") != "passed" or not names:
        return None
    focus = tuple(dict.fromkeys(aim.partition(":")[0] for aim in names)) if name == "benchmarks" else ()
    return Step(name=name, seconds=PROFILE_SECONDS, mode=PROFILE, focus=focus, reason=f"missed its aims: {', '.join(names)}")


def extra(earlier: Mapping[str, Any], boxes: Mapping[str, float]) -> list[Step]:
    """What is worth having when nothing is left to mend: the sanitizer, and a slice of many blocks."""
    steps: list[Step] = []
    if "compute-sanitizer" in earlier["steps"].get("machine", {}).get("found", {}).get("tools", []) and "sanitizer" not in earlier["steps"]:
        steps.append(Step(name="sanitizer", seconds=boxes["sanitizer"], reason="was not asked for in the first session"))
    steps.append(Step(name="bloom", seconds=2 * boxes["bloom"], mode=LONG, reason="more blocks make the extrapolation safer"))
    return steps


def ceilings_of(earlier: Mapping[str, Any], device: str | None) -> dict[str, Any] | None:
    """The ceilings that the earlier session measured, if it ran on the same kind of device; None otherwise. device: None is the CPU."""
    found = earlier["steps"].get("machine", {}).get("found", {})
    if "ceilings" not in found or found.get("machine", {}).get("device") != device:
        return None
    return {"ceilings": found["ceilings"], "machine": found["machine"]}


def about_choice(place: str, chosen: Sequence[Step], left_out: Mapping[str, str]) -> dict[str, Any]:
    """What the results say about the choice."""
    rows = [{key: value for key, value in dataclasses.asdict(step).items() if value not in ("", (), False)} for step in chosen]
    return {"second_after": place, "chosen": rows, "left_out": dict(left_out)}
