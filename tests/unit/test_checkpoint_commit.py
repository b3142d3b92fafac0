"""The commit protocol on plain files: crashes, damage, replacement, retention."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megads.checkpoint import commit
from megads.checkpoint.commit import CheckpointInfo
from megads.checkpoint.manifest import (
    MANIFEST_NAME,
    build_manifest,
    digest_json,
    hash_files,
    read_manifest,
    seal_files,
    verify,
)
from megads.errors import CheckpointError

SHARDS = {"__0_0.distcp": 3000, "__1_0.distcp": 100, ".metadata": 50}
PHASES = [
    "leftover_removed", "temporary_created", "half_written", "files_flushed", "manifest_written",
    "later_steps_set_aside", "renamed", "same_step_replaced", "pointer_written", "pointer_moved",
    "prune_renamed", "pruned",
]  # fmt: skip


def content(name: str, step: int) -> bytes:
    return f"{name} of step {step} ".encode() * SHARDS[name]


def save(directory: Path, step: int, loss: float | None = None, record: dict | None = None) -> CheckpointInfo:
    """What the store does, without tensors."""
    commit.remove_leftovers(directory)
    save_id = os.urandom(4).hex()
    temporary = commit.create_temporary(directory, step, save_id)
    for name in SHARDS:
        (temporary / name).write_bytes(content(name, step))
        commit.phase("half_written")
    files = seal_files(temporary, list(SHARDS))
    metrics = {} if loss is None else {"validation_loss": loss}
    return commit.commit(temporary, build_manifest(step, save_id, files, record or {"tokens": step}, metrics))


def steps(directory: Path) -> list[int]:
    return [info.step for info in commit.committed(directory)]


def assert_whole(info: CheckpointInfo) -> None:
    verify(info.path)
    for name in SHARDS:
        assert (info.path / name).read_bytes() == content(name, info.step)


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position // 8] ^= 1 << position % 8
    file.write_bytes(data)


def killed_save(directory: Path, step: int, at: str) -> None:
    """Saves in another process, with pruning, and kills it with SIGKILL at a phase."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "import test_checkpoint_commit as t\n"
        f"t.commit.phase = lambda name: name == {at!r} and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"t.save(Path({str(directory)!r}), {step})\n"
        f"t.commit.prune(Path({str(directory)!r}), 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9


@pytest.mark.parametrize("at", PHASES)
def test_kill_at_every_phase(tmp_path: Path, at: str) -> None:
    """The newest good checkpoint is whole: the earlier one, or the new one once it was renamed."""
    save(tmp_path, 100)
    (tmp_path / "step_00000150.tmp-0abc").mkdir()
    (tmp_path / "step_00000300").mkdir()  # later, so that the commit sets it aside
    again = at == "same_step_replaced"
    killed_save(tmp_path, 100 if again else 200, at)
    was_committed = at in PHASES[PHASES.index("renamed") :]
    assert steps(tmp_path)[-1] == (200 if was_committed and not again else 100)

    (tmp_path / "step_00000300").exists() and (tmp_path / "step_00000300").rmdir()
    info = commit.newest_good(tmp_path)
    assert info is not None
    assert info.step == steps(tmp_path)[-1]
    assert_whole(info)
    assert_whole(save(tmp_path, 200))
    assert commit.newest_good(tmp_path).step == 200
    commit.prune(tmp_path, 1)
    assert steps(tmp_path) == [200]
    commit.remove_leftovers(tmp_path)
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name or ".deleting-" in path.name]


@pytest.mark.parametrize("at", PHASES[1:10])
def test_kill_while_saving_a_step_again(tmp_path: Path, at: str) -> None:
    """At no moment is the step without a committed checkpoint, and it can be saved again."""
    save(tmp_path, 100)
    killed_save(tmp_path, 100, at)
    info = commit.newest_good(tmp_path)
    assert info is not None
    assert info.step == 100
    assert_whole(info)
    assert_whole(save(tmp_path, 100))
    assert steps(tmp_path) == [100]


def test_record_comes_back_bit_for_bit(tmp_path: Path) -> None:
    record = {
        "loss": 0.1 + 0.2,
        "best": math.inf,
        "tiny": 5e-324,
        "history": [1, None],
        "by_rank": {10: 1, 9: 2},
    }
    info = save(tmp_path, 7, loss=math.nan, record=record)
    assert commit.read_record(info.path) == {**record, "by_rank": {"10": 1, "9": 2}}
    manifest = verify(info.path)
    assert manifest.step == 7
    assert manifest.metrics == {"validation_loss": None}
    assert manifest.package_versions["python"] == sys.version.split()[0]


def test_config_digest_ignores_key_order(tmp_path: Path) -> None:
    info = save(tmp_path, 1, record={"config": {"b": 1, "a": [2]}})
    assert read_manifest(info.path).config_sha256 == digest_json({"a": [2], "b": 1})
    assert read_manifest(info.path).config_sha256 != digest_json({"a": [2], "b": 2})


def reads_the_same(file: Path, original: bytes) -> bool:
    try:
        return json.loads(file.read_bytes()) == json.loads(original)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*SHARDS, MANIFEST_NAME])
def test_any_flipped_bit_is_found_or_neutral(tmp_path: Path, name: str) -> None:
    info = save(tmp_path, 1, loss=2.0)
    original = (info.path / name).read_bytes()
    before = read_manifest(info.path)
    bits = len(original) * 8
    for position in range(0, bits, max(1, bits // 200)):
        flip_bit(info.path / name, position)
        if name == MANIFEST_NAME and reads_the_same(info.path / name, original):
            assert verify(info.path) == before  # white space of the JSON
        else:
            with pytest.raises(CheckpointError, match=name):
                verify(info.path)
        (info.path / name).write_bytes(original)
    assert verify(info.path) == before


def damage_truncate(path: Path) -> str:
    os.truncate(path / "__0_0.distcp", 10)
    return "__0_0.distcp"


def damage_empty(path: Path) -> str:
    os.truncate(path / ".metadata", 0)
    return ".metadata"


def damage_missing_shard(path: Path) -> str:
    (path / "__1_0.distcp").unlink()
    return "__1_0.distcp"


def damage_missing_manifest(path: Path) -> str:
    (path / MANIFEST_NAME).unlink()
    return MANIFEST_NAME


def damage_garbage_manifest(path: Path) -> str:
    (path / MANIFEST_NAME).write_bytes(b"\x00" * 100)
    return MANIFEST_NAME


def damage_unlisted(path: Path) -> str:
    (path / "extra.pt").write_bytes(b"x")
    return "extra.pt"


def damage_symlink(path: Path) -> str:
    (path / "__1_0.distcp").rename(path.parent / "elsewhere")
    (path / "__1_0.distcp").symlink_to(path.parent / "elsewhere")
    return "__1_0.distcp"


def damage_symlinked_directory(path: Path) -> str:
    (path / "sub").symlink_to(path.parent)
    return "sub"


def damage_fifo(path: Path) -> str:
    (path / "__1_0.distcp").unlink()
    os.mkfifo(path / "__1_0.distcp")
    return "__1_0.distcp"


def damage_name_outside(path: Path) -> str:
    """A manifest that is consistent in itself but lists a file above the checkpoint."""
    document = json.loads((path / MANIFEST_NAME).read_text())
    del document["manifest_sha256"]
    document["files"]["../outside"] = {"size_bytes": 1, "sha256": "0"}
    (path / MANIFEST_NAME).write_text(json.dumps({**document, "manifest_sha256": digest_json(document)}))
    return "../outside"


@pytest.mark.parametrize(
    "damage", [value for name, value in sorted(globals().items()) if name[:7] == "damage_"]
)
def test_damage_falls_back_one_and_names_the_file(tmp_path: Path, damage, caplog) -> None:
    save(tmp_path, 100)
    bad = save(tmp_path, 200)
    name = damage(bad.path)
    with pytest.raises(CheckpointError, match=name):
        verify(bad.path)
    with caplog.at_level(logging.WARNING):
        info = commit.newest_good(tmp_path)
    assert info is not None
    assert info.step == 100
    assert name in caplog.text
    assert not bad.path.exists()
    assert (tmp_path / "step_00000200.bad").exists()
    assert_whole(save(tmp_path, 200))


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200).path.rename(tmp_path / "step_00000900")
    assert commit.newest_good(tmp_path).step == 100


def test_unreadable_content_counts_as_damage(tmp_path: Path) -> None:
    info = save(tmp_path, 1)

    def failing_hasher(root: Path, names: list[str]) -> dict[str, str]:
        return hash_files(root / "gone", names)

    with pytest.raises(CheckpointError, match="unreadable"):
        verify(info.path, failing_hasher)


def test_all_damaged_never_starts_over(tmp_path: Path) -> None:
    damage_truncate(save(tmp_path, 100).path)
    damage_missing_shard(save(tmp_path, 200).path)
    for _ in range(2):  # the second start finds only what the first set aside
        with pytest.raises(CheckpointError, match="no checkpoint is good"):
            commit.newest_good(tmp_path)


def test_without_checkpoints(tmp_path: Path) -> None:
    assert commit.newest_good(tmp_path) is None
    assert commit.latest(tmp_path) is None
    assert commit.committed(tmp_path / "not there") == []
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        verify(tmp_path / "not there")


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe\x00", b"step_99999999\n", b"../../etc"])
def test_garbage_pointer_is_harmless(tmp_path: Path, garbage: bytes) -> None:
    save(tmp_path, 100)
    info = save(tmp_path, 200)
    assert (tmp_path / "latest").read_text() == "step_00000200\n"
    (tmp_path / "latest").write_bytes(garbage)
    assert commit.newest_good(tmp_path) == info == commit.latest(tmp_path)


def test_other_names_are_never_selected(tmp_path: Path) -> None:
    info = save(tmp_path, 100)
    for name in ("step_00000200.tmp-1a", "step_300", "step_00000300.bad", "step_00000400.superseded-1a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_bytes((info.path / MANIFEST_NAME).read_bytes())
    (tmp_path / "step_00000500").symlink_to(info.path)
    assert commit.committed(tmp_path) == [info]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 100, record={"run": 1})
    info = save(tmp_path, 100, record={"run": 2})
    assert commit.committed(tmp_path) == [info]
    assert commit.read_record(commit.newest_good(tmp_path).path) == {"run": 2}
    assert (tmp_path / "latest").read_text().strip() == info.path.name
    third = save(tmp_path, 100, record={"run": 3})
    assert commit.committed(tmp_path) == [third]


def test_going_back_leaves_the_later_branch(tmp_path: Path) -> None:
    """After a rollback to 100, the checkpoints 200 and 300 must not be resumed from."""
    for step in (100, 200, 300):
        save(tmp_path, step)
    save(tmp_path, 150)
    assert steps(tmp_path) == [100, 150]
    assert len(list(tmp_path.glob("*.superseded-*"))) == 2
    commit.prune(tmp_path, 5)
    assert len(list(tmp_path.glob("*.superseded-*"))) == 2
    save(tmp_path, 250)
    commit.prune(tmp_path, 5)  # 200 has been passed, 300 has not
    assert [path.name[:13] for path in tmp_path.glob("*.superseded-*")] == ["step_00000300"]


def test_commit_refuses_files_that_are_not_all_there(tmp_path: Path) -> None:
    temporary = commit.create_temporary(tmp_path, 1, "aa")
    (temporary / ".metadata").write_bytes(b"12")
    files = seal_files(temporary, [".metadata"])
    os.truncate(temporary / ".metadata", 1)
    with pytest.raises(CheckpointError, match="metadata: 1 bytes"):
        commit.commit(temporary, build_manifest(1, "aa", files, {}, {}))
    assert commit.committed(tmp_path) == []
    with pytest.raises(FileExistsError):
        commit.create_temporary(tmp_path, 1, "aa")


def test_a_failing_pointer_does_not_undo_the_commit(tmp_path: Path, monkeypatch) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit, "_write_pointer", disk_full)
    assert_whole(save(tmp_path, 1))
    assert steps(tmp_path) == [1]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, math.nan), (5, 1.7)):
        save(tmp_path, step, loss)
    assert commit.prune(tmp_path, 0) == []
    assert [path.name for path in commit.prune(tmp_path, 2, keep_best=True)] == [
        "step_00000001",
        "step_00000003",
    ]
    assert steps(tmp_path) == [2, 4, 5]
    commit.prune(tmp_path, 1)
    assert steps(tmp_path) == [5]


def test_prune_deletes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_bit(tmp_path / "step_00000003" / "__0_0.distcp", 77)
    assert commit.prune(tmp_path, 1) == []
    assert steps(tmp_path) == [1, 2, 3]


def test_prune_does_not_count_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage_truncate(tmp_path / "step_00000002")
    assert commit.prune(tmp_path, 2) == []
    assert steps(tmp_path) == [1, 2, 3]


def test_prune_keeps_a_best_only_if_sound(tmp_path: Path) -> None:
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        save(tmp_path, step, loss)
    damage_missing_shard(tmp_path / "step_00000001")
    commit.prune(tmp_path, 1, keep_best=True)
    assert steps(tmp_path) == [1, 2, 4]
