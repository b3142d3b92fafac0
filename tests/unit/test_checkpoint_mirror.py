"""The mirror of checkpoints against an S3-speaking server: whole or not there, through outages and damage."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megads.checkpoint import commit
from megads.checkpoint.commit import CheckpointInfo
from megads.checkpoint.manifest import MANIFEST_NAME, build_manifest, read_manifest, seal_files, verify
from megads.checkpoint.mirror import CheckpointMirror
from megads.checkpoint.object_store import ObjectStore, StoreUnreachable
from megads.config.schema import Config
from megads.config.stages import load_stages
from megads.errors import CheckpointError, ConfigError
from tests.s3_server import BUCKET, S3Server, s3_server
from tests.waiting import until

URL = f"s3://{BUCKET}/run"
FILES = {"__0_0.distcp": 40_000, ".metadata": 300, "sub/__1_0.distcp": 7}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr("megads.checkpoint.object_store.FIRST_PAUSE_SECONDS", 0.01)
    with s3_server(monkeypatch) as started:
        yield started


def save(directory: Path, step: int, loss: float | None = None, text: bytes = b"x") -> CheckpointInfo:
    """A checkpoint as the store commits it, without tensors."""
    directory.mkdir(exist_ok=True)
    save_id = f"{time.time_ns():x}"[-8:]
    temporary = commit.create_temporary(directory, step, save_id)
    (temporary / "sub").mkdir()
    for name, size in FILES.items():
        (temporary / name).write_bytes((text + f"{name} {step} ".encode()) * size)
    metrics = {} if loss is None else {"validation_loss": loss}
    files = seal_files(temporary, list(FILES))
    return commit.commit(temporary, build_manifest(step, save_id, files, {"tokens": step}, metrics))


def mirror(url: str = URL, **options: object) -> CheckpointMirror:
    return CheckpointMirror(url, **{"first_pause_seconds": 0.05, "wait_seconds": 30.0, **options})  # type: ignore[arg-type]


def steps_there(url: str = URL) -> list[int]:
    return [one.manifest.step for one in ObjectStore(url).listing().committed]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    theirs = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    return names == theirs and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["s3", "file", "memory"])
def test_there_and_back(server: S3Server, tmp_path: Path, kind: str) -> None:
    url = {"s3": URL, "file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}"}[kind]
    info = save(tmp_path / "here", 100)
    assert mirror(url).finish(tmp_path / "here")
    restored = mirror(url).restore(_new(tmp_path), None)
    assert restored is not None
    assert restored.path == tmp_path / "new" / "step_00000100"
    assert same_files(info.path, restored.path), "manifest included: the save keeps its identity"
    verify(restored.path)
    assert mirror(url).restore(tmp_path / "new", restored) is None, "nothing newer there"


def _new(tmp_path: Path) -> Path:
    (tmp_path / "new").mkdir(exist_ok=True)
    return tmp_path / "new"


def test_the_manifest_is_sent_last(server: S3Server, tmp_path: Path) -> None:
    save(tmp_path / "here", 100)
    assert mirror().finish(tmp_path / "here")
    puts = [path for method, path in server.requests if method == "PUT" and "step_" in path]
    assert len(puts) == len(FILES) + 1
    assert puts[-1].endswith(MANIFEST_NAME)
    last_read_back = max(
        number
        for number, (method, path) in enumerate(server.requests)
        if method == "GET" and "distcp" in path
    )
    assert last_read_back < server.requests.index(("PUT", puts[-1])), "verified before it counts"


def test_retention(server: S3Server, tmp_path: Path) -> None:
    one = mirror(keep_last_n=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save(tmp_path / "here", step, loss)
        one.catch_up(tmp_path / "here")
    assert sorted(steps_there()) == [2, 3, 4], "the newest two and the best"
    best_is_gone_here = tmp_path / "here" / "step_00000002"
    shutil.rmtree(best_is_gone_here)
    save(tmp_path / "here", 5, 2.2)
    one.catch_up(tmp_path / "here")
    assert sorted(steps_there()) == [2, 4, 5], "what only the mirror still has is kept by the same rule"


def test_an_outage_is_caught_up_with(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server goes away and comes back: only what still matters is sent."""
    here = tmp_path / "here"
    one = mirror(keep_last_n=1)
    save(here, 1)
    one.catch_up(here)
    server.stop()
    for step in (2, 3, 4):
        save(here, step)
        one.update(here)
    until(lambda: "training goes on" in caplog.text)
    server.requests.clear()
    server.start()
    assert one.finish(here)
    assert steps_there() == [4]
    assert not any("step_00000002" in path for method, path in server.requests if method == "PUT")


def test_an_update_waits_for_no_answer(server: S3Server, tmp_path: Path) -> None:
    updated, in_time = threading.Event(), []

    def hangs(method: str, path: str) -> bool:
        in_time.append(all(in_time) and updated.wait(30))
        return not in_time[-1]

    server.fails = hangs
    one = mirror()
    save(tmp_path / "here", 1)
    one.update(tmp_path / "here")
    updated.set()
    assert one.finish(tmp_path / "here")
    assert in_time
    assert all(in_time)


def test_a_store_that_stays_away_is_waited_for_no_longer_than_said(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "here", 7)
    one = mirror(wait_seconds=0.5)
    server.stop()
    assert not one.finish(tmp_path / "here")
    assert "not mirrored when the run ended" in caplog.text
    server.start()
    assert mirror().finish(tmp_path / "here"), "the next run sends it"
    assert steps_there() == [7]


def test_injected_errors(server: S3Server, tmp_path: Path) -> None:
    """One request in three fails; what is there in the end is whole."""
    count = iter(range(10**6))
    server.fails = lambda method, path: next(count) % 3 == 1
    save(tmp_path / "here", 100)
    assert mirror().finish(tmp_path / "here")
    restored = mirror().restore(_new(tmp_path), None)
    assert restored is not None
    verify(restored.path)


def test_a_partial_upload_is_no_checkpoint(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = tmp_path / "here"
    save(here, 1)
    assert mirror().finish(here)
    save(here, 2)
    server.fails = lambda method, path: method == "PUT" and "step_00000002" in path and "sub" in path
    with pytest.raises(StoreUnreachable):
        mirror().catch_up(here)
    assert any("step_00000002" in path for method, path in server.requests if method == "PUT")
    server.fails = lambda method, path: False
    restored = mirror().restore(_new(tmp_path), None)
    assert restored is not None
    assert restored.step == 1
    assert "never sent to its end" in caplog.text
    save(here, 3)
    mirror(keep_last_n=1).catch_up(here)
    assert ObjectStore(URL).listing().partial == [], "retention removes what no one will complete"


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "manifest"])
def test_damage_in_the_store_is_passed_over(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    here = tmp_path / "here"
    save(here, 1)
    assert mirror().finish(here)
    newest = save(here, 2)
    assert mirror().finish(here)
    _damage(newest, damage)
    restored = mirror().restore(_new(tmp_path), None)
    assert restored is not None
    assert restored.step == 1
    assert "passed over" in caplog.text
    assert [path.name for path in (tmp_path / "new").iterdir() if "tmp" in path.name] == []


def _damage(info: CheckpointInfo, damage: str) -> None:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(URL)
    name = ObjectStore(URL).name_of(read_manifest(info.path))
    target = f"{root}/{name}/" + (MANIFEST_NAME if damage == "manifest" else "__0_0.distcp")
    content = bytearray(filesystem.cat_file(target))
    content[len(content) // 2] ^= 1
    if damage == "gone":
        filesystem.rm_file(target)
    else:
        filesystem.pipe_file(target, bytes(content[:-1] if damage == "short" else content))


def test_only_damaged_ones_are_an_error_not_a_fresh_start(server: S3Server, tmp_path: Path) -> None:
    _damage_only(tmp_path)
    with pytest.raises(CheckpointError, match="none could be restored"):
        mirror().restore(_new(tmp_path), None)


def _damage_only(tmp_path: Path) -> None:
    only = save(tmp_path / "here", 1)
    assert mirror().finish(tmp_path / "here")
    _damage(only, "flipped")


def test_a_store_that_cannot_be_asked(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = save(tmp_path / "here", 1)
    server.stop()
    assert mirror().restore(tmp_path / "here", local) is None
    assert "whether or not there is a newer one" in caplog.text
    with pytest.raises(CheckpointError, match="none could be restored"):
        mirror().restore(_new(tmp_path), None)


def test_an_empty_mirror_is_a_fresh_start(server: S3Server, tmp_path: Path) -> None:
    assert mirror().restore(_new(tmp_path), None) is None


def test_a_branch_that_was_left_is_not_returned_to(server: S3Server, tmp_path: Path) -> None:
    """As in `commit`: a rollback to step 1, saved again, sets step 2 aside, there too."""
    here = tmp_path / "here"
    for step in (1, 2):
        save(here, step)
        mirror().catch_up(here)
    save(here, 1, text=b"again")
    mirror().catch_up(here)
    listing = ObjectStore(URL).listing()
    assert [one.manifest.step for one in listing.committed] == [1]
    assert [one.manifest.step for one in listing.superseded] == [2]
    restored = mirror().restore(_new(tmp_path), None)
    assert restored is not None
    assert (restored.path / ".metadata").read_bytes().startswith(b"again")
    save(here, 3)
    mirror().catch_up(here)
    assert ObjectStore(URL).listing().superseded == [], "the new branch has passed it"


def test_an_older_local_checkpoint_gives_way(server: S3Server, tmp_path: Path) -> None:
    old = save(_new(tmp_path), 1)
    save(tmp_path / "here", 5)
    assert mirror().finish(tmp_path / "here")
    restored = mirror().restore(tmp_path / "new", old)
    assert restored is not None
    assert restored.step == 5
    newer = save(tmp_path / "new", 6)
    assert mirror().restore(tmp_path / "new", newer) is None


def test_a_damaged_local_file_is_not_sent_for_a_checkpoint(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = tmp_path / "here"
    save(here, 1)
    bad = save(here, 2)
    content = bytearray((bad.path / ".metadata").read_bytes())
    content[5] ^= 1
    (bad.path / ".metadata").write_bytes(content)
    assert not mirror().finish(here)
    assert steps_there() == [1]
    assert "step_00000002" in caplog.text


def test_retention_here_spares_what_is_being_sent(tmp_path: Path) -> None:
    infos = [save(tmp_path, step) for step in (1, 2, 3)]
    commit.prune(tmp_path, 1, spared=infos[0].path)
    assert [info.step for info in commit.committed(tmp_path)] == [1, 3]


def test_mistakes(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written to"):
        ObjectStore("s3://no-such-bucket/run").check()
    ObjectStore(URL).check()
    with pytest.raises(ConfigError, match=r"mirror\.url"):
        ObjectStore("nosuch://bucket/run")
    server.stop()
    ObjectStore(URL).check()  # a warning: it may be back later


def test_every_stage_has_a_place_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(
        json.dumps({"stages": [{"name": "a"}, {"name": "b"}], "checkpointing": {"mirror": {"url": URL}}})
    )
    urls = [stage.config.checkpointing.mirror.url for stage in load_stages(file, {}, {})]
    assert urls == [f"{URL}/a", f"{URL}/b"]
    assert Config().checkpointing.mirror.url is None
