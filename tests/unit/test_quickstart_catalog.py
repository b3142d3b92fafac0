"""The list of configurations: complete, with the right numbers, and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from megads.errors import ConfigError
from megads.launch.catalog import count_text, load_catalog

ROOT = Path(__file__).parents[2]
LISTED_WITHOUT = """
import runpy, sys
sys.argv = ["quickstart.py", "--list"]
try:
    runpy.run_path("tools/quickstart.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
heavy = sorted({"torch", "numpy", "megatron", "transformers"} & set(sys.modules))
assert not heavy, heavy
"""


def test_the_shipped_configurations_by_size() -> None:
    entries = load_catalog(ROOT / "configs")
    sizes = [entry.parameters for entry in entries]
    assert sizes == sorted(sizes)
    by_name = {entry.path.name: entry for entry in entries}
    assert {"megads.schema.json", "deepspeed_zero1.json", "dolma.json"}.isdisjoint(by_name)
    v3 = by_name["deepseek_v3_671b.json"]
    assert (v3.devices, v3.needs_gpus, v3.tokens, len(v3.stages)) == (2048, True, 14_800_000_000_000, 1)
    assert 671e9 < v3.parameters < 685e9, "the published 671B and the MTP module"
    large = by_name["train_config_large.json"]
    assert large.devices == 128
    assert large.active_parameters < large.parameters / 2


def test_listing_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTED_WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["configuration"] == ["parameters", "active", "devices", "tokens", "stages"]
    assert rows["deepseek_v3_671b.json"][2:] == ["2,048", "GPUs", "14.8T", "1"]
    assert rows["debug.json"][2:] == ["1", "or", "more", "246K", "1"]


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no configuration"):
        load_catalog(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": {"num_layer": 3}}')
    with pytest.raises(ConfigError, match="num_layers"):
        load_catalog(tmp_path)


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (5_730_944, "5.73M"), (671e9, "671B"), (14.8e12, "14.8T")],
)
def test_counts(number: float, text: str) -> None:
    assert count_text(number) == text
