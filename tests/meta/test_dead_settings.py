"""No dead settings: every leaf of the schema is read by code that acts on it.

A leaf counts as read where its name is taken from its section: `config.training.learning_rate`, or
`training.learning_rate` where `training` is that section by name, by assignment, by iteration or by
annotation. Reading in `megads/config` counts only where something is derived from it (`resolve`,
`shape`, `flops`, ...), not in the files that walk over all settings or only refuse values;
the reference model is the tests' oracle and makes nothing act either.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from megads.config.schema import Config, Section
from megads.config.tree import fields_of, leaves

ROOT = Path(__file__).parents[2]
# Files whose reading does not make a setting act: the declaration, and what only refuses or prints.
PASSIVE = {
    "schema.py",
    "tree.py",
    "validate.py",
    "validate_model.py",
    "validate_layout.py",
    "validate_schedules.py",
    "validate_kernels.py",
    "not_yet.py",
    "show.py",
}

REFUSED = "refused unless at its default (config/not_yet.py or config/validate*.py)"
RECORD = "for the record: printed at start and saved with every checkpoint"
ALLOWED = {
    "model.mla.num_kv_heads": REFUSED,
    "model.mla.use_rope": REFUSED,
    "model.mla.flash_mla_backend": "has one value that works; sparse is refused",
    "model.mla.use_fp8_kv": REFUSED,
    "model.mla.rope_scaling.type": "has one value",
    "data.dataset_name": RECORD,
    "data.dataset_version": RECORD,
    "data.sources[].description": RECORD,
    "data.preprocessing.shuffle": REFUSED,
    "data.persistent_workers": "of the configuration guide; has no effect, and a change of it is told",
    "checkpointing.save_scheduler": REFUSED,
    "distributed.backend": REFUSED + "; resolve derives it from the device",
    **{
        f"distributed.deepspeed.{name}": "compared with our own settings as a whole (config/deepspeed.py)"
        for name in ("fp16", "bf16", "zero_optimization", "gradient_accumulation_steps", "gradient_clipping")
    },
}  # fmt: skip


def every_leaf() -> Iterator[str]:
    """All dotted paths, the entries of lists included as `data.sources[].name`."""
    for leaf in leaves():
        if leaf.section is None:
            yield leaf.path
        if leaf.item is not None:
            yield from (f"{leaf.path}[].{field.name}" for field in fields_of(leaf.item))


def class_names() -> dict[str, set[str]]:
    """Class of a section to the names that code knows the section by: MLA to mla, DataSource to sources."""
    names = {Config.__name__: {"config"}}
    stack: list[type[Section]] = [Config]
    while stack:
        for field in fields_of(stack.pop()):
            inner = field.section or field.item
            if inner is not None:
                names.setdefault(inner.__name__, set()).add(field.name)
                stack.append(inner)
    return names


def terminal(node: ast.AST | None) -> str:
    """The last name of `a.b.c`, `c`, `c[0]` or `c()`."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def aliases(tree: ast.AST, sections: dict[str, set[str]]) -> dict[str, set[str]]:
    """Variables of a file to the sections that they stand for."""
    every = set().union(*sections.values())
    found: dict[str, set[str]] = {name: {name} for name in every}

    def bind(target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                bind(one, other)
        elif terminal(value) in found:
            found.setdefault(terminal(target), set()).update(found[terminal(value)])

    # Twice, because a loop over an argument is met before the argument's annotation.
    for node in [*ast.walk(tree), *ast.walk(tree)]:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, node.iter)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            for part in ast.walk(node.annotation):
                if terminal(part) in sections:
                    found.setdefault(node.arg, set()).update(sections[terminal(part)])
    return found


def read_in(tree: ast.AST) -> set[tuple[str, str]]:
    """(section, leaf) pairs that a file reads."""
    sections = class_names()
    known = aliases(tree, sections)
    return {
        (section, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        for section in known.get(terminal(node.value), ())
    }


def acting_files() -> list[Path]:
    config = ROOT / "megads" / "config"
    files = [*(ROOT / "megads").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "pretrain_megads.py"]
    passive = {config / name for name in PASSIVE} | {ROOT / "megads" / "model" / "reference.py"}
    return [path for path in files if path.is_file() and path not in passive]


def unread() -> list[str]:
    read: set[tuple[str, str]] = set()
    for path in acting_files():
        read |= read_in(ast.parse(path.read_text(encoding="utf-8")))
    dead = []
    for path in every_leaf():
        section, _, name = path.replace("[]", "").rpartition(".")
        if (section.rpartition(".")[2] or "config", name) not in read:
            dead.append(path)
    return dead


def test_every_setting_is_read_where_it_acts() -> None:
    dead = sorted(set(unread()) - set(ALLOWED))
    assert not dead, f"settings that nothing reads: {dead}; use them, or remove them from the schema"


def test_the_exceptions_are_still_needed() -> None:
    stale = sorted(set(ALLOWED) - set(unread()))
    assert not stale, f"no settings, or read by now: {stale}; remove them from ALLOWED"


def test_a_dead_setting_would_be_found() -> None:
    source = """
def build(options: MLA, config):
    moe, training = config.model.moe, config.training
    options.d_latent
    moe.num_experts
    for one in config.data.sources:
        one.weight
    config.seed
    other.learning_rate
    training.seq_length = 1
"""
    read = read_in(ast.parse(source))
    expected = {("mla", "d_latent"), ("moe", "num_experts"), ("sources", "weight"), ("config", "seed")}
    assert expected <= read
    names = {name for _, name in read}
    assert "learning_rate" not in names, "taken from something that is no section"
    assert "seq_length" not in names, "written, not read"


def test_the_walk_reaches_every_field_of_every_section() -> None:
    places = {name: len(names) for name, names in class_names().items()}
    fields = sum(
        places.get(section.__name__, 0)
        for section in Section.__subclasses__()
        for leaf in fields_of(section)
        if leaf.section is None
    )
    assert fields == len(list(every_leaf()))
