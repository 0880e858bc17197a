"""The RUN folder holds one save at any moment: killed, cut off or filled after each single file operation."""

import errno
import os
import signal
import threading
import time

import pytest
from helpers import as_old_version

from wbdit import InputError, run_folder
from wbdit._lock import FileLock, fcntl
from wbdit._outputs import MANIFEST, RUN_FILES
from wbdit.run_folder import PREVIOUS, holds_run, read_newest, writing

OPERATIONS = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")


def content(number):
    """Return the files of save `number`. The preprocessor never changes, as in a training."""
    config = f'{{"format": 1, "number": {number}}}'.encode()
    return {
        name: {"config.json": config, "preprocessor.json": b'{"genes": []}'}.get(name, f"{name} {number}".encode() * 9)
        for name in RUN_FILES
    }


def write(number):
    def files(folder):
        for name, data in content(number).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    return files


def save(run, number):
    with writing(run) as writer:
        writer.save(write(number))


def read(folder):
    return {name: (folder / name).read_bytes() for name in RUN_FILES}


def number_of(run):
    """Return the number of the save that is read, and check that all its files are of that save."""
    files = read_newest(run, run_folder.DATA, read)
    (number,) = [number for number in range(9) if files == content(number)]
    return number


def names(run):
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


ONE_SAVE = {*RUN_FILES, MANIFEST}


class Snapshots:
    """Copies of a folder before each file operation, as a kill leaves it and as a power cut does.

    After a power cut, files that were not flushed to the disk are empty.
    """

    def __init__(self, run, into):
        self.run, self.into, self.synced = run, into, set()
        self.taken, self.seen, self.busy = ([], []), set(), False

    def take(self):
        if self.busy or not self.run.exists():  # a copy takes operations too
            return
        self.busy = True
        files = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        unsynced = {path: b"" for path in files if path.stat().st_ino not in self.synced}
        for cut, state in enumerate((files, files | unsynced)):
            key = (cut, *sorted(state.items()))
            if key not in self.seen:
                self.seen.add(key)
                self.taken[cut].append(self.into / f"{cut}-{len(self.taken[cut])}")
                for path, data in state.items():
                    copy = self.taken[cut][-1] / path.relative_to(self.run)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(data)
        self.busy = False

    def patch(self, monkeypatch):
        self.synced |= {path.stat().st_ino for path in self.run.rglob("*")}
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, original):
        def operation(*given, **options):
            self.take()
            if name != "fsync":
                return original(*given, **options)
            return self.synced.add(os.fstat(given[0]).st_ino)

        return operation


@pytest.fixture
def unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def prepare(run, start):
    """Prepare a run in one of several states; return the number of its save, or None."""
    if start == "none":
        return None
    save(run, 0)
    if start == "older version":
        as_old_version(run)
    if start in ("two saves", "newest damaged"):
        save(run, 1)
    if start == "newest damaged":
        (run / "model.safetensors").write_bytes(b"x")
        return 0
    return 1 if start == "two saves" else 0


@pytest.mark.parametrize("start", ["none", "one save", "two saves", "older version", "newest damaged"])
def test_killed_after_each_operation_it_holds_one_save(tmp_path, monkeypatch, unsynced, start):
    """Whatever a killed save left loads as the old or the new save, and the next save cleans up."""
    run, old = tmp_path / "run", prepare(tmp_path / "run", start)
    snapshots = Snapshots(run, tmp_path)
    with monkeypatch.context() as patch:
        snapshots.patch(patch)
        save(run, 2)
    assert number_of(run) == 2
    for folders in snapshots.taken:  # killed, and cut off from power
        assert len(folders) > 25
        found = [number_of(folder) if holds_run(folder) else None for folder in folders]
        assert set(found) == {old, 2}
        assert found == sorted(found, key=lambda number: number == 2)  # once it counts, it stays
        for folder, held in zip(folders, found, strict=True):
            check_recovery(folder, held)


def check_recovery(folder, held):
    with writing(folder):  # as `--resume` does before it reads
        pass
    assert (number_of(folder) if holds_run(folder) else None) == held
    save(folder, 5)
    assert number_of(folder) == 5
    assert names(folder) == ONE_SAVE | (
        {f"{PREVIOUS}/{name}" for name in names(folder / PREVIOUS)} if held is not None else set()
    )
    if held is not None:
        assert read(folder / PREVIOUS) == content(held)


def test_killed_during_recovery_it_still_holds_one_save(tmp_path, monkeypatch, unsynced):
    run = tmp_path / "run"
    prepare(run, "two saves")
    snapshots = Snapshots(run, tmp_path / "first")
    with monkeypatch.context() as patch:
        snapshots.patch(patch)
        save(run, 2)
    states = [folder for folder in snapshots.taken[1] if (folder / ".next").exists()]
    for i, state in enumerate((states[0], states[len(states) // 2], states[-1])):
        again = Snapshots(state, tmp_path / f"again-{i}")
        with monkeypatch.context() as patch:
            again.patch(patch)
            with writing(state):
                pass
        assert {number_of(folder) for folder in (*again.taken[0], *again.taken[1], state)} == {2}
        assert read(state / PREVIOUS) == content(1)


def test_a_full_disk_at_each_operation(tmp_path, monkeypatch, unsynced):
    """The error names the disk and what is safe, and what was written of the save is gone."""
    run, said = tmp_path / "run", []
    prepare(run, "two saves")
    with writing(run) as writer:
        for k in range(60):
            calls = iter(range(100))

            def full(descriptor, k=k, calls=calls):
                if next(calls) == k:
                    raise OSError(errno.ENOSPC, "")

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                patch.setattr(writer, "_safe", lambda: "the last save is intact")
                try:
                    writer.save(write(3))
                except InputError as error:
                    said.append(str(error))
            assert not (run / ".next.tmp").exists()
            assert holds_run(run)
            assert number_of(run) in (1, 3)
    assert len(said) > 5
    assert all("the disk is full" in line and "intact" in line for line in said)


def test_what_is_safe_is_named(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "")

    with writing(tmp_path / "run") as writer, pytest.raises(InputError, match="disk is full .*nothing was saved"):
        writer.save(full)
    assert not (tmp_path / "run").exists()


def test_readers_see_one_save_while_others_are_written(tmp_path, unsynced):
    run = tmp_path / "run"
    save(run, 0)
    done = threading.Event()

    def train():
        for number in range(60):
            save(run, number % 9)
        done.set()

    thread = threading.Thread(target=train)
    thread.start()
    seen, said = 0, set()
    while not done.is_set():
        try:
            number_of(run)
            seen += 1
        except InputError as error:
            said.add("changed whenever it was read" in str(error))  # saves come every millisecond here
    thread.join()
    assert seen > 0
    assert said <= {True}


@pytest.mark.parametrize("damage", ["flipped", "empty", "cut", "missing"])
@pytest.mark.parametrize("name", [*run_folder.DATA, MANIFEST])
def test_a_damaged_save_gives_way_to_the_one_before(tmp_path, log, unsynced, name, damage):
    run = tmp_path / "run"
    prepare(run, "two saves")
    if (name, damage) == (MANIFEST, "missing"):
        return  # as in runs of older versions
    spoil(run / name, damage)
    assert number_of(run) == 0
    assert len(log) == 1
    assert f"{name}" in log[0]
    assert log[0].endswith(f"reading the save before it, in {run / PREVIOUS}")
    spoil(run / PREVIOUS / name, damage)
    with pytest.raises(InputError, match=f"{name}.* and .*previous.*{name}.*is the run complete"):
        number_of(run)


def spoil(path, damage):
    data = path.read_bytes()
    path.unlink()  # it may be linked
    if damage == "flipped":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage != "missing":
        path.write_bytes(data[: 0 if damage == "empty" else len(data) // 2])


def test_a_changed_card_or_log_is_no_damage(tmp_path, log, unsynced):
    run = tmp_path / "run"
    save(run, 0)
    (run / "README.md").write_text("my own words")
    read_newest(run, run_folder.DATA, lambda save: None)
    assert log == []
    save(run, 1)
    assert (run / PREVIOUS / "README.md").read_text() == "my own words"
    assert (run / "README.md").read_bytes() == content(1)["README.md"]


def test_a_disk_without_hard_links(tmp_path, monkeypatch, unsynced):
    def no_links(*given, **options):
        raise OSError(errno.EPERM, "")

    monkeypatch.setattr(os, "link", no_links)
    run = tmp_path / "run"
    prepare(run, "two saves")
    assert (number_of(run), read(run / PREVIOUS)) == (1, content(0))


def test_a_file_that_is_a_link_is_replaced_and_not_its_target(tmp_path, unsynced):
    """Hubs keep the files of a run in a cache and link to them."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    save(run, 0)
    (run / "model.safetensors").rename(cache)
    (run / "model.safetensors").symlink_to("../cache")
    assert number_of(run) == 0
    save(run, 1)
    assert cache.read_bytes() == content(0)["model.safetensors"]
    assert (number_of(run), read(run / PREVIOUS)) == (1, content(0))


def test_leftovers_of_older_versions_go(tmp_path, unsynced):
    run = tmp_path / "run"
    save(run, 0)
    for name in (".model.abcd1234.safetensors", "resume/.state.abcd_234.safetensors", ".config.json.tmp"):
        (run / name).write_text("")
    (run / ".notes.txt").write_text("mine")
    with writing(run):
        pass
    assert names(run) == ONE_SAVE | {".notes.txt"}


# the lock


def test_one_writer_at_a_time(tmp_path):
    run = tmp_path / "run"
    with writing(run), pytest.raises(InputError, match=f"process {os.getpid()} on .* is writing into"), writing(run):
        pass
    assert not run.exists()  # nothing was saved


@pytest.mark.skipif(fcntl is None, reason="no locks here")
def test_a_crash_releases_the_lock(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        FileLock.take(tmp_path / "lock")
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    assert FileLock.take(tmp_path / "lock") is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = FileLock.take(tmp_path / "lock")
    assert lock.is_effective
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_no_locks(tmp_path, monkeypatch, log):
    """Without locks, training goes on with a warning."""

    def unsupported(*given):
        raise OSError(errno.ENOLCK, "")

    for patched in ((fcntl, "flock", unsupported), ("wbdit._lock.fcntl", None)):
        monkeypatch.setattr(*patched)
        save(tmp_path / "run", 1)
        assert "has no file locks: make sure that only one process" in log[-1]
    assert number_of(tmp_path / "run") == 1


# which folders are taken


@pytest.mark.parametrize("name", ["README.md", "config.json", "metrics.jsonl", "manifest.json"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / "other.txt").write_text("fine")
    run_folder.check_run_folder(run)
    (run / name).write_text("{}")
    with pytest.raises(InputError, match=f"holds a {name} that is not of a run"):
        run_folder.check_run_folder(run)
    run_folder.check_run_folder(run, overwrite=True)


def test_the_rest_of_a_save_of_an_older_version_is_replaced(tmp_path):
    """It was killed before its last file, config.json: neither resuming nor a fresh start worked."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("preprocessor.json", "preprocessor.safetensors", "metrics.jsonl", "model.safetensors"):
        (run / name).write_text("")
    assert not holds_run(run)
    run_folder.check_run_folder(run)


def test_a_file_or_a_lost_link_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="is not a folder"):
            run_folder.check_run_folder(tmp_path / name)
