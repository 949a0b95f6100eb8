"""One process a worker on one machine, whatever becomes of the file that says so."""

import pytest

from qwen_jax.errors import StorageError, WriterConflictError
from qwen_jax.run.exclusive import exclusive_folders


def held(folder, worker_id=5):
    return exclusive_folders([folder / "worker_5", folder / "checkpoints"], worker_id)


def test_the_second_is_refused(tmp_path):
    with held(tmp_path), pytest.raises(WriterConflictError, match="another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_workers_share_the_folder_of_checkpoints(tmp_path):
    other = exclusive_folders([tmp_path / "worker_6", tmp_path / "checkpoints"], 6)
    with held(tmp_path), other:
        pass


def test_a_lock_that_is_deleted_still_holds(tmp_path):
    with held(tmp_path):
        for lock in tmp_path.rglob("*.lock"):
            lock.unlink()
        with pytest.raises(WriterConflictError, match="another process"), held(tmp_path):
            pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "worker_5").mkdir()
    (tmp_path / "worker_5" / ".worker_5.lock").symlink_to(victim)
    with pytest.raises(StorageError, match="symbolic link, which is not followed: remove it"), held(tmp_path):
        pass
    assert victim.read_text() == "mine"


def test_what_stands_in_the_locks_place_is_not_cut_off(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "worker_5").mkdir()
    (tmp_path / "worker_5" / ".worker_5.lock").hardlink_to(victim)
    with held(tmp_path):
        assert victim.read_text() == "mine"
