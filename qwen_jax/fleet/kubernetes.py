"""Workers as one Indexed Job: an overlay on deploy/kubernetes/base, handed to kubectl."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_jax.accelerators import cloud_tpu
from qwen_jax.fleet.command import call
from qwen_jax.fleet.worker_variables import PLACES, SECRETS, bucket_name, settings_of

BASE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base"
_IMAGE = "your-registry/qwen-extraction"
_VOLUMES = ("streams",)
"""Volumes that are folders of the bucket."""


@dataclass(frozen=True)
class Fleet:
    """accelerator_type: of the nodes, a name of accelerators.TPUS; None leaves them as the base says."""

    num_workers: int
    image: str
    accelerator_type: str | None = None


def node_selector(accelerator_type: str) -> dict[str, str]:
    """The labels of GKE's nodes of this kind; raises UsageError for an unknown one."""
    machine = cloud_tpu(accelerator_type)
    label = "cloud.google.com/gke-tpu"
    return {f"{label}-accelerator": machine.gke_type, f"{label}-topology": machine.gke_topology}


def _pod(accelerator_type: str) -> dict[str, Any]:
    """What a pod asks for on such a node: all its chips."""
    chips = {"google.com/tpu": str(cloud_tpu(accelerator_type).chips)}
    container = {"name": "worker", "resources": {"requests": chips, "limits": chips}}
    return {"nodeSelector": node_selector(accelerator_type), "containers": [container]}


def overlay(fleet: Fleet, environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The content of kustomization.yaml in `folder`: the base with these workers and settings."""
    # JAX_PACKAGE: the image has its own.
    settings = settings_of(environment, without=(*PLACES, *SECRETS, "JAX_PACKAGE"))
    secrets = [f"{name}={environment[name]}" for name in SECRETS if environment.get(name)]
    csi = {"volumeAttributes": {"bucketName": bucket_name(environment)}}
    pod = {} if fleet.accelerator_type is None else _pod(fleet.accelerator_type)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "extraction"},
        "spec": {
            "completions": fleet.num_workers,
            "parallelism": fleet.num_workers,
            "maxFailedIndexes": fleet.num_workers,
            "template": {"spec": {"volumes": [{"name": name, "csi": csi} for name in _VOLUMES], **pod}},
        },
    }
    values = [{"op": "add", "path": f"/data/{name}", "value": value} for name, value in settings.items()]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(BASE, folder)],
        "patches": [
            {"patch": json.dumps(job)},
            {"target": {"kind": "ConfigMap", "name": "extraction-settings"}, "patch": json.dumps(values)},
        ],
        "images": [_image(fleet.image)],
        **({"secretGenerator": [{"name": "extraction-secrets", "literals": secrets}]} if secrets else {}),
    }


def _image(image: str) -> dict[str, str]:
    """registry:5000/name:tag, or registry/name@digest, in kustomize's words."""
    name, at, digest = image.partition("@")
    if at:
        return {"name": _IMAGE, "newName": name, "digest": digest}
    path, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return {"name": _IMAGE, "newName": path, "newTag": tag}
    return {"name": _IMAGE, "newName": name, "newTag": "latest"}


def apply(fleet: Fleet, environment: Mapping[str, str]) -> str:
    """Creates the Job, or changes what may change; returns kubectl's words. Raises CommandError with them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_overlay(folder, fleet, environment)
        return call(["kubectl", "apply", "-k", str(folder)])


def write_overlay(folder: Path, fleet: Fleet, environment: Mapping[str, str]) -> None:
    """JSON is YAML too."""
    text = json.dumps(overlay(fleet, environment, folder), indent=2)
    (folder / "kustomization.yaml").write_text(text + "\n")
