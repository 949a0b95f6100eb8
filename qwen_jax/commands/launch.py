"""Starts every worker. launch_all_workers.sh is this command.

  gcloud      on TPU VMs over ssh; with --supervise it makes the VMs too, and again when they are pre-empted
  kubernetes  as one Indexed Job: deploy/kubernetes
  skypilot    as managed spot jobs: deploy/skypilot
  slurm       as one job array: deploy/slurm
  local       on this machine, until all are done

The worker's own variables (MODEL_PATH, BATCH_SIZE, ...) are passed on where they are set. Exit code 0 when every
worker was started (with --supervise or locally: is complete), 1 when some were not, 2 for a wrong call, 75 when gcloud,
kubectl, sky or sbatch does not work.

  GCS_BUCKET=your-bucket ./launch_all_workers.sh --dry_run
  GCS_BUCKET=your-bucket ./launch_all_workers.sh --workers 3,7-9
  GCS_BUCKET=your-bucket ./launch_all_workers.sh --supervise --create queued --code_url gs://your-bucket/qwen.tar.gz
  GCS_BUCKET=your-bucket ./launch_all_workers.sh --engine kubernetes --num_workers 64 --image your-registry/image:tag
  ./launch_all_workers.sh --engine slurm --num_workers 64 --sbatch_flags='--gpus=1 --time=24:00:00'
  ./launch_all_workers.sh --engine local --num_workers 2 --supervise
"""

import os
import shlex
import shutil
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_jax import hardware
from qwen_jax.cli import FlagParser, positive_float, positive_int
from qwen_jax.errors import TerminatedError, ToolkitError, UsageError
from qwen_jax.fleet import kubernetes, local, skypilot, slurm
from qwen_jax.fleet.command import CommandError, call
from qwen_jax.fleet.gcloud import INSTANCE, QUEUED, VM, Cloud, Vms
from qwen_jax.fleet.supervise import Clock, Policy, Supervisor
from qwen_jax.fleet.worker_variables import (
    bucket_name,
    listed,
    number_of_workers,
    parse_workers,
    without_secrets,
)
from qwen_jax.settings import Settings, add_settings, take_settings

_TOOLS = {
    "gcloud": ("gcloud", "install the Google Cloud CLI"),
    "kubernetes": ("kubectl", "install it, and connect it to the cluster"),
    "skypilot": ("sky", "pip install 'skypilot[gcp]', then run: sky check gcp"),
    "slurm": ("sbatch", "run this on a machine that submits to the cluster"),
}
_WITHOUT_BUCKET = ("local", "slurm")
"""Engines whose workers may share a file system, and so need no bucket."""


def add_flags(parser: FlagParser) -> None:
    flag = parser.flag
    flag("engine", "who runs the workers", default="gcloud", choices=(*_TOOLS, "local"))
    flag("num_workers", "workers 0 to N-1", env="NUM_WORKERS", default=32, type=number_of_workers)
    flag("workers", "only these: 3,7-9", type=parse_workers)
    parser.switch("supervise", "gcloud, local: stay, and start again what died, until all are complete")
    parser.switch("dry_run", "print what would be done")
    flag(
        "parallel",
        "gcloud calls of a kind at once, else 8; slurm tasks, else all; local workers, else one a device or core",
        type=positive_int,
    )
    _add_gcloud_flags(parser)
    flag("poll_s", "gcloud, with --supervise: seconds between looks", default=60.0, type=positive_float)
    flag(
        "backoff_s",
        "with --supervise: first wait before another try; doubles",
        default=60.0,
        type=positive_float,
    )
    flag("max_attempts", "with --supervise: tries without progress", default=20, type=positive_int)
    flag("image", "kubernetes: the container image", env="IMAGE")
    flag(
        "sbatch_flags",
        "slurm: further flags of sbatch, quoted as for a shell, after =",
        env="SBATCH_FLAGS",
        type=tool_flags,
    )


def _add_gcloud_flags(parser: FlagParser) -> None:
    flag = parser.flag
    flag("zone", "gcloud: zone of the VMs", env="ZONE", default="us-central2-b")
    names = "gcloud: names of the VMs, {} for the id"
    flag("name_pattern", names, env="NAME_PATTERN", default="tpu-worker-{}", type=_pattern)
    flag("remote_dir", "gcloud: the checkout on a VM, from its home", env="REMOTE_DIR", default="qwen")
    flag(
        "code_url",
        "gcloud: gs:// address of a .tar.gz to unpack where the checkout is missing",
        env="CODE_URL",
    )
    flag(
        "streams_url",
        "gcloud: gs:// folder of the streams; a VM fetches its own where it is missing",
        env="STREAMS_URL",
    )
    flag(
        "create",
        "gcloud: what the machines are: VMs of the Cloud TPU API, made at once or queued, or instances",
        default=VM,
        choices=(VM, QUEUED, INSTANCE),
    )
    flag(
        "accelerator_type",
        f"gcloud: of a new machine, else {Vms.accelerator_type}; kubernetes: of the nodes, else as job.yaml says",
        env="ACCELERATOR_TYPE",
    )
    flag(
        "runtime_version",
        "gcloud, --create vm and queued: else the one for the accelerator type",
        env="RUNTIME_VERSION",
    )
    parser.switch("on_demand", "gcloud: new VMs are not spot VMs")
    flag(
        "gcloud_create_flags",
        "gcloud: further flags of a new VM, quoted as for a shell, after =",
        env="GCLOUD_CREATE_FLAGS",
        type=tool_flags,
    )
    flag(
        "gcloud_ssh_flags",
        "gcloud: further flags of ssh, quoted as for a shell, after =",
        env="GCLOUD_SSH_FLAGS",
        type=tool_flags,
    )


def _pattern(text: str) -> str:
    if "{}" not in text:
        raise ArgumentTypeError(f"NAME_PATTERN must contain {{}} for the worker id, got {text!r}")
    return text


def tool_flags(text: str) -> tuple[str, ...]:
    """An argparse type: words as a shell would read them."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not what a shell reads: {error}") from error
    if any(word.startswith("--") and "_" in word.partition("=")[0] for word in words):
        raise ArgumentTypeError(f"write it in one word with =, as --gcloud_ssh_flags='...'; got {text!r}")
    return words


def run(args: Namespace) -> int:
    if not (local.CHECKOUT / "launch_worker.sh").exists():
        raise UsageError(
            "workers are launched from a checkout of the toolkit; this is the package without one"
        )
    needs_bucket = args.engine not in _WITHOUT_BUCKET
    if needs_bucket:
        _check_bucket()
    settings = _check_settings(upload=needs_bucket or bool(os.environ.get("GCS_BUCKET")))
    machine = args.accelerator_type or (Vms.accelerator_type if args.engine == "gcloud" else None)
    if settings is not None and machine is not None:
        _warn_of_memory(settings, machine)
    if args.engine in _TOOLS:
        _check_engine(args)
    return _RUN[args.engine](args)


def _check_bucket() -> None:
    if not os.environ.get("GCS_BUCKET"):
        raise UsageError("set GCS_BUCKET to the bucket that the workers upload to")
    bucket_name(os.environ)


def _check_engine(args: Namespace) -> None:
    if args.supervise and args.engine != "gcloud":
        raise UsageError(f"{args.engine} starts workers again by itself: leave --supervise out")
    tool, advice = _TOOLS[args.engine]
    if not args.dry_run and shutil.which(tool) is None:
        raise UsageError(f"{tool} was not found; {advice}")


def _check_settings(*, upload: bool) -> Settings | None:
    """Reads the worker's variables as each worker would, before any machine is paid for; exits with 2. None where
    packages are missing."""
    parser = FlagParser(prog="launch_all_workers.sh", env_for_all=True)
    try:
        add_settings(parser)
        parser.switch("verbose", "")
        return take_settings(vars(parser.parse_args([])) | {"worker_id": "0", "upload_to_gcs": upload})
    except ModuleNotFoundError as error:
        print(f"settings are left to the workers to check: no {error.name} here", file=sys.stderr)
        return None


def _warn_of_memory(settings: Settings, accelerator_type: str) -> None:
    """Says so where the model cannot fit such machines, if its config is at hand."""
    from qwen_jax.accelerators import ACCELERATORS
    from qwen_jax.model.config import read_config

    machine, folder = ACCELERATORS.get(accelerator_type), _config_folder(settings)
    if machine is None or folder is None:
        return
    try:
        from qwen_jax.run.roof import complaint, outline_of_config

        said = complaint(outline_of_config(settings, read_config(folder)), machine)
    except ModuleNotFoundError:
        return
    except ToolkitError as error:
        said = str(error)
    if said is not None:
        print(f"warning: {settings.model_path} on {machine.name}: {said}", file=sys.stderr)


def _config_folder(settings: Settings) -> Path | None:
    """Where the model's config.json lies: in its folder, or in the hub's cache here; nothing is fetched."""
    folder = Path(settings.model_path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(settings.model_path, "config.json", revision=settings.revision)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _workers(args: Namespace) -> tuple[int, ...]:
    return args.workers if args.workers is not None else tuple(range(args.num_workers))


def _say(text: str) -> None:
    print(text, flush=True)


def _policy(args: Namespace) -> Policy:
    return Policy(args.poll_s, args.backoff_s, args.max_attempts, args.parallel or Policy.parallel)


def _run_gcloud(args: Namespace) -> int:
    vms = Vms(
        zone=args.zone,
        name_pattern=args.name_pattern,
        remote_dir=args.remote_dir,
        code_url=args.code_url,
        accelerator_type=args.accelerator_type or Vms.accelerator_type,
        runtime_version=args.runtime_version,
        on_demand=args.on_demand,
        kind=args.create,
        streams_url=args.streams_url,
        create_flags=args.gcloud_create_flags or (),
        ssh_flags=args.gcloud_ssh_flags or (),
    )
    if args.supervise:
        vms.create_command(0)  # complains of what does not go together
    if args.dry_run:
        for worker in _workers(args):
            commands = [vms.create_command(worker)] if args.supervise else []
            for command in [*commands, vms.start_command(worker, without_secrets(os.environ))]:
                print(shlex.join(command))
        return 0
    return _supervise(vms, args) if args.supervise else _start_all(vms, args)


def _start_all(vms: Vms, args: Namespace) -> int:
    workers, cloud = _workers(args), Cloud(vms, os.environ)

    def start(worker: int) -> str | None:
        _say(f"starting worker {worker} on {cloud.name(worker)}")
        try:
            cloud.start(worker)
        except CommandError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(args.parallel or Policy.parallel) as pool:
        errors = dict(zip(workers, pool.map(start, workers), strict=True))
    failed = {worker: error for worker, error in errors.items() if error is not None}
    for worker, error in failed.items():
        print(f"worker {worker}: {error}", file=sys.stderr)
    _say(f"{len(workers) - len(failed)} of {len(workers)} workers started")
    if failed:
        advice = "mend what gcloud reported above and run this again (running workers refuse a second start)"
        print(f"not started: {listed(failed)}; {advice}", file=sys.stderr)
    return 1 if failed else 0


def _supervise(vms: Vms, args: Namespace) -> int:
    workers = _workers(args)
    outcome = Supervisor(Cloud(vms, os.environ), workers, _policy(args), Clock(), _say).run()
    _say(f"{len(outcome.finished)} of {len(workers)} workers completed")
    if outcome.given_up:
        print(f"given up: {listed(outcome.given_up)}; the reasons are above", file=sys.stderr)
    return 1 if outcome.given_up else 0


def _run_kubernetes(args: Namespace) -> int:
    if args.workers is not None:
        raise UsageError(
            "an Indexed Job runs workers 0 to N-1: use --num_workers, or another engine for a few"
        )
    if not args.image:
        raise UsageError("set --image or IMAGE to the worker's image, built from deploy/Dockerfile")
    fleet = kubernetes.Fleet(args.num_workers, args.image, args.accelerator_type)
    if args.dry_run:
        with TemporaryDirectory() as name:
            folder = Path(name).resolve()
            kubernetes.write_overlay(folder, fleet, without_secrets(os.environ))
            if shutil.which("kubectl") is None:
                print((folder / "kustomization.yaml").read_text(), end="")
            else:
                print(call(["kubectl", "kustomize", str(folder)]), end="")
        return 0
    _say(kubernetes.apply(fleet, os.environ).strip())
    _say(f"{args.num_workers} workers handed to Kubernetes; watch them: kubectl get pods -l app=extraction")
    return 0


def _run_skypilot(args: Namespace) -> int:
    commands = skypilot.commands(args.num_workers, args.workers, os.environ)
    for command in commands:
        if args.dry_run:
            print(shlex.join(command))
        else:
            _say(call(command, local.CHECKOUT).strip())
    if not args.dry_run:
        _say(f"{len(_workers(args))} workers handed to SkyPilot; watch them: sky jobs queue")
    return 0


def _run_slurm(args: Namespace) -> int:
    command = slurm.command(
        args.num_workers, args.workers, os.environ, at_once=args.parallel, flags=args.sbatch_flags or ()
    )
    if args.dry_run:
        print(shlex.join(command))
        return 0
    local.make_logs(local.CHECKOUT / "logs")
    _say(call(command, local.CHECKOUT).strip())
    _say(f"{len(_workers(args))} workers handed to Slurm; watch them: squeue --me")
    return 0


def _run_local(args: Namespace) -> int:
    workers, environment = _workers(args), dict(os.environ)
    gpus, chips = hardware.this_machines_gpus(environment), hardware.this_machines_tpu_chips()
    cores = hardware.this_machines_cores()
    slots = min(args.parallel or len(gpus) or chips or len(cores), len(workers))
    portions = local.shares(slots, gpus, chips, cores)
    if args.dry_run:
        for slot, worker in enumerate(workers):
            print(_local_line(worker, portions[slot % slots]))
        return 0
    spawn = local.spawner(environment, portions, Path("logs"))
    fleet = local.LocalFleet(workers, slots, spawn, args.supervise, _policy(args), Clock(), _say)
    ended = _until_signal(fleet)
    _say(f"{len(ended.done)} of {len(workers)} workers completed")
    if ended.stopped:
        raise TerminatedError("stopped; run this again to go on")
    if ended.failed:
        print(f"not completed: {listed(ended.failed)}; see logs/worker_N.log", file=sys.stderr)
    return 1 if ended.failed else 0


def _local_line(worker: int, share: local.Share) -> str:
    variables = {"WORKER_ID": str(worker), **share.variables}
    if os.environ.get("GCS_BUCKET"):
        variables["UPLOAD_TO_GCS"] = "true"
    pinned = ["taskset", "-c", ",".join(map(str, sorted(share.cores)))] if share.cores else []
    return shlex.join(
        ["env", *(f"{name}={value}" for name, value in variables.items()), *pinned, "./launch_worker.sh"]
    )


def _until_signal(fleet: local.LocalFleet) -> local.Ended:
    """SIGTERM and Ctrl-C end the workers as SIGTERM ends one."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(each, lambda *_: fleet.stop.set()) for each in signals]
    try:
        return fleet.run()
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


_RUN = {
    "gcloud": _run_gcloud,
    "kubernetes": _run_kubernetes,
    "skypilot": _run_skypilot,
    "slurm": _run_slurm,
    "local": _run_local,
}
