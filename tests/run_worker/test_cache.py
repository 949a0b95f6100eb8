"""Compiled programs are code: taken from a folder that only the worker's user can write, never from a bucket."""

import os
import stat
from pathlib import Path

import pytest

from qwen_jax.cli import FlagParser
from qwen_jax.model import capture
from qwen_jax.run import cache
from qwen_jax.run.cache import why_not_used
from qwen_jax.settings import add_settings


def test_a_new_folder_is_this_users_alone(tmp_path):
    folder = tmp_path / "a" / "cache"
    before = os.umask(0)
    try:
        assert why_not_used(folder) is None
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert why_not_used(folder) is None


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_write(tmp_path, mode):
    tmp_path.chmod(mode)
    assert "others may write" in why_not_used(tmp_path)


def test_somebody_elses_folder(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert "it belongs to user" in why_not_used(tmp_path)


def test_a_folder_in_a_mounted_bucket(tmp_path, monkeypatch):
    folder = tmp_path / "my bucket" / "cache"
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda / ext4 rw 0 0\nbucket {tmp_path}/my\\040bucket fuse.gcsfuse rw 0 0\n/dev/sdb /data ext4 rw 0 0\n"
    )
    monkeypatch.setattr(cache, "_MOUNTS", mounts)
    assert why_not_used(folder) == "it is mounted from elsewhere (fuse.gcsfuse)"
    assert why_not_used(tmp_path / "other") is None


def test_a_place_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in why_not_used(tmp_path / "file" / "cache")


@pytest.mark.parametrize("mode, used", [(0o700, True), (0o770, False)])
def test_the_worker_goes_on_without_it(tmp_path, monkeypatch, caplog, mode, used):
    given: list[Path | None] = []
    monkeypatch.setattr(capture, "use_compilation_cache", given.append)
    tmp_path.chmod(mode)
    cache.use_cache(tmp_path)
    assert given == [tmp_path if used else None]
    assert ("others may write into it" in caplog.text) is not used


def test_a_buckets_address_is_refused(capsys):
    parser = FlagParser(env_for_all=True)
    add_settings(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--worker_id", "0", "--compilation_cache_dir", "gs://bucket/cache"])
    assert "compiled programs are code" in capsys.readouterr().err
