"The store under faults: damage, two writers at once, a kill in the middle, a full disk."

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elson_nb import store as store_module
from elson_nb.store import MANIFEST, LocalStore, StoreError, read_json, write_atomic, write_json

BIG_FILE_BYTES = 8 << 20


def make_artifact(folder: Path, text: str = "weights", files: int = 3) -> Path:
    for n in range(files):
        path = folder / f"part{n}" / "model.bin"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text} {n}")
    (folder / "config.json").write_text('{"of": "the artifact"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def pushed(store, tmp_path):
    store.push(make_artifact(tmp_path / "source"), "model")
    return store


def test_round_trip(store, tmp_path):
    source = make_artifact(tmp_path / "source")
    manifest = store.push(source, "model")
    out = store.pull("model", tmp_path / "out")
    assert contents(out) == contents(source)
    assert set(manifest["files"]) == set(contents(source))
    assert manifest["bytes"] == sum(map(len, contents(source).values()))
    assert store.names() == ["model"] and store.verify("model") == []
    assert [p.name for p in store.root.iterdir()] == ["model"]


def test_a_newer_push_replaces_the_older_one_whole(pushed, tmp_path):
    newer = make_artifact(tmp_path / "newer", "better", files=1)
    pushed.push(newer, "model")
    assert contents(pushed.pull("model", tmp_path / "out")) == contents(newer)
    assert [p.name for p in pushed.root.iterdir()] == ["model"]


def damage_same_size(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize(
    "damage",
    [
        damage_same_size,
        Path.unlink,
        lambda file: os.truncate(file, 3),
        lambda file: (file.parent / "stray.pkl").write_bytes(b"x"),
    ],
    ids=["flipped bit", "missing", "cut short", "extra"],
)
def test_a_damaged_artifact_is_not_handed_out(pushed, tmp_path, damage):
    damage(pushed.path("model") / "part1" / "model.bin")
    assert len(pushed.verify("model")) == 1 and "part1" in pushed.verify("model")[0]
    with pytest.raises(StoreError, match="'model'.*part1.*push it again"):
        pushed.pull("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_named_like_the_manifest_is_kept_below_the_top(store, tmp_path):
    source = make_artifact(tmp_path / "source")
    (source / "part0" / MANIFEST).write_text("{}")
    store.push(source, "model")
    assert (store.pull("model", tmp_path / "out") / "part0" / MANIFEST).read_text() == "{}"


def test_a_damaged_manifest_is_named(pushed, tmp_path):
    (pushed.path("model") / MANIFEST).write_text('{"files": {')
    with pytest.raises(StoreError, match=MANIFEST):
        pushed.pull("model", tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "a/", ".hidden"])
def test_a_name_that_leaves_the_store_is_refused(pushed, tmp_path, name):
    for attempt in (
        pushed.has,
        pushed.verify,
        lambda name: pushed.push(tmp_path / "source", name),
        lambda name: pushed.pull(name, tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match="no artifact name"):
            attempt(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "store"]


def test_unknown_artifact_and_empty_folder_are_named(pushed, tmp_path):
    with pytest.raises(StoreError, match="'other'.*model"):
        pushed.pull("other", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="'model'"):
        pushed.push(tmp_path / "empty", "model")
    assert pushed.verify("model") == []


def push_often(root: Path, source: Path, ready, times: int) -> None:
    "Push again and again, with a pause before every rename, so that two writers do meet between two of them."
    rename = os.rename
    os.rename = lambda *args, **kwargs: (time.sleep(0.003), rename(*args, **kwargs))
    ready.wait()
    for _ in range(times):
        LocalStore(root).push(source, "model")


def test_two_writers_of_one_name_both_finish_and_leave_one_whole_artifact(store, tmp_path):
    context = multiprocessing.get_context("spawn")  # pytest's own process may hold threads
    ready = context.Barrier(2)
    sources = [make_artifact(tmp_path / text, text) for text in ("first", "second")]
    writers = [context.Process(target=push_often, args=(store.root, s, ready, 40)) for s in sources]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert store.verify("model") == []
    assert contents(store.pull("model", tmp_path / "out")) in [contents(s) for s in sources]
    assert [p.name for p in store.root.iterdir()] == ["model"]
    assert [writer.exitcode for writer in writers] == [0, 0], "a push failed because another one was going on"


SLOW_PUSH = """
import shutil, sys, time
from elson_nb.store import LocalStore
def slow(source, target):  # half of the file, then a long wait
    with open(source, "rb") as a, open(target, "wb") as b:
        b.write(a.read({half}))
        b.flush()
        print("copying", flush=True)
        time.sleep(60)
shutil.copyfile = slow
LocalStore(sys.argv[1]).push(sys.argv[2], "model")
"""


def killed_push(root: Path, source: Path) -> None:
    "Start a push in a process of its own and kill it with SIGKILL half way through a file."
    code = SLOW_PUSH.format(half=BIG_FILE_BYTES // 2)
    process = subprocess.Popen([sys.executable, "-c", code, root, source], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "copying\n"
        time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_push_leaves_nothing_to_see(store, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.bin").write_bytes(os.urandom(BIG_FILE_BYTES))
    killed_push(store.root, tmp_path / "big")
    assert store.names() == [] and not store.has("model")
    with pytest.raises(StoreError, match="no artifact 'model'"):
        store.pull("model", tmp_path / "out")
    store.push(tmp_path / "big", "model")
    assert store.verify("model") == [] and store.names() == ["model"]


def test_a_killed_push_leaves_the_older_artifact(pushed, tmp_path):
    before = contents(pushed.path("model"))
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.bin").write_bytes(os.urandom(BIG_FILE_BYTES))
    killed_push(pushed.root, tmp_path / "big")
    assert pushed.verify("model") == [] and contents(pushed.path("model")) == before


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_push_onto_a_full_disk_leaves_the_older_artifact_and_no_litter(pushed, tmp_path, monkeypatch):
    before = contents(pushed.path("model"))
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pushed.push(make_artifact(tmp_path / "newer", "better"), "model")
    assert pushed.verify("model") == [] and contents(pushed.path("model")) == before
    assert [p.name for p in pushed.root.iterdir()] == ["model"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_write_atomic_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch, step):
    path = write_json(tmp_path / "session.json", {"step": 1})
    monkeypatch.setattr(store_module.os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    monkeypatch.undo()
    assert read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["session.json"]


def test_write_atomic_takes_text_and_bytes_and_makes_the_folder(tmp_path):
    assert write_atomic(tmp_path / "a" / "b.txt", "é").read_bytes() == "é".encode()
    assert write_atomic(tmp_path / "a" / "b.txt", b"\x00").read_bytes() == b"\x00"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "session.json").write_text('{"step": ')
    with pytest.raises(StoreError, match="session.json is damaged"):
        read_json(tmp_path / "session.json")
    with pytest.raises(StoreError, match="no such file"):
        read_json(tmp_path / "none.json")
