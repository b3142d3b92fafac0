"""Each check of a machine finds its fault, says what to do, and is content with what is sound."""

import importlib.metadata
import socket
from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.schema import Config
from megads.launch import environment
from megads.launch.environment import Check, Gpus
from megads.ports import free_port

GIB = 2**30
H100 = Gpus(("NVIDIA H100",) * 8, 80 * GIB, "580.65.06", "13.0")


def config(**settings: Any) -> Config:
    return load_config(
        "configs/debug.json", {name.replace("__", "."): value for name, value in settings.items()}
    )


def of(checks: Any, name: str) -> Check:
    [found] = [check for check in checks if check.name == name]
    assert (found.fix != "") or found.level == "ok", "a fault without a fix"
    return found


def test_a_sound_environment_has_no_errors(tmp_path: Path) -> None:
    """This one, in which the tests run."""
    found = list(environment.check_environment(config(output_dir=str(tmp_path)), Gpus()))
    assert len({check.name for check in found}) == len(found) >= 14
    software = ("Python", "torch", "megatron-core", "packages", "CUDA", "apex", "configuration", "disk")
    assert {of(found, name).level for name in software} == {"ok"}


@pytest.mark.parametrize(("versions", "name", "said"), [
    ({"torch": "2.1.0"}, "torch", "2.1.0; torch>=2.11 is needed"),
    ({"torch": None}, "torch", "not installed"),
    ({"megatron-core": "0.14.0"}, "megatron-core", "megatron-core==0.19.2 is needed"),
    ({"pydantic": "1.10.2"}, "packages", "pydantic>=2 (1.10.2)"),
])  # fmt: skip
def test_packages(
    versions: dict[str, str | None], name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: versions.get(name, real(name)))
    found = of(environment.check_packages(), name)
    assert found.level == "error"
    assert said in found.found


def test_megads_itself_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert of(environment.check_packages(), "packages").level == "error"


def test_another_python_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.14.1")
    assert environment.check_python().level == "warning"


@pytest.mark.parametrize(
    ("gpus", "built_for", "level", "said"),
    [
        (
            H100,
            "13.0",
            "ok",
            "8 x NVIDIA H100, 80.0 GiB each, driver 580.65.06; torch is built for CUDA 13.0",
        ),
        (H100, None, "error", "built without CUDA"),
        (Gpus(("A",), GIB, "535.1", "12.2"), "13.0", "error", "for CUDA 12.2; torch is built for 13.0"),
        (Gpus(trouble="Driver/library version mismatch"), "13.0", "error", "Driver/library version mismatch"),
        (Gpus(), "13.0", "ok", "no NVIDIA GPU"),
    ],
)
def test_cuda(
    gpus: Gpus, built_for: str | None, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "torch_cuda_version", lambda: built_for)
    found = of(environment.check_cuda(gpus), "CUDA")
    assert found.level == level
    assert said in found.found


def test_what_only_gpus_use_is_no_trouble_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    for name in ("NCCL", "Transformer Engine"):
        assert of(environment.check_cuda(Gpus()), name).level == "ok"
        assert of(environment.check_cuda(H100), name).level == "warning"


def test_torch_says_what_it_is_built_for_without_being_imported() -> None:
    import torch

    assert environment.torch_cuda_version() == torch.version.cuda


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *query-gpu*) echo "NVIDIA H200, 143771, 580.65.06"; echo "NVIDIA H200, 143770, 580.65.06" ;;
  *) echo "| NVIDIA-SMI 580.65.06  Driver Version: 580.65.06  CUDA Version: 13.0 |" ;;
esac
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (NVIDIA_SMI, Gpus(("NVIDIA H200",) * 2, 143770 * 2**20, "580.65.06", "13.0")),
        (
            "#!/bin/sh\necho 'Failed to initialize NVML' >&2; exit 18",
            Gpus(trouble="Failed to initialize NVML"),
        ),
    ],
)
def test_gpus_by_nvidia_smi(
    script: str, expected: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment.find_gpus() == expected


@pytest.mark.parametrize(
    ("files", "level", "said"),
    [((), "ok", "not installed"), (("optimizers",), "ok", "NVIDIA's"), (("web",), "error", "web toolkit")],
)
def test_apex(
    files: tuple[str, ...], level: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / "apex" / name).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = environment.check_apex()
    assert found.level == level
    assert said in found.found


def test_a_configuration_that_cannot_run() -> None:
    found = environment.check_configuration(config(training__seq_length=4096))
    assert found.level == "error"
    assert "max_context_length" in found.found


@pytest.mark.parametrize(("free", "level"), [(0.5, "error"), (3, "warning"), (10, "ok")])
def test_disk(free: float, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(output_dir=str(tmp_path))
    usage = type("Usage", (), {"free": int(free * environment.checkpoint_bytes(settings, "fp32"))})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    assert environment.check_disk(settings).level == level


def test_an_output_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, "access", lambda path, mode: False)
    assert environment.check_disk(config()).level == "error"


def test_memory_of_this_host_and_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_free(size_bytes: int) -> str:
        memory = type("Memory", (), {"available": size_bytes, "total": size_bytes})
        monkeypatch.setattr(environment.psutil, "virtual_memory", lambda: memory)
        return environment.check_memory(config(), Gpus()).level

    assert [with_free(size) for size in (2**20, GIB, 32 * GIB)] == ["error", "warning", "ok"]
    small = load_config("configs/train_config_small.json", {"distributed.device": "cuda"})
    monkeypatch.setattr(environment, "find_problems", lambda *given: iter(()))
    assert environment.check_memory(small, H100).level == "ok"
    assert environment.check_memory(small, Gpus(("small",), 8 * GIB, "580.1", "13.0")).level == "error"


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", free_port()))  # not one that an outgoing connection may get meanwhile
        taken.listen()
        port = taken.getsockname()[1]
        assert environment.check_port(port).level == "warning"
    assert environment.check_port(port).level == "ok"


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.socket, "gethostname", lambda: "no-such-host.invalid")
    assert environment.check_host_name().level == "warning"


def test_tokenizer_and_data(tmp_path: Path) -> None:
    here = config(data__cache_dir=str(tmp_path), data__tokenizer_path=str(tmp_path / "tokenizer.model"))
    assert environment.check_tokenizer(here).level == "error"
    (tmp_path / "tokenizer.model").write_text("")
    assert environment.check_tokenizer(here).level == "ok"
    assert environment.check_tokenizer(config(data__tokenizer_path="my.package:Tokenizer")).level == "ok"

    names = [source.name for source in here.data.sources]
    assert environment.missing_sources(here.data) == names
    for name in names[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.idx").touch()
    found = environment.check_data(here)
    assert found.level == "error"
    assert found.found == f"no dataset (.idx) of {names[0]}"
    (tmp_path / f"{names[0]}.idx").touch()
    assert environment.check_data(here).level == "ok"
    remote = config(data__sources=[{"name": "a", "path": "s3://bucket/a"}])
    assert environment.check_data(remote).level == "ok"


def test_slurm_is_missed_only_by_who_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.check_slurm_cluster(config()).level == "ok"
    assert environment.check_slurm_cluster(config(distributed__slurm__enabled=True)).level == "error"
    for name in ("sinfo", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho gpu; echo cpu")
        (tmp_path / name).chmod(0o755)
    wanted = config(distributed__slurm__enabled=True, distributed__slurm__partition="gpu")
    assert environment.check_slurm_cluster(wanted) == Check("SLURM", "ok", "partitions cpu, gpu")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact" in environment.check_slurm_cluster(config()).found
    assert environment.check_slurm_cluster(config()).level == "warning"
