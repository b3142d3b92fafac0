"""Near duplicates: speed, precision and recall on planted copies, MegaDS beside datasketch.

Both get the same documents and the same setting: 5-word shingles, bands x rows. Documents are made of
real text, cut to a few sizes; copies of some have a share of their words replaced, so that the Jaccard
similarity of each pair is known exactly, from the shingles. Found: the pair is in one cluster.
Timed end to end from texts in memory to clusters: words, shingles, signatures, bands, components; in
seconds of one core, which other programs on the machine disturb least. A third time, by the clock, is
that of the tool as users run it, with reading and writing.

    OMP_NUM_THREADS=1 python benchmarks/dedup.py --mb 20 --datasketch-python /path/to/venv/bin/python
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.3)
DOCUMENT_CHARACTERS = (1500, 3000, 6000)
SHINGLE_WORDS = 5

# What datasketch's own documentation shows, on words split as ours are.
DATASKETCH = """
import json, re, sys, time
from datasketch import MinHash, MinHashLSH
bands, rows, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
texts = json.load(open(path))
begun = time.process_time()
lsh = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
parent = list(range(len(texts)))
def root(x):
    while parent[x] != x:
        parent[x] = parent[parent[x]]
        x = parent[x]
    return x
word = re.compile(r"[^\\W_]+")
for number, text in enumerate(texts):
    words = word.findall(text.lower())
    shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
    sketch = MinHash(num_perm=bands * rows)
    sketch.update_batch(shingles)
    for other in lsh.query(sketch):
        low, high = sorted((root(number), root(other)))
        parent[high] = low
    lsh.insert(number, sketch)
roots = [root(x) for x in range(len(texts))]
print(json.dumps({"seconds": time.process_time() - begun, "roots": roots}))
"""


def real_documents(total_bytes: int) -> Iterator[str]:
    """Pieces of the Python sources installed here, each at most once."""
    sizes = random.Random(0)
    taken_bytes = 0
    seen: set[str] = set()
    roots = [Path(os.__file__).parent, *(Path(p) for p in sys.path if p.endswith("site-packages"))]
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            start = 0
            while start < len(text) - 500:
                piece = text[start : start + sizes.choice(DOCUMENT_CHARACTERS)]
                start += len(piece)
                if piece in seen:
                    continue
                seen.add(piece)
                yield piece
                taken_bytes += len(piece)
                if taken_bytes >= total_bytes:
                    return


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def jaccard(one: set[tuple[str, ...]], two: set[tuple[str, ...]]) -> float:
    return len(one & two) / len(one | two)


def altered(words: list[str], level: float, rng: random.Random) -> str:
    """A copy whose Jaccard similarity to the original is about `level`: words replaced here and there."""
    original = shingles(" ".join(words))
    changed, order = list(words), list(range(len(words)))
    rng.shuffle(order)
    # Halve the number of replaced words until the similarity is the wanted one.
    low, high = 0, len(words)
    while low < high:
        middle = (low + high) // 2
        changed = list(words)
        for place in order[:middle]:
            changed[place] = f"planted{place}"
        if jaccard(original, shingles(" ".join(changed))) > level:
            low = middle + 1
        else:
            high = middle
    return " ".join(changed)


def planted(texts: Sequence[str], rng: random.Random) -> tuple[list[str], list[tuple[int, int, float]]]:
    """All texts with copies of a third of them behind; (original, copy, similarity) of each copy.

    Words are made plain first (letters and digits, lowercase), so that every contender sees the same.
    """
    plain = [" ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) for text in texts]
    plain = [text for text in plain if len(text.split()) >= 50]
    result, pairs = list(plain), []
    for number, original in enumerate(rng.sample(range(len(plain)), len(plain) // 3)):
        copy = altered(plain[original].split(), LEVELS[number % len(LEVELS)], rng)
        pairs.append((original, len(result), jaccard(shingles(plain[original]), shingles(copy))))
        result.append(copy)
    return result, pairs


def megads(texts: Sequence[str], bands: int, rows: int, threshold: float) -> tuple[float, list[int]]:
    """Seconds of a core and the first document of each one's cluster, in one process, in memory."""
    import numpy as np

    from megads.data.cleaning import exact, keys, near
    from megads.data.cleaning.words import LETTERS, split_words

    settings = near.NearSettings(bands=bands, rows=rows, threshold=threshold)
    split_words(["warm up"], LETTERS)  # tables that a process makes once
    begun = time.process_time()
    parts = []
    for start in range(0, len(texts), 300):
        words = [letters for (letters,) in split_words(texts[start : start + 300], LETTERS)]
        parts.append(near.signatures(words, settings))
    signatures = np.concatenate(parts)
    documents = np.repeat(np.arange(len(texts)), bands)
    of_bands = near.band_keys(signatures, settings).reshape(-1, 2)
    later, first = exact.repeats(keys.entries(keys.DOCUMENT, of_bands, documents))
    pairs = np.unique(np.stack((documents[first], documents[later]), axis=1), axis=0)
    alike = near.similarity(signatures[pairs[:, 0]], signatures[pairs[:, 1]]) >= threshold
    roots = np.arange(len(texts))
    dropped, stays = near.first_of_clusters(pairs[alike])
    roots[dropped] = stays
    return time.process_time() - begun, roots.tolist()


def datasketch(python: Path, texts: Sequence[str], bands: int, rows: int) -> tuple[float, list[int]]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        command = [str(python), "-c", DATASKETCH, str(bands), str(rows), file.name]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["seconds"], result["roots"]


def tool(texts: Sequence[str], workers: int) -> float:
    """Seconds of tools/clean_dolma.py --exact --near on 4 gzip shards, start of Python included."""
    import gzip

    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "corpus" / "source"
        source.mkdir(parents=True)
        for shard in range(4):
            lines = (
                json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts) if i % 4 == shard
            )
            (source / f"{shard}.json.gz").write_bytes(gzip.compress("".join(lines).encode(), 6))
        command = [
            sys.executable, str(ROOT / "tools" / "clean_dolma.py"), "--input-root", str(source.parent),
            "--removals", f"{directory}/removals", "--exact", "--near", "--workers", str(workers),
        ]  # fmt: skip
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        return time.perf_counter() - begun


def print_quality(
    name: str, texts: Sequence[str], pairs: Sequence[tuple[int, int, float]], roots: list[int]
) -> None:
    """Recall by level of similarity; precision: of the dropped, those that are like the one that stays."""
    recalls = []
    for level in LEVELS:
        near_level = [(a, b) for a, b, similarity in pairs if abs(similarity - level) < 0.02]
        if near_level:
            found = sum(roots[a] == roots[b] for a, b in near_level) / len(near_level)
            recalls.append(f"{level:.2f}: {found:5.1%} of {len(near_level)}")
    planted_copies = {copy for _, copy, _ in pairs}
    dropped = [(i, root) for i, root in enumerate(roots) if root != i]
    sets = {i: shingles(texts[i]) for pair in dropped for i in pair}
    similarities = [jaccard(sets[i], sets[root]) for i, root in dropped]
    print(f"\n{name}: recall by Jaccard similarity of the planted pair")
    print("  " + "\n  ".join(recalls))
    print(f"  dropped {len(dropped)}, of them planted {sum(i in planted_copies for i, _ in dropped)}")
    for least in (0.8, 0.7, 0.6, 0.5):
        share = sum(similarity >= least for similarity in similarities) / max(1, len(similarities))
        print(f"  precision at Jaccard >= {least}: {share:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mb", type=float, default=20.0, help="text to make documents of (default: %(default)s)"
    )
    parser.add_argument("--bands", type=int, default=14)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--datasketch-python", type=Path, help="interpreter that has datasketch")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="for the tool")
    options = parser.parse_args()
    rng = random.Random(0)
    texts, pairs = planted(list(real_documents(int(options.mb * 1e6))), rng)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts):,} documents, {megabytes:.1f} MB, {len(pairs):,} planted copies; "
        f"{options.bands} bands of {options.rows}"
    )
    speeds = {}
    for name, threshold in (("MegaDS", 0.7), ("MegaDS, every candidate", 0.0)):
        seconds, roots = megads(texts, options.bands, options.rows, threshold)
        speeds[name] = megabytes / seconds
        print_quality(name, texts, pairs, roots)
    if options.datasketch_python:
        seconds, roots = datasketch(options.datasketch_python, texts, options.bands, options.rows)
        speeds["datasketch"] = megabytes / seconds
        print_quality("datasketch", texts, pairs, roots)
    print()
    for name, speed in speeds.items():
        ratio = f", {speed / speeds['datasketch']:.1f}x datasketch" if "datasketch" in speeds else ""
        print(f"{name}: {speed:.1f} MB/s on one core{ratio}")
    for workers in options.workers:
        print(
            f"tools/clean_dolma.py, {workers} workers: {megabytes / tool(texts, workers):.1f} MB/s end to end"
        )


if __name__ == "__main__":
    main()
