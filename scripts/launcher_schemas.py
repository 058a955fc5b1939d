#!/usr/bin/env python3
"""Check scripts/k8s/job.yaml and scripts/sky.yaml against the schemas of Kubernetes and SkyPilot; prints JSON.

    VENV/bin/python scripts/launcher_schemas.py

VENV: a virtual environment with kubernetes-validate (the schemas of the API, offline) and skypilot (whose own parser reads the task).
Exit status: not 0 if a file is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from sky import Task
from sky.utils import common_utils, schemas

SCRIPTS = Path(__file__).resolve().parent
#: The first version with all fields used, and the newest one that the package knows.
KUBERNETES = ("1.33", kubernetes_validate.latest_version())


def kubernetes() -> dict[str, Any]:
    """Strict: unknown fields are errors."""
    documents = list(yaml.safe_load_all((SCRIPTS / "k8s/job.yaml").read_text()))
    for version in KUBERNETES:
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)
    return {"kinds": [document["kind"] for document in documents], "versions": list(KUBERNETES)}


def skypilot() -> dict[str, Any]:
    """The schemas of a task and its resources, then the parser. Looks nothing up in a cloud."""
    task = yaml.safe_load((SCRIPTS / "sky.yaml").read_text())
    common_utils.validate_schema(task, schemas.get_task_schema(), "sky.yaml: ")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "sky.yaml, resources: ")
    (resources,) = Task.from_yaml_config(task).resources
    return {"job_recovery": resources.job_recovery}


if __name__ == "__main__":
    found = {
        "scripts/k8s/job.yaml": {"kubernetes-validate": importlib.metadata.version("kubernetes-validate"), **kubernetes()},
        "scripts/sky.yaml": {"skypilot": importlib.metadata.version("skypilot"), **skypilot()},
    }
    print(json.dumps(found))
