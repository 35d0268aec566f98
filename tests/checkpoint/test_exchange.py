from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tnlm
from tnlm.checkpoint import exchange
from tnlm.checkpoint.exchange import WORK, check_writable, recover, replace_directory
from tnlm.errors import CheckpointError
from tnlm.utils.lock import Lock

OLD = {"config.json": "old", "weights": "old weights", "notes": "old notes"}
NEW = {"config.json": "new", "weights": "new weights", "more": "new"}


def writer(files):
    def write(folder):
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    """A directory with files, alone in its folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    writer(OLD)(folder)
    return folder


def alone(folder):
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


# What a killed process leaves


STEPS = ["part.mkdir", "write", "part -> new", "old.mkdir", "config.json -> old", "notes -> old"]
STEPS += ["weights -> old", "new -> next", "more -> model", "weights -> model"]
STEPS += ["config.json -> model", "rm part", "rm new", "rm old", "rm next"]


def killed_at(step, folder):
    """Write in a child process that is killed before some step."""

    def child():
        counted = iter(STEPS)

        def counting(real, told):
            def wrapped(*args, **kwargs):
                if told(args) and next(counted) == step:
                    os.kill(os.getpid(), 9)
                return real(*args, **kwargs)

            return wrapped

        Path.mkdir = counting(Path.mkdir, lambda args: args[0].name in ("part", "old"))
        Path.replace = counting(Path.replace, lambda args: True)
        exchange.shutil.rmtree = counting(exchange.shutil.rmtree, lambda args: True)
        write = counting(writer(NEW), lambda args: True)
        replace_directory(folder, write, overwrite=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("next_call", ["load", "save"])
def test_the_next_call_finds_the_old_or_the_new_files(step, next_call, old, caplog):
    assert killed_at(step, old) == -9
    if next_call == "load":
        recover(old)
        kept = OLD if STEPS.index(step) <= STEPS.index("new -> next") else NEW
        assert contents(old) == kept
    else:
        replace_directory(old, writer({"config.json": "newest"}), overwrite=True)
        assert contents(old) == {"config.json": "newest"}
    assert alone(old)
    halfway = (
        STEPS.index("notes -> old") <= STEPS.index(step) <= STEPS.index("config.json -> model")
    )
    assert ("interrupted save" in caplog.text) == halfway


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_first_save_leaves_nothing_where_the_model_would_be(tmp_path):
    folder = tmp_path / "model"
    assert killed_at("write", folder) == -9
    assert not folder.exists()
    recover(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_was_left_beside_is_swept_also_if_the_directory_was_made_since(tmp_path):
    folder = tmp_path / "model"
    killed_at("write", folder)
    folder.mkdir()
    replace_directory(folder, writer(NEW))
    assert contents(folder) == NEW
    assert alone(folder)


# Two at once


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stands", [False, True])
def test_a_second_writer_is_refused_and_the_first_one_ends(overwrite, stands, tmp_path):
    folder = tmp_path / "model"
    if stands:
        folder.mkdir()

    def write(new):
        for call in (check_writable, lambda *_, **o: replace_directory(folder, writer(OLD), **o)):
            with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* is writing"):
                call(folder, overwrite=overwrite)
        recover(folder)  # a reader does no harm either
        writer(NEW)(new)

    replace_directory(folder, write, overwrite=overwrite)
    assert contents(folder) == NEW
    assert alone(folder)


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    def between(new):
        writer(NEW)(new)
        folder.mkdir(exist_ok=True)
        (folder / "notes").write_text("mine")

    for folder in (tmp_path / "beside", tmp_path / "inside"):
        if folder.name == "inside":
            folder.mkdir()
        with pytest.raises(CheckpointError, match="nothing was changed there"):
            replace_directory(folder, between)
        assert contents(folder) == {"notes": "mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"beside", "inside"}


def test_a_lock_of_a_file_that_was_removed_is_none(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.take()
    lock.path.unlink()
    other = Lock(tmp_path / "lock")
    assert other.take()
    assert other.stands()
    assert not lock.stands()
    lock.close()
    other.close()


def test_without_locks_a_living_process_counts_as_the_holder(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("tnlm.utils.lock._lock", none)
    mine, other = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert mine.take()
    assert not other.take()
    mine.path.write_text("process 999999999 on " + mine.holder().split()[-1])
    assert other.take()
    mine.path.write_text("process 1 on another-host")
    assert not mine.take()
    other.close()


# Errors


@pytest.mark.parametrize("name", ["notes", "new", "more"])
def test_a_rename_that_fails_is_told_truly(name, old, monkeypatch):
    real = Path.replace

    def fail(source, target):
        if source.name == name:
            raise OSError(errno.EBUSY, "busy")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="busy") as caught:
        replace_directory(old, writer(NEW), overwrite=True)
    monkeypatch.undo()
    if name == "more":  # it came too far to go back, and cannot end
        assert f"{WORK} cannot be moved into place" in str(caught.value)
        recover(old)
        assert contents(old) == NEW
    else:
        assert "nothing was changed there" in str(caught.value)
        assert contents(old) == OLD
    assert alone(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_folders_that_were_made_go_again(error, tmp_path):
    def write(_):
        raise error

    with pytest.raises(error):
        replace_directory(tmp_path / "a" / "b" / "model", write)
    assert not list(tmp_path.iterdir())


# Where it can be written


def test_a_link_to_a_directory_stays_one(old):
    link = old.with_name("link")
    link.symlink_to("model")
    replace_directory(link, writer(NEW), overwrite=True)
    assert link.is_symlink()
    assert contents(old) == NEW


def test_a_link_that_leads_nowhere_is_refused_at_the_start(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is a link to nowhere, which does not exist"):
        check_writable(link, overwrite=True)


def test_the_working_directory_can_be_written(old, monkeypatch):
    monkeypatch.chdir(old)
    replace_directory(Path(), writer(NEW), overwrite=True)
    assert contents(Path.cwd()) == NEW


def test_a_directory_keeps_its_place_where_it_cannot_be_renamed(old, monkeypatch):
    real, inode = Path.replace, old.stat().st_ino

    def busy(source, target):
        if old in (source, target) or source.parent == old.parent or target.parent == old.parent:
            raise OSError(errno.EBUSY, "a mount point")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", busy)
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda p, m: p != old.parent and real_access(p, m))
    replace_directory(old, writer(NEW), overwrite=True)
    assert contents(old) == NEW
    assert old.stat().st_ino == inode


@pytest.fixture
def mount(tmp_path):
    """A file system of 1 MiB, where the machine lets one be mounted."""
    folder = tmp_path / "mount"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        done = 1
    if done:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_written_into(mount):
    (mount / "lost+found").mkdir()  # is no content, and stays
    replace_directory(mount, writer(OLD))
    replace_directory(mount, writer(NEW), overwrite=True)
    assert {path.name for path in mount.iterdir()} == {*NEW, "lost+found"}


def test_a_full_disk_leaves_the_old_files(mount):
    replace_directory(mount, writer(OLD))

    def large(new):
        (new / "weights").write_bytes(bytes(2**21))

    with pytest.raises(CheckpointError, match=r"No space left .*nothing was changed there"):
        replace_directory(mount, large, overwrite=True)
    assert contents(mount) == OLD


def test_a_mount_point_inside_is_refused_at_the_start(mount):
    with pytest.raises(CheckpointError, match="mount is a mount point, which cannot be replaced"):
        check_writable(mount.parent, overwrite=True)


@pytest.mark.skipif(sys.platform != "linux", reason="chattr")
def test_a_folder_that_may_not_change_is_refused_at_the_start(old):
    done = subprocess.run(["chattr", "+i", str(old)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no such attributes here")
    try:
        for folder in (old, old / "below"):
            with pytest.raises(CheckpointError, match="cannot be written"):
                check_writable(folder, overwrite=True)
    finally:
        subprocess.run(["chattr", "-i", str(old)], check=True)
    assert not (old / WORK).exists()


def test_a_load_names_who_is_exchanging_the_files(tmp_path):
    work = tmp_path / "model" / ".tnlm-save"
    work.mkdir(parents=True)
    writer = Lock(work / "lock")
    assert writer.take()
    with pytest.raises(CheckpointError, match=r"process \d+ on .* is writing it; wait"):
        tnlm.load(tmp_path / "model")
    writer.close()


def test_files_have_the_permissions_of_new_files(tmp_path):
    def hidden(new):
        writer(NEW)(new)
        for path in new.iterdir():
            path.chmod(0o600)

    (tmp_path / "file").touch()
    replace_directory(tmp_path / "model", hidden)
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}
