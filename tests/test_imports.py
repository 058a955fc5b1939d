"""Who may import what, checked over the syntax tree. Every check is first shown a violation that it must find.

Modules are given as sources by dotted name, so that synthetic ones can be checked like the real ones.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent / "bigq"
MAX_LINES = 400

#: Dependency → the modules, or packages with everything below them, that may import it.
OWNERS: Mapping[str, tuple[str, ...]] = {
    "triton": ("bigq.kernels",),
    "numba": ("bigq.kernels",),
    "llvmlite": ("bigq.kernels.cpu",),
    "safetensors": ("bigq.io",),
    "transformers": ("bigq.model.skeleton", "bigq.model.architecture", "bigq.data.tokenizer"),
    "torch.distributed": ("bigq.machine.process_group",),
    "huggingface_hub": ("bigq.io.hub", "bigq.io.remote.http", "bigq.io.remote.push", "bigq.io.remote.url"),
    "fsspec": ("bigq.io.remote.objects",),
    "matplotlib": ("bigq.reports.charts",),
    "gguf": ("bigq.io.gguf_file",),
    "pyarrow": ("bigq.io.parquet_file",),
    "yaml": ("bigq.io.yaml_file",),
}

#: The rooms, and the modules of ``bigq/`` itself, from the lowest floor up. A module imports from its own room and from floors below.
#: Rooms on one floor do not import each other.
FLOORS: Sequence[tuple[str, ...]] = (
    ("bigq.version", "bigq.errors", "bigq.vocabulary", "bigq.nested_scales", "bigq.kernels"),
    ("bigq.options",),
    ("bigq.faults", "bigq.scheme", "bigq.common_options"),
    ("bigq.machine", "bigq.progress", "bigq.quantized_weight", "bigq.presets"),
    ("bigq.io", "bigq.solver", "bigq.tuning"),
    ("bigq.data", "bigq.size_options"),
    ("bigq.config", "bigq.calibration"),
    ("bigq.methods", "bigq.mixed"),
    ("bigq.model",),
    ("bigq.job",),
    ("bigq.inspect",),
    ("bigq.conversion",),
    ("bigq.sched.rows",),
    ("bigq.sched.plan",),
    ("bigq.sched.solve",),
    ("bigq.sched",),
    ("bigq.infer",),
    ("bigq.reports",),
    ("bigq.batch",),
    ("bigq.live",),
    ("bigq.api",),
    ("bigq.__init__",),
    ("bigq.cli",),
    ("bigq.__main__",),
)

#: Rooms that may hold more than ``MAX_MODULES``.
LARGE_ROOMS = ("bigq.io",)
MAX_MODULES = 15

READS_ENVIRONMENT = ("bigq.cli.main",)

Sources = Mapping[str, str]


class Import(NamedTuple):
    """One imported name, dotted and absolute; ``typing_only`` where only a type checker sees it."""

    name: str
    line: int
    typing_only: bool


@functools.cache
def real_sources() -> Sources:
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["bigq", *path.relative_to(ROOT).with_suffix("").parts]
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources


def within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import of a module, those inside functions and by ``import_module("…")`` too.

    ``from a import b`` gives ``a.b``: whether that is a module or a name in one is for the reader to see.
    A package's own code is the module ``package.__init__``.
    """
    tree = ast.parse(source)
    hidden = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and _is_type_checking(test.test)
        for body in test.body
        for node in ast.walk(body)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__") and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"] if f"{node.value.id}.{node.attr}" in OWNERS else []
        yield from (Import(name, getattr(node, "lineno", 0), id(node) in hidden) for name in names)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_type_checking(test: ast.expr) -> bool:
    return _last_name(test) == "TYPE_CHECKING"


def foreign_dependencies(sources: Sources) -> list[str]:
    """Imports of a dependency by a module that does not own it."""
    return [
        f"{module}:{found.line} imports {dependency}"
        for module, source in sources.items()
        for found in imports(module, source)
        for dependency, owners in OWNERS.items()
        if within(found.name, dependency) and not any(within(module, owner) for owner in owners)
    ]


def room_of(name: str) -> tuple[str, int] | None:
    """The room of a dotted name and its floor; the innermost where one room lies in another. None for what has no room."""
    found = [(room, floor) for floor, rooms in enumerate(FLOORS) for room in rooms if within(name, room)]
    return max(found, key=lambda pair: len(pair[0]), default=None)


def homeless(sources: Sources) -> list[str]:
    """Modules that no room of ``FLOORS`` holds."""
    return [f"{module} is in no room" for module in sources if room_of(module) is None]


def climbing_imports(sources: Sources) -> list[str]:
    """Imports from a higher floor, or from another room on the same floor."""
    climbing = []
    for module, source in sources.items():
        here = room_of(module)
        for found in imports(module, source):
            if not within(found.name, "bigq") or here is None:
                continue
            there = room_of(found.name) or room_of("bigq.__init__")
            assert there is not None
            if there[0] != here[0] and there[1] >= here[1]:
                climbing.append(f"{module}:{found.line} imports {found.name}")
    return climbing


def crowded(sources: Sources) -> list[str]:
    """Rooms with too many modules."""
    rooms = Counter(module.rpartition(".")[0] for module in sources if not module.endswith("__init__"))
    return [f"{room} holds {count} modules" for room, count in rooms.items() if count > MAX_MODULES and room not in LARGE_ROOMS]


def import_graph(sources: Sources) -> dict[str, set[str]]:
    """Which of the modules each imports at run time."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for found in imports(module, source):
            if not found.typing_only:
                homes = [found.name, f"{found.name}.__init__", parent := found.name.rpartition(".")[0], f"{parent}.__init__"]
                graph[module] |= {next((home for home in homes if home in sources), module)} - {module}
    return graph


def cycles(sources: Sources) -> list[str]:
    """One description for each module from which a path of imports leads back to it."""
    graph = import_graph(sources)
    found = []
    for start in graph:
        paths = [[start, following] for following in sorted(graph[start])]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            if path[-1] == start:
                found.append(" → ".join(path))
                break
            if path[-1] not in seen:
                seen.add(path[-1])
                paths += [[*path, following] for following in sorted(graph[path[-1]])]
    return found


def environment_reads(sources: Sources) -> list[str]:
    """Uses of the environment outside the command line."""
    words = ("environ", "environb", "getenv", "getenvb")
    found = []
    for module, source in sources.items():
        if module not in READS_ENVIRONMENT:
            for node in ast.walk(ast.parse(source)):
                by_attribute = isinstance(node, ast.Attribute) and node.attr in words
                by_import = isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in words for alias in node.names)
                if by_attribute or by_import:
                    found.append(f"{module}:{getattr(node, 'lineno', 0)} reads the environment")
    return found


def overlong(sources: Sources) -> list[str]:
    return [f"{module} has {lines} lines" for module, source in sources.items() if (lines := len(source.splitlines())) > MAX_LINES]


CHECKS: list[Callable[[Sources], list[str]]] = [
    foreign_dependencies,
    homeless,
    climbing_imports,
    crowded,
    cycles,
    environment_reads,
    overlong,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_bigq_keeps_the_rule(check: Callable[[Sources], list[str]]) -> None:
    assert check(real_sources()) == []


def test_all_of_bigq_is_seen() -> None:
    assert {"bigq.__init__", "bigq.cli.main", "bigq.io.__init__", "bigq.io.index", "bigq.solver.gptq", "bigq.kernels.pack"} <= set(
        real_sources()
    )
    graph = import_graph(real_sources())
    assert {"bigq.scheme", "bigq.solver.hessian", "bigq.kernels.cholesky", "bigq.errors"} <= graph["bigq.solver.gptq"]
    assert "bigq.sched.run" in graph["bigq.cli.job"], "imports inside functions count"


VIOLATIONS: list[tuple[Callable[[Sources], list[str]], dict[str, str], list[str]]] = [
    (foreign_dependencies, {"bigq.solver.gptq": "import triton.language as tl"}, ["bigq.solver.gptq:1 imports triton"]),
    (foreign_dependencies, {"bigq.solver.x": "try:\n    import triton\nexcept ImportError:\n    pass"}, ["bigq.solver.x:2 imports triton"]),
    (foreign_dependencies, {"bigq.sched.x": "from safetensors.torch import load_file"}, ["bigq.sched.x:1 imports safetensors"]),
    (foreign_dependencies, {"bigq.model.blocks": "def f():\n    import transformers"}, ["bigq.model.blocks:2 imports transformers"]),
    (foreign_dependencies, {"bigq.model.pager": "from transformers import AutoModel"}, ["bigq.model.pager:1 imports transformers"]),
    (foreign_dependencies, {"bigq.model.skeleton2": "import transformers"}, ["bigq.model.skeleton2:1 imports transformers"]),
    (
        foreign_dependencies,
        {"bigq.cli.main": "import importlib\nimportlib.import_module('transformers')"},
        ["bigq.cli.main:2 imports transformers"],
    ),
    (foreign_dependencies, {"bigq.sched.x": "import torch\ntorch.distributed.barrier()"}, ["bigq.sched.x:2 imports torch.distributed"]),
    (foreign_dependencies, {"bigq.sched.x": "from torch import distributed as d"}, ["bigq.sched.x:1 imports torch.distributed"]),
    (foreign_dependencies, {"bigq.sched.x": "import torch.distributed"}, ["bigq.sched.x:1 imports torch.distributed"]),
    (foreign_dependencies, {"bigq.reports.html": "def f():\n    import matplotlib.figure"}, ["bigq.reports.html:2 imports matplotlib"]),
    (foreign_dependencies, {"bigq.io.index": "import huggingface_hub"}, ["bigq.io.index:1 imports huggingface_hub"]),
    (foreign_dependencies, {"bigq.io.gguf_vocab": "def f():\n    import gguf"}, ["bigq.io.gguf_vocab:2 imports gguf"]),
    (climbing_imports, {"bigq.io.x": "from bigq.solver.gptq import solve"}, ["bigq.io.x:1 imports bigq.solver.gptq.solve"]),
    (climbing_imports, {"bigq.solver.x": "from bigq import io"}, ["bigq.solver.x:1 imports bigq.io"]),
    (climbing_imports, {"bigq.solver.x": "from ..io.index import Checkpoint"}, ["bigq.solver.x:1 imports bigq.io.index.Checkpoint"]),
    (climbing_imports, {"bigq.kernels.x": "from bigq.errors import BigqError"}, ["bigq.kernels.x:1 imports bigq.errors.BigqError"]),
    (climbing_imports, {"bigq.kernels.x": "import bigq"}, ["bigq.kernels.x:1 imports bigq"]),
    (climbing_imports, {"bigq.kernels.x": "def f():\n    from .. import scheme"}, ["bigq.kernels.x:2 imports bigq.scheme"]),
    (climbing_imports, {"bigq.sched.plan.x": "from bigq.sched.run import a"}, ["bigq.sched.plan.x:1 imports bigq.sched.run.a"]),
    (climbing_imports, {"bigq.job.x": "from bigq.sched.rows.store import a"}, ["bigq.job.x:1 imports bigq.sched.rows.store.a"]),
    (climbing_imports, {"bigq.sched.x": "from bigq import __version__"}, ["bigq.sched.x:1 imports bigq.__version__"]),
    (homeless, {"bigq.attic.x": ""}, ["bigq.attic.x is in no room"]),
    (homeless, {"bigq.stray": ""}, ["bigq.stray is in no room"]),
    (crowded, {f"bigq.job.m{i}": "" for i in range(16)}, ["bigq.job holds 16 modules"]),
    (cycles, {"bigq.a": "import bigq.b", "bigq.b": "from bigq.a import x"}, ["bigq.a → bigq.b → bigq.a", "bigq.b → bigq.a → bigq.b"]),
    (
        cycles,
        {"bigq.a": "def f():\n    from bigq import b", "bigq.b": "from . import a", "bigq.c": "import bigq.a"},
        ["bigq.a → bigq.b → bigq.a"],
    ),
    (cycles, {"bigq.a": "import bigq.b", "bigq.b": "import bigq.c", "bigq.c": "import bigq.a"}, ["bigq.a → bigq.b → bigq.c → bigq.a"]),
    (
        cycles,
        {"bigq.__init__": "from bigq.a import f", "bigq.a": "from bigq import v"},
        ["bigq.__init__ → bigq.a → bigq.__init__"],
    ),
    (environment_reads, {"bigq.sched.x": "import os\nx = os.environ.get('A')"}, ["bigq.sched.x:2 reads the environment"]),
    (environment_reads, {"bigq.sched.x": "import os as o\no.getenv('A')"}, ["bigq.sched.x:2 reads the environment"]),
    (environment_reads, {"bigq.sched.x": "from os import path, environ"}, ["bigq.sched.x:1 reads the environment"]),
    (overlong, {"bigq.x": "\n" * 401}, ["bigq.x has 401 lines"]),
]


@pytest.mark.parametrize(("check", "sources", "expected"), VIOLATIONS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_a_violation_is_found(check: Callable[[Sources], list[str]], sources: Sources, expected: list[str]) -> None:
    assert check(sources)[: len(expected)] == expected


ALLOWED: list[tuple[Callable[[Sources], list[str]], dict[str, str]]] = [
    (foreign_dependencies, {"bigq.reports.charts": "def f():\n    from matplotlib import patches"}),
    (foreign_dependencies, {"bigq.kernels.x": "import triton", "bigq.io.hub": "import huggingface_hub", "bigq.io.x": "import safetensors"}),
    (
        foreign_dependencies,
        {"bigq.model.skeleton": "import transformers", "bigq.machine.process_group": "import torch.distributed as dist"},
    ),
    (foreign_dependencies, {"bigq.solver.x": "import tritonish\nfrom torch import Tensor, nn\n# import triton"}),
    (climbing_imports, {"bigq.kernels.x": "import torch\nfrom bigq.kernels.y import z", "bigq.io.x": "from bigq.scheme import Rule"}),
    (climbing_imports, {"bigq.sched.x": "from bigq.sched.rows.store import a\nfrom bigq.job.journal import b"}),
    (crowded, {f"bigq.io.m{i}": "" for i in range(30)} | {"bigq.job.__init__": ""} | {f"bigq.job.m{i}": "" for i in range(15)}),
    (cycles, {"bigq.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bigq.b", "bigq.b": "import bigq.a"}),
    (cycles, {"bigq.a": "import bigq.b\nimport bigq.c", "bigq.b": "import bigq.c", "bigq.c": "import torch"}),
    (environment_reads, {"bigq.cli.main": "import os\nos.environ['A'] = 'b'", "bigq.x": "import os\nos.environment"}),
    (overlong, {"bigq.x": "\n" * 400}),
]


@pytest.mark.parametrize(("check", "sources"), ALLOWED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_what_is_allowed_is_let_through(check: Callable[[Sources], list[str]], sources: Sources) -> None:
    assert check(sources) == []
