"""Machines with accelerators that a run can be planned for and a fleet be made of, and what their makers say of them.

One device here is what jax calls one: on TPU v4 and v5p a chip (its two cores work as one), on TPU7x half a chip.
"""

from dataclasses import dataclass

from qwen_jax.errors import UsageError

_GIB = 2**30
_TFLOPS, _GBPS = 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """One device. memory: bytes. flops: products and sums a second in bfloat16, dense. bandwidth: bytes a second of
    its memory. host_link: bytes a second that can leave it for the host, in one direction. copies_layers: whether its
    compiler lays the weights of all layers out anew in each step, so that they are there twice."""

    platform: str
    memory: float
    flops: float
    bandwidth: float
    host_link: float
    copies_layers: bool = False


@dataclass(frozen=True)
class CloudTpu:
    """A machine with TPU chips in the words of Google Cloud.

    runtime_version: of the Cloud TPU API, which makes VMs at once or queued; None where it makes none. machine_type: of
    Compute Engine; image_family: of an instance of it, None where there is none. gke_type, gke_topology: labels of
    GKE's nodes.
    """

    chips: int
    machine_type: str
    gke_type: str
    gke_topology: str
    runtime_version: str | None = None
    image_family: str | None = None


@dataclass(frozen=True)
class Accelerator:
    """A machine by the name that its users write. topology: what libtpu calls it, and its chip's configuration."""

    name: str
    devices: int
    chip: Chip
    topology: str | None = None
    chip_config: str | None = None
    cloud: CloudTpu | None = None

    @property
    def platform(self) -> str:
        return self.chip.platform


# TPU: peak compute in bf16, HBM capacity and HBM bandwidth of a chip are those of the pages "TPU v4", "TPU v5e",
# "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of docs.cloud.google.com/tpu/docs. Of the host link only v6e's page says
# something (PCIe of the fifth generation), so these are assumptions on the careful side: 16 lanes of the third
# generation on v4, v5e and v5p (16 GB/s), twice that for a chip of v6e and TPU7x. A chip of TPU7x is two
# devices for jax, each with half of its 2,307 TFLOP/s, its 192 GiB, its 7,380 GB/s and its link.
_V4 = Chip("tpu", 32 * _GIB, 275 * _TFLOPS, 1200 * _GBPS, 16 * _GBPS)
_V5E = Chip("tpu", 16 * _GIB, 197 * _TFLOPS, 819 * _GBPS, 16 * _GBPS)
_V5P = Chip("tpu", 95 * _GIB, 459 * _TFLOPS, 2765 * _GBPS, 16 * _GBPS)
_V6E = Chip("tpu", 32 * _GIB, 918 * _TFLOPS, 1638 * _GBPS, 32 * _GBPS)
_TPU7X = Chip("tpu", 96 * _GIB, 1153.5 * _TFLOPS, 3690 * _GBPS, 16 * _GBPS, copies_layers=True)
# GPU: NVIDIA's data sheets of A100 80GB SXM, L4, H100 SXM and H200 SXM: bf16 tensor cores without sparsity, memory
# (a GB there is 10**9 bytes) and its bandwidth; PCIe with 16 lanes of the fourth generation (32 GB/s) or the fifth.
_A100 = Chip("gpu", 80e9, 312 * _TFLOPS, 2039 * _GBPS, 32 * _GBPS)
_H100 = Chip("gpu", 80e9, 989.5 * _TFLOPS, 3350 * _GBPS, 64 * _GBPS)
_H200 = Chip("gpu", 141e9, 989.5 * _TFLOPS, 4800 * _GBPS, 64 * _GBPS)
_L4 = Chip("gpu", 24e9, 121 * _TFLOPS, 300 * _GBPS, 32 * _GBPS)

# The words of Google Cloud. Runtime versions, and that their API has no TPU7x: docs.cloud.google.com/tpu/docs/runtimes.
# Machine types and labels: AI-Hypercomputer/xpk, system_characteristics.py at 02b0c09; of v5e also the page "TPU v5e".
# Instances from v5p on: docs.cloud.google.com/tpu/docs/tpus-and-migs; their images: skypilot-org/skypilot,
# sky/clouds/gcp.py at a790cb6. Looked up in November 2026; none was tried.
IMAGE_PROJECT = "ubuntu-os-accelerator-images"
_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
_IMAGE_TPU7X = "ubuntu-accel-2404-amd64-tpu-tpu7x"


def _v5e(chips: int, topology: str) -> CloudTpu:
    machine = f"ct5lp-hightpu-{chips}t"
    return CloudTpu(chips, machine, "tpu-v5-lite-podslice", topology, "v2-alpha-tpuv5-lite")


def _v6e(chips: int, topology: str) -> CloudTpu:
    machine = f"ct6e-standard-{chips}t"
    return CloudTpu(chips, machine, "tpu-v6e-slice", topology, "v2-alpha-tpuv6e", _IMAGE)


_CLOUD_V4 = CloudTpu(4, "ct4p-hightpu-4t", "tpu-v4-podslice", "2x2x1", "tpu-ubuntu2204-base")
_CLOUD_V5P = CloudTpu(4, "ct5p-hightpu-4t", "tpu-v5p-slice", "2x2x1", "v2-alpha-tpuv5", _IMAGE)
_CLOUD_TPU7X = CloudTpu(4, "tpu7x-standard-4t", "tpu7x", "2x2x1", image_family=_IMAGE_TPU7X)

# The number in a TPU's name counts cores on v4, v5p and TPU7x, which have two a chip, and chips on v5e and v6e.
# What libtpu calls a machine of one chip is not known here.
_ALL = (
    Accelerator("v4-8", 4, _V4, "v4:2x2x1", "megacore", _CLOUD_V4),
    Accelerator("v5litepod-1", 1, _V5E, cloud=_v5e(1, "1x1")),
    Accelerator("v5litepod-4", 4, _V5E, "v5e:2x2", cloud=_v5e(4, "2x2")),
    Accelerator("v5litepod-8", 8, _V5E, "v5e:2x4", cloud=_v5e(8, "2x4")),
    Accelerator("v5p-8", 4, _V5P, "v5p:2x2x1", cloud=_CLOUD_V5P),
    Accelerator("v6e-1", 1, _V6E, cloud=_v6e(1, "1x1")),
    Accelerator("v6e-4", 4, _V6E, "v6e:2x2", cloud=_v6e(4, "2x2")),
    Accelerator("v6e-8", 8, _V6E, "v6e:2x4", cloud=_v6e(8, "2x4")),
    Accelerator("tpu7x-8", 8, _TPU7X, "tpu7x:2x2x1", cloud=_CLOUD_TPU7X),
    *(Accelerator(f"a100-80g{many}", count, _A100) for many, count in (("", 1), ("x8", 8))),
    *(Accelerator(f"h100{many}", count, _H100) for many, count in (("", 1), ("x8", 8))),
    *(Accelerator(f"h200{many}", count, _H200) for many, count in (("", 1), ("x8", 8))),
    Accelerator("l4", 1, _L4),
)
ACCELERATORS = {each.name: each for each in _ALL}
TPUS = {name: each.cloud for name, each in ACCELERATORS.items() if each.cloud is not None}
"""Machines that a fleet on Google Cloud may be made of."""


def accelerator(name: str) -> Accelerator:
    """Raises UsageError naming those that are known."""
    try:
        return ACCELERATORS[name.lower()]
    except KeyError:
        known = ", ".join(ACCELERATORS)
        raise UsageError(f"no accelerator {name!r} is known here; known are {known}") from None


def cloud_tpu(name: str) -> CloudTpu:
    """Raises UsageError naming those that are known."""
    try:
        return TPUS[name]
    except KeyError:
        raise UsageError(f"no TPU machine {name!r} is known here; known are {', '.join(TPUS)}") from None
