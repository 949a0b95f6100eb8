"""The doctor sees what is wrong before a worker does, and says so with the worker's exit code."""

import json
import os
import shutil
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import extract_activations
from qwen_jax.__main__ import main
from qwen_jax.errors import ToolkitError
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.run import devices, doctor
from qwen_jax.run.exclusive import exclusive_folders
from qwen_jax.run.refusal import WorkerParser
from qwen_jax.settings import add_settings, take_settings
from qwen_jax.storage.folder import FolderStore
from qwen_jax.storage.gcs import GcsStore
from tests.fake_gcs import FakeGcs, Fault
from tests.scripts.conftest import ROOT, setting_variables

DEMO = ROOT / "examples" / "demo"
STREAM = DEMO / "streams" / "stream_000.jsonl"


class Patient:
    """A machine to examine; flags and variables can be changed."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self.monkeypatch, self.capsys = root, monkeypatch, capsys
        for name in (*setting_variables(), "STORAGE_EMULATOR_HOST"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
        monkeypatch.setenv("GCS_RETRY_BUDGET_S", "0")

    def _given(self, *flags: str) -> list[str]:
        given = ["--worker_id", "0", "--dataset_path", str(STREAM), "--model_path", str(DEMO / "model")]
        given += ["--output_dir", str(self.root / "out"), "--checkpoint_dir", str(self.root / "checkpoints")]
        return [
            *given,
            "--compilation_cache_dir",
            str(self.root / "cache"),
            "--max_seq_length",
            "1024",
            *flags,
        ]

    def examine(self, *flags: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """The exit code, and check -> (outcome, text)."""
        code = main(["doctor", *self._given(*flags)])
        lines = [line.split(maxsplit=2) for line in self.capsys.readouterr().out.splitlines()]
        return code, {check: (outcome, text) for outcome, check, text in lines}

    def failures(self, *flags: str) -> tuple[int, dict[str, str]]:
        code, found = self.examine(*flags)
        return code, {check: text for check, (outcome, text) in found.items() if outcome == "fail"}

    def check(self, name: str, *flags: str) -> doctor.Finding:
        """What one check sees."""
        parser = WorkerParser(env_for_all=True)
        add_settings(parser)
        settings = take_settings(vars(parser.parse_args(self._given(*flags))))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor, "THOROUGH", {name: getattr(doctor, name)})
            (found,) = doctor.examine(settings)
        return found

    def refused(self, *flags: str) -> tuple[int, str]:
        """The exit code and the message of a worker that does not start."""
        with pytest.raises((SystemExit, ToolkitError)) as caught:
            extract_activations.main(self._given(*flags))
        if isinstance(caught.value, ToolkitError):
            return caught.value.exit_code, str(caught.value)
        return int(caught.value.code), self.capsys.readouterr().err


@pytest.fixture
def patient(tmp_path, monkeypatch, capsys) -> Patient:
    return Patient(tmp_path, monkeypatch, capsys)


@pytest.fixture
def bucket(patient):
    with FakeGcs() as server:
        patient.monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patient.monkeypatch.setenv("GCS_BUCKET", "bucket")
        patient.monkeypatch.setenv("UPLOAD_TO_GCS", "true")
        yield server


def answering(body: str, **headers: str) -> str:
    """The address of a server that answers every request so; its thread ends with the process."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_address[1]}"


def test_a_healthy_machine(patient, bucket):
    zone = answering(body="projects/1/zones/us-central2-b")
    patient.monkeypatch.setenv("GCE_METADATA_HOST", zone)
    code, found = patient.examine()
    assert code == 0
    assert {check: outcome for check, (outcome, _) in found.items()} == dict.fromkeys(doctor.THOROUGH, "pass")
    assert found["stream"][1].endswith("96 lines") and "4 layers, width 64" in found["model"][1]
    assert found["region"][1] == "bucket in us-central2, VM in us-central2-b"
    assert bucket.tree() == {} and not list((patient.root / "out").rglob("*doctor*"))


@pytest.mark.parametrize(
    "flags, check, code, words",
    [
        (("--dataset_path", "/nowhere/s.jsonl"), "stream", 78, "create_dataset_streams.py"),
        (("--model_path", "/nowhere"), "model", 78, "no such folder"),
        (("--layers_to_extract", "9"), "model", 2, "layers 0 to 3"),
        (("--output_dir", f"{STREAM}/x"), "folders", 75, "a part of the path is a file"),
    ],
)
def test_what_a_worker_would_end_with(patient, flags, check, code, words):
    ends_with, failures = patient.failures(*flags)
    assert (ends_with, set(failures)) == (code, {check})
    assert words in failures[check]


def test_an_empty_stream_is_no_failure(patient):
    """A worker completes it; create_dataset_streams.py makes some where there are fewer rows than streams."""
    (patient.root / "empty.jsonl").touch()
    assert patient.failures("--dataset_path", str(patient.root / "empty.jsonl")) == (0, {})


def test_a_refusal_is_recorded_where_the_fleet_looks(patient, bucket):
    patient.monkeypatch.setenv("PROGRESS_INTERVAL_S", "60")
    code, message = patient.refused("--model_path", str(patient.root))
    (data,) = bucket.tree().values()
    left = ProgressRecord.parse(data)
    assert (left.status, left.exit_code, left.message) == ("failed", code, message) and code == 78
    assert "lacks config.json" in message


def test_all_that_is_refused_at_a_start_is_said(patient, caplog):
    """One after the other would take as many starts."""
    code, message = patient.refused("--dataset_path", "/nowhere/s.jsonl", "--model_path", "/nowhere")
    assert code == 78 and "/nowhere/s.jsonl" in message
    assert ["no such folder" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "variables, flags, words",
    [
        ({"MAX_SEQ_LENGTH": "abc"}, (), "environment variable MAX_SEQ_LENGTH"),
        ({}, ("--batch_size", "0"), "--batch_size"),
        ({}, ("--no_such_flag",), "--no_such_flag"),
        ({"KEEP_TOKENS": "most"}, (), "--keep_tokens most"),
        ({"PROGRESS_INTERVAL_S": "often"}, (), "PROGRESS_INTERVAL_S"),
    ],
)
def test_a_usage_error_is_recorded_too_and_said_once(patient, bucket, variables, flags, words):
    for name, value in ({"PROGRESS_INTERVAL_S": "60"} | variables).items():
        patient.monkeypatch.setenv(name, value)
    if "PROGRESS_INTERVAL_S" not in variables:  # a plan writes no record
        patient.refused(*flags, "--dry_run")
        assert bucket.tree() == {}
    code, message = patient.refused(*flags)
    left = ProgressRecord.parse(bucket.tree()["activations/tpu_0/progress.json"])
    assert code == 2 and (left.worker_id, left.status, left.exit_code) == (0, "failed", 2)
    assert words in left.message and message.count(words) == 1
    here = patient.root / "checkpoints" / "progress_worker_0.json"
    assert here.read_bytes() == bucket.tree()["activations/tpu_0/progress.json"]


def test_nothing_is_recorded_of_a_worker_that_runs(patient):
    """A second start with a slip in it: the record stays that of the first."""
    patient.monkeypatch.setenv("PROGRESS_INTERVAL_S", "60")
    with exclusive_folders([patient.root / "out" / "worker_0"], 0):
        assert patient.refused("--model_path", "/nowhere")[0] == 78
    assert not list(patient.root.rglob("progress_*"))


def break_a_model(folder, how: str) -> None:
    shutil.copytree(DEMO / "model", folder)
    if how == "weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    else:
        path = folder / how
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "how, words",
    [
        ("weights", "lacks weights"),
        ("tokenizer.json", "tokenizer.json is damaged"),
        ("config.json", "config.json is damaged"),
    ],
)
def test_a_model_folder_that_is_not_whole(patient, how, words):
    break_a_model(patient.root / "model", how)
    code, message = patient.refused("--model_path", str(patient.root / "model"))
    assert code == 78 and words in message


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "../nowhere", "~/nowhere"])
def test_a_path_that_leads_nowhere_is_no_hub_id(patient, path):
    code, message = patient.refused("--model_path", path)
    assert code == 78 and "no such folder" in message


@pytest.mark.parametrize("limit, outcome, code", [("0", "fail", 65), ("1", "note", 0)])
def test_a_stream_that_begins_with_no_json(patient, limit, outcome, code):
    """It fails where the worker would."""
    stream = patient.root / "stream.jsonl"
    stream.write_text("<html>\n" + STREAM.read_text())
    found = patient.check("_stream_begins", "--dataset_path", str(stream), "--max_bad_records", limit)
    assert found.outcome == outcome and "line" in found.text
    assert code == (found.error.exit_code if found.error else 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"worker_id": 7}, "worker_id: was 7, is 0"),
        ({"fingerprint": {"overlong": "skip"}}, "overlong: was 'skip', is 'drop_examples'"),
        ({"total_shards": -1}, "--force_restart"),
    ],
)
def test_a_checkpoint_that_does_not_fit(patient, change, words):
    fields = {"worker_id": 0, "total_shards": 1, "last_processed_sample_idx": 5, "status": "in_progress"}
    path = patient.root / "checkpoints" / "checkpoint_worker_0.json"
    path.parent.mkdir()
    path.write_text(json.dumps(fields | {"fingerprint": {}} | change))
    found = patient.check("_checkpoint")
    assert found.error.exit_code == 78 and words in found.text
    assert patient.check("_checkpoint", "--force_restart").outcome == "pass"


def test_a_damaged_checkpoint_is_rebuilt_where_that_can_be(patient):
    path = patient.root / "checkpoints" / "checkpoint_worker_0.json"
    path.parent.mkdir()
    path.write_text("{")
    (patient.root / "out" / "worker_0").mkdir(parents=True)
    (patient.root / "out" / "worker_0" / "metadata.json").touch()
    found = patient.check("_checkpoint")
    assert found.outcome == "note" and "the worker rebuilds it" in found.text


def test_a_foreign_checkpoint_in_the_bucket(patient, bucket):
    fields = {"worker_id": 0, "total_shards": 1, "last_processed_sample_idx": 5, "status": "in_progress"}
    store = GcsStore("bucket", "activations/tpu_0")
    store.put_bytes("checkpoint_worker_0.json", json.dumps(fields | {"fingerprint": {}}).encode())
    code, failures = patient.failures()
    assert code == 78 and "stream_sha256: was None" in failures["checkpoint"]


def test_without_credentials(patient):
    patient.monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    code, found = patient.examine("--upload_to_gcs", "--gcs_bucket", "bucket")
    assert code == 75 and found["credentials"][0] == "fail"
    assert "gcloud auth application-default login" in found["credentials"][1]


def test_missing_packages_are_named(patient):
    patient.monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no_such_package", "google.no_such.storage"))
    code, message = patient.refused()
    assert code == 78 and "no_such_package, google.no_such.storage;" in message


def test_a_folder_that_lacks_a_tokenizer(patient):
    folder = patient.root / "model"
    folder.mkdir()
    shutil.copy(DEMO / "model" / "config.json", folder)
    code, message = patient.refused("--model_path", str(folder))
    assert code == 78 and "lacks tokenizer.json" in message


def test_a_full_disk(patient):
    usage = shutil.disk_usage("/")._replace(free=1000)
    patient.monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, failures = patient.failures()
    assert (
        code == 75 and "0.0 GB free" in failures["disk"] and "--delete_local_after_upload" in failures["disk"]
    )


def test_what_is_stored_needs_no_room_again(patient):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    patient.monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = patient.root / "out" / "worker_0"
    folder.mkdir(parents=True)
    (folder / "shard_0001.pkl.gz").touch()
    os.truncate(folder / "shard_0001.pkl.gz", 10**9)
    assert patient.failures() == (0, {})


@pytest.mark.parametrize(
    "status, words", [(403, "Storage Object User"), (404, "gsutil mb"), (503, "Check the")]
)
def test_a_bucket_that_refuses(patient, bucket, status, words):
    bucket.faults.append(Fault("status", method="POST", status=status, times=99))
    code, failures = patient.failures()
    assert code == 75 and set(failures) == {"bucket"} and words in failures["bucket"]


def test_a_bucket_that_overwrites(patient):
    put = FolderStore.put_bytes
    patient.monkeypatch.setattr(
        FolderStore, "put_bytes", lambda self, name, data, if_generation: put(self, name, data)
    )
    (patient.root / "bucket").mkdir()
    code, failures = patient.failures("--upload_to_gcs", "--gcs_bucket", (patient.root / "bucket").as_uri())
    assert code == 78 and "overwrote an object" in failures["bucket"]


@pytest.mark.parametrize(
    "location, outcome, words",
    [
        ("US", "pass", "bucket in us, VM in us-central2-b"),
        ("US-CENTRAL2", "pass", "bucket in us-central2"),
        ("EUROPE-WEST4", "note", "uploads are slower and cost egress"),
        ("US-CENTRAL1", "note", "this VM in us-central2-b"),
    ],
)
def test_where_bucket_and_machine_are(patient, bucket, location, outcome, words):
    bucket.location = location
    patient.monkeypatch.setenv("GCE_METADATA_HOST", answering(body="projects/1/zones/us-central2-b"))
    code, found = patient.examine()
    assert code == 0 and found["region"][0] == outcome and words in found["region"][1]


def test_elsewhere_than_on_google_cloud(patient, bucket):
    assert patient.examine()[1]["region"] == (
        "note",
        "the bucket is in us-central2; this is no Google Cloud VM",
    )


@pytest.mark.parametrize("behind, outcome", [(0, "pass"), (100, "note"), (1000, "fail"), (-1000, "fail")])
def test_a_clock_that_is_wrong(patient, behind, outcome):
    date = formatdate(time.time() + behind, usegmt=True)
    address = answering(body='{"location": "US"}', Date=date, **{"Content-Type": "application/json"})
    patient.monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{address}")
    _, found = patient.examine("--upload_to_gcs", "--gcs_bucket", "bucket")
    assert found["clock"][0] == outcome
    assert ("behind" in found["clock"][1]) == (behind > 0)


def test_no_network(patient):
    patient.monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    code, failures = patient.failures("--upload_to_gcs", "--gcs_bucket", "bucket")
    assert code == 75 and "does not answer" in failures["clock"]


def test_an_accelerator_that_jax_does_not_see(patient):
    patient.monkeypatch.setattr(devices, "this_machines_tpu_chips", lambda: 4)
    patient.monkeypatch.delenv("JAX_PLATFORMS")
    code, found = patient.examine()
    assert code == 75 and "pip install 'jax[tpu]'" in found["devices"][1]
    assert found["model"] == ("note", "not checked, for what is wrong with devices")
