"""certify --self sees wrong values and bits that are not a sample's own; a worker makes it once a kind of device."""

import json
from dataclasses import dataclass, replace
from threading import Event
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen_jax.__main__ import main
from qwen_jax.cli import FlagParser
from qwen_jax.errors import ToolkitError, UsageError
from qwen_jax.kinds import ALL_KINDS
from qwen_jax.model.attention import Blocked
from qwen_jax.model.capture import use_compilation_cache
from qwen_jax.model.config import parse_config
from qwen_jax.model.published import PUBLISHED, config_fields
from qwen_jax.model.sharding import make_mesh
from qwen_jax.run import device_check, worker
from qwen_jax.run.device_check import TINY, check_model, checked, few_layers
from qwen_jax.run.doctor import THOROUGH
from qwen_jax.run.job import prepare
from qwen_jax.run.written_by import says_passed
from qwen_jax.settings import add_settings, take_settings
from tests.run_worker.conftest import captured_sample, commit, filled
from tests.scripts.conftest import ROOT

SMALL = replace(TINY, hidden_size=32, intermediate_size=48, head_dim=8, num_layers=2)


@dataclass(frozen=True)
class Wrong(Blocked):
    """Half as much again at late positions, and a little more the later in the step a token stands."""

    def __call__(self, positions_T):
        attend = super().__call__(positions_T)
        factor_T = jnp.where(positions_T > 280, 1.5, 1.0) * (1 + 2e-7 * jnp.arange(len(positions_T)))

        def wrong(*args):
            out_TNH, carried = attend(*args)
            return (out_TNH * factor_T[:, None, None]).astype(out_TNH.dtype), carried

        return wrong


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """The reference is compiled once."""
    use_compilation_cache(tmp_path_factory.mktemp("programs"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.mark.wide
def test_this_machine_passes_in_both_dtypes():
    for verdict in check_model("small", SMALL, ("float32", "bfloat16"), make_mesh()):
        assert verdict.faults == [] and "bits are each sample's own" in str(verdict)
        assert list(verdict.worst) == list(ALL_KINDS)
        if verdict.dtype == "bfloat16":  # or nothing was compared
            assert 1e-4 < verdict.worst["mlp"][1].relative < verdict.tolerance


@pytest.mark.wide
def test_values_and_bits_that_are_wrong(monkeypatch):
    """Values at a few late positions only; bits also of samples whose values are well within the tolerance."""
    monkeypatch.setattr(device_check, "make_form", lambda *args: Wrong())
    (verdict,) = check_model("small", SMALL, ("float32",), make_mesh())
    assert any(fault.startswith("attn of layer ") for fault in verdict.faults)
    assert "attn of the sample of 40 tokens" in verdict.unlike
    assert "attn of the sample of 40 tokens: other bits elsewhere" in str(verdict)
    assert not any("embedding" in fault for fault in verdict.faults)


@pytest.mark.parametrize("faults, code, last", [([], 0, "  passed"), (["attn of layer 1"], 1, "  FAILED")])
def test_the_command_ends_as_certify_does(monkeypatch, capsys, faults, code, last):
    asked = []

    def verdicts(config, dtype, model_parallel):
        asked.append((config.hidden_size, dtype, model_parallel))
        yield SimpleNamespace(faults=faults)
        yield SimpleNamespace(faults=[])

    monkeypatch.setattr(device_check, "check_devices", verdicts)
    demo = ("--model_path", str(ROOT / "examples" / "demo" / "model"))
    assert main(["certify", "--self", *demo]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last
    main(["certify", "--self"])
    assert asked == [(64, "float32", 1), (896, "float32", 1)]


@pytest.mark.parametrize("arguments", [[], ["activations", "--self"]])
def test_a_path_or_self(arguments):
    with pytest.raises(UsageError, match="--self"):
        main(["certify", *arguments])


@pytest.mark.parametrize("size", PUBLISHED)
def test_few_layers_are_as_wide_and_few(size):
    config = parse_config(config_fields(size))
    few = few_layers(config)
    assert 1 <= few.num_layers <= 3 and few.vocab_size == 512
    assert replace(few, num_layers=1, vocab_size=1, tied_embeddings=True) == replace(
        config, num_layers=1, vocab_size=1, tied_embeddings=True
    )


class Machine:
    """A job on a device of some kind; checks are counted, and find `faults`."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.made, self.faults = folder, 0, []
        monkeypatch.setattr(device_check, "check_devices", self._check)
        monkeypatch.setattr(device_check, "use_cache", lambda folder: None)

    def _check(self, *args):
        self.made += 1
        yield SimpleNamespace(faults=self.faults)

    def job(self, platform="tpu") -> SimpleNamespace:
        devices = np.array([[SimpleNamespace(platform=platform, device_kind="TPU v9 (x)")]])
        settings = SimpleNamespace(compilation_cache_dir=self.folder / "cache", model_parallel=1)
        step = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
        return SimpleNamespace(config=None, dtype="bfloat16", settings=settings, step=step)

    def start(self, before=None, platform="tpu", known="not made", **versions) -> str:
        self.writer = {
            "jax": "1",
            "device_kind": "TPU v9 (x)",
            "devices": 4,
            "device_check": known,
        } | versions
        return checked(self.job(platform), self.writer, before or {})["device_check"]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_check_that_passed_is_remembered_on_the_machine(machine):
    assert (machine.start(), machine.made) == ("passed", 1)
    (kept,) = (machine.folder / "cache").iterdir()
    assert kept.name == "device_check_TPU_v9_x_.json"
    assert says_passed(json.loads(kept.read_text()), machine.writer | {"devices": 8})
    assert not says_passed(json.loads(kept.read_text()), machine.writer | {"jax": "2"})
    assert (machine.start(known="passed"), machine.made) == ("passed", 1)


def test_a_run_that_has_passed_elsewhere_is_believed(machine):
    assert machine.start() == "passed"
    before = machine.writer | {"device_check": "passed"}
    assert (machine.start(before), machine.made) == ("passed", 1)
    assert (machine.start(before, jax="2"), machine.made) == ("passed", 2)
    assert (machine.start(before | {"device_check": "failed"}), machine.made) == ("passed", 3)


def test_a_check_that_failed_is_said_and_made_again(machine, caplog):
    machine.faults = ["attn of layer 1: 0.3 away"]
    assert (machine.start(), machine.start(), machine.made) == ("failed", "failed", 2)
    assert "does not keep the promises" in caplog.text and not (machine.folder / "cache").exists()


def test_none_is_made_on_a_cpu(machine):
    assert (machine.start(platform="cpu"), machine.made) == ("not made", 0)


def test_the_doctor_makes_it_too(machine, monkeypatch):
    job = machine.job()
    monkeypatch.setattr("qwen_jax.run.job.prepare", lambda settings: job)
    machine.faults = ["attn of layer 1: 0.3 away"]
    with pytest.raises(ToolkitError, match=r"TPU v9 \(x\): failed; .*certify --self") as raised:
        THOROUGH["self-check"](job.settings)
    assert raised.value.exit_code == 1
    machine.faults = []
    assert THOROUGH["self-check"](job.settings) == "TPU v9 (x): passed"
    assert THOROUGH["self-check"](job.settings) == "TPU v9 (x): passed" and machine.made == 2


def test_a_worker_records_it(workspace, monkeypatch):
    parser = FlagParser()
    add_settings(parser)
    job = prepare(take_settings(vars(parser.parse_args(workspace.command()[2:]))))
    monkeypatch.setattr(worker, "checked", lambda job, writer, before: writer | {"device_check": "passed"})
    job.settings.worker_dir.mkdir(parents=True)
    job.settings.checkpoint_dir.mkdir()
    committer = worker.open_committer(job, Event())
    samples = [captured_sample(0, np.ones((job.config.num_layers, 3, 4), np.float32))]
    commit(committer, filled(*samples))
    assert workspace.metadata()["written_by"]["device_check"] == "passed"
