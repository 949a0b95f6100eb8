"""metadata.json says who wrote it; a start with other versions says so, and a newer format is refused."""

import json
import platform
from importlib.metadata import version

import jax
import pytest

from qwen_jax import __version__
from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError
from qwen_jax.ledger.checks import DamagedError
from qwen_jax.ledger.metadata import FORMAT_VERSION, parse_metadata
from qwen_jax.run.written_by import differences, in_words, written_by
from qwen_jax.shards import compress


def rewrite(workspace, **fields) -> None:
    path = workspace.output / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_records_it_outside_the_fingerprint(finished):
    metadata = finished.metadata()
    assert metadata["format_version"] == FORMAT_VERSION
    assert "written_by" not in metadata["fingerprint"]
    kind = jax.local_devices()[0].device_kind
    expected = {
        "toolkit": __version__,
        "python": platform.python_version(),
        "device_kind": kind,
        "devices": 1,
    }
    expected["device_check"] = "not made"
    expected |= {name: version(name) for name in ("jax", "jaxlib", "isal")}
    assert {name: metadata["written_by"][name] for name in expected} == expected


@pytest.mark.wide
def test_a_start_with_other_versions_says_what_differs_in_one_line(workspace):
    workspace.killed_at("checkpoint_local:2")
    ours = workspace.metadata()["written_by"]
    rewrite(workspace, written_by=ours | {"jax": "0.0.1", "isal": "absent", "devices": 64})
    done = workspace.run()
    (line,) = [line for line in done.stderr.splitlines() if "other versions" in line]
    assert f"(jax was 0.0.1, is {ours['jax']}; isal was absent, is {ours['isal']})" in line
    assert "WARNING" in line and "bits of shards from here on may differ" in line
    assert workspace.metadata()["written_by"] == ours


@pytest.mark.wide
def test_a_start_with_the_same_versions_says_nothing_of_them(workspace):
    workspace.killed_at("checkpoint_local:2")
    assert "versions" not in workspace.run().stderr


@pytest.mark.wide
def test_a_run_of_a_toolkit_that_recorded_nothing(workspace):
    workspace.killed_at("checkpoint_local:2")
    path = workspace.output / "metadata.json"
    fields = workspace.metadata()
    del fields["written_by"], fields["format_version"]
    path.write_text(json.dumps(fields))
    assert "other versions or devices (they are not recorded): the bits" in workspace.run().stderr
    assert workspace.metadata()["format_version"] == FORMAT_VERSION


def test_without_isal(monkeypatch):
    before = written_by(jax.local_devices())
    monkeypatch.setattr(compress, "isal_zlib", None)
    assert differences(before, written_by(jax.local_devices())) == [f"isal was {before['isal']}, is absent"]


def test_what_a_run_did_not_record_does_not_differ():
    now = written_by(jax.local_devices())
    assert differences({}, now) == [] and in_words({}) == "versions that are not recorded"
    assert f"jax {now['jax']}" in in_words(now)


def test_a_newer_format_is_refused_by_worker_and_readers(workspace, finished):
    workspace.run("--max_samples", "2")
    rewrite(
        workspace, format_version=FORMAT_VERSION + 1, written_by={"toolkit": "9.8.7"}, shards="as it likes"
    )
    words = f"has format {FORMAT_VERSION + 1} and was written by toolkit 9.8.7; this is toolkit {__version__}"
    before = (workspace.output / "metadata.json").read_bytes()
    assert words in workspace.run("--max_samples", "2", expect=65).stderr
    assert (workspace.output / "metadata.json").read_bytes() == before
    for command in ("inspect", "verify", "stats"):
        with pytest.raises(BadDataError, match=words) as raised:
            main([command, str(workspace.output)])
        assert str(workspace.output) in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [{"format_version": 0}, {"format_version": "2"}, {"written_by": []}, {"written_by": {"jax": [1]}}],
)
def test_what_no_toolkit_wrote_is_damage(finished, fields):
    with pytest.raises(DamagedError):
        parse_metadata(json.dumps(finished.metadata() | fields).encode())


def test_metadata_from_before_is_read(finished):
    old = {k: v for k, v in finished.metadata().items() if k not in ("format_version", "written_by")}
    assert parse_metadata(json.dumps(old).encode()).written_by == {}
