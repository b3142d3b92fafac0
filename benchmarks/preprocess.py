"""Preprocessing speed: gzipped JSON lines to `.bin` and `.idx`, MegaDS beside the usual tools.

    python benchmarks/preprocess.py --tokenizer tokenizer.json --mb 441 \\
        --megatron-lm MEGATRON_LM --megatron-python PYTHON --datatrove-python PYTHON --dolma-bin DOLMA

Every contender is a process of its own, started cold and timed by the wall clock from start to exit.
MegaDS gets the whole corpus, on 1 and 2 workers; its start is in these rates. The limit is a bare loop
(gunzip, parse, tokenize with a tokenizer that has seen the text before, write): what no tool on these
libraries can pass, and two such loops at a time show how far the cores of this machine slow each other.
The others take minutes for what MegaDS does in seconds, so they get two subsets, and their rate is the
difference of bytes over that of seconds: without their start, which would count for much on little text.
They are compared with MegaDS's rate without its start, found in the same way. MB are of the documents'
text, 10^6 bytes. Contenders without a flag are left out.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "preprocess_dolma.py"
DOCUMENT_BYTES = (200, 2_000_000)
SMALL_PART = 5  # of a subset, is the other subset

DATATROVE = """
import json, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    source, output, tokenizer, eod = sys.argv[1:]
    steps = [
        JsonlReader(source, glob_pattern="*.gz"),
        MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eod),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=output + "/logs").run()
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--eod-token", default="<｜end▁of▁sentence｜>", help="(default: DeepSeek's)")
    parser.add_argument("--mb", type=float, default=441.0, help="of text (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=8, help="files of the corpus (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=default_text(),
        help="directories of text files (default: Python's library and packages, /usr/share)")  # fmt: skip
    parser.add_argument("--corpus", type=Path, help="a corpus that is there: DIRECTORY/SOURCE/*.gz")
    parser.add_argument("--subset-mb", type=float, default=10.0, help="for the others (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of MegaDS; the best counts")
    parser.add_argument(
        "--work", type=Path, help="directory for corpus and outputs (default: a temporary one)"
    )
    parser.add_argument("--megatron-lm", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, help="with what Megatron-LM needs")
    parser.add_argument("--datatrove-python", help="Python that has datatrove[processing]")
    parser.add_argument("--dolma-bin", help="dolma's command")
    parser.add_argument("--limit-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def default_text() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/share")]


# --- the corpus -------------------------------------------------------------------------------------------


def build_corpus(options: argparse.Namespace, directory: Path) -> None:
    """Text files of this machine, shuffled, each once, as gzipped JSON lines in shards of one size."""
    paths = sorted({path for root in options.text for path in root.rglob("*") if path.is_file()})
    random.Random(0).shuffle(paths)
    directory.mkdir(parents=True)
    shards = [gzip.open(directory / f"{i:04d}.json.gz", "wb", compresslevel=6) for i in range(options.shards)]  # noqa: SIM115
    sizes = [0] * len(shards)
    for number, text in enumerate(distinct_texts(paths)):
        smallest = sizes.index(min(sizes))
        shards[smallest].write(
            json.dumps({"id": str(number), "text": text, "source": "files"}).encode() + b"\n"
        )
        sizes[smallest] += len(text.encode())
        if sum(sizes) >= options.mb * 1e6:
            break
    for shard in shards:
        shard.close()
    if sum(sizes) < options.mb * 1e6:
        print(f"Only {sum(sizes) / 1e6:.0f} MB of text were found; name more directories (--text).")


def distinct_texts(paths: Sequence[Path]) -> Iterator[str]:
    seen: set[bytes] = set()
    for path in paths:
        try:
            if not DOCUMENT_BYTES[0] <= path.stat().st_size <= DOCUMENT_BYTES[1]:
                continue
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            text = content.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if "\0" not in text and digest not in seen:
            seen.add(digest)
            yield text


def write_subset(corpus: Path, directory: Path, megabytes: float) -> float:
    """The first documents of the corpus, plain and gzipped; returns the megabytes of their text."""
    lines, text_bytes = [], 0
    for path in sorted(corpus.rglob("*.gz")):
        with gzip.open(path, "rb") as file:
            for line in file:
                lines.append(line)
                text_bytes += len(json.loads(line)["text"].encode())
                if text_bytes >= megabytes * 1e6:
                    break
        if text_bytes >= megabytes * 1e6:
            break
    (directory / "packed").mkdir(parents=True)
    (directory / "subset.jsonl").write_bytes(b"".join(lines))
    (directory / "packed" / "subset.json.gz").write_bytes(gzip.compress(b"".join(lines)))
    return text_bytes / 1e6


# --- running and timing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One run of a command: wall clock, processor time of all its processes, memory of the largest."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def run(command: Sequence[object], **environment: str) -> Timing:
    """Runs to the end; a failure shows what was said."""
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        if status:
            said.seek(0)
            raise SystemExit(f"{command[:2]} failed:\n{said.read()[-3000:].decode(errors='replace')}")
    return Timing(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def run_megads(options: argparse.Namespace, corpus: Path, output: Path, workers: int) -> Timing:
    return run(
        [sys.executable, TOOL, "--input-root", corpus, "--output-root", output,
         "--tokenizer", options.tokenizer, "--workers", workers]
    )  # fmt: skip


def best_of_megads(options: argparse.Namespace, corpus: Path, output: Path) -> dict[int, Timing]:
    """The best run by number of workers, which take turns, so that noise of the machine hits both."""
    timings: dict[int, list[Timing]] = {1: [], 2: []}
    for _ in range(options.repeat):
        for workers, runs in timings.items():
            shutil.rmtree(output, ignore_errors=True)  # what is finished would be skipped
            runs.append(run_megads(options, corpus, output, workers))
    return {workers: min(runs, key=lambda timing: timing.seconds) for workers, runs in timings.items()}


def text_megabytes(output: Path) -> float:
    records = [json.loads(path.read_bytes()) for path in output.rglob("*.json")]
    return float(sum(record["text_bytes"] for record in records)) / 1e6


# --- the limit --------------------------------------------------------------------------------------------


def measure_limit(options: argparse.Namespace) -> None:
    """Prints the seconds of the bare loop and of its parts; its own process calls this."""
    import msgspec
    from isal import igzip

    from megads.data.encoding import Encoder
    from megads.data.recipe import Recipe

    class Line(msgspec.Struct):
        text: str

    decode = msgspec.json.Decoder(Line).decode
    tokenizer = Encoder(Recipe(str(options.tokenizer))).tokenizer
    seconds: dict[str, float] = {}
    for _ in ("to warm up", "to measure"):
        seconds = {"gunzip": 0.0, "parse": 0.0, "tokenize": 0.0, "write": 0.0}
        with open(options.work / "limit.bin", "wb") as output:
            for path in sorted(options.corpus.rglob("*.gz")):
                with igzip.open(path, "rb") as file:
                    unfinished = b""
                    while True:
                        marks = [time.perf_counter()]
                        data = file.read(1 << 20)
                        if not data:
                            break
                        marks.append(time.perf_counter())
                        *lines, unfinished = (unfinished + data).split(b"\n")
                        texts = [decode(line).text for line in lines]
                        marks.append(time.perf_counter())
                        ids, _ = tokenizer.encode_batch_arrays(texts)
                        marks.append(time.perf_counter())
                        output.write(ids.data)
                        marks.append(time.perf_counter())
                        for part, (start, end) in zip(seconds, itertools.pairwise(marks), strict=True):
                            seconds[part] += end - start
    print(json.dumps(seconds))


def run_limit(
    options: argparse.Namespace, corpus: Path, work: Path, processes: int
) -> list[dict[str, float]]:
    """Seconds of the parts of each of so many bare loops that run at the same time."""
    loops = []
    for number in range(processes):
        directory = work / f"limit-{processes}-{number}"
        directory.mkdir(exist_ok=True)
        command = [sys.executable, __file__, "--limit-only", "--tokenizer", options.tokenizer,
                   "--corpus", corpus, "--work", directory]  # fmt: skip
        loops.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True))
    said = [loop.communicate()[0] for loop in loops]
    if any(loop.returncode for loop in loops):
        raise SystemExit("the bare loop failed; what it said is above")
    return [json.loads(text.splitlines()[-1]) for text in said]


# --- the others -------------------------------------------------------------------------------------------


def contenders(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Name to a function of (directory of a subset, output) that makes the dataset and times it."""
    tokenizer = tokenizer_directory(options, work)
    chosen: dict[str, Any] = {}
    if options.megatron_lm:
        chosen["Megatron-LM preprocess_data.py"] = lambda subset, output: run(
            [options.megatron_python, options.megatron_lm / "tools" / "preprocess_data.py",
             "--input", subset / "subset.jsonl", "--output-prefix", output / "d", "--append-eod",
             "--workers", 1, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer],
            PYTHONPATH=str(options.megatron_lm),
        )  # fmt: skip
    if options.datatrove_python:
        script = work / "datatrove_megatron.py"
        script.write_text(DATATROVE)
        chosen["datatrove Megatron writer"] = lambda subset, output: run(
            [
                options.datatrove_python,
                script,
                subset / "packed",
                output,
                options.tokenizer,
                options.eod_token,
            ]
        )
    if options.dolma_bin:
        vocabulary = json.loads(options.tokenizer.read_text(encoding="utf-8"))["added_tokens"]
        eod_id = next(token["id"] for token in vocabulary if token["content"] == options.eod_token)
        chosen["dolma tokens"] = lambda subset, output: run(
            [options.dolma_bin, "tokens", "--documents", subset / "packed" / "*.gz", "--destination", output,
             "--tokenizer.name_or_path", options.tokenizer, "--tokenizer.eos_token_id", eod_id,
             "--tokenizer.pad_token_id", eod_id, "--dtype", "uint32", "--processes", 1]
        )  # fmt: skip
    return chosen


def tokenizer_directory(options: argparse.Namespace, work: Path) -> Path:
    """What transformers wants beside a tokenizer.json."""
    directory = work / "tokenizer"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(options.tokenizer.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": options.eod_token}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def compare(
    options: argparse.Namespace, corpus: Path, work: Path, megabytes: float, megads_seconds: float
) -> None:
    sizes = [write_subset(corpus, work / f"subset-{mb:g}", mb)
             for mb in (options.subset_mb / SMALL_PART, options.subset_mb)]  # fmt: skip
    subsets = [work / f"subset-{mb:g}" for mb in (options.subset_mb / SMALL_PART, options.subset_mb)]
    run([sys.executable, TOOL, "--input", subsets[1] / "subset.jsonl", "--output", work / "same" / "d",
         "--tokenizer", options.tokenizer, "--eod-token", options.eod_token])  # fmt: skip
    ours = (work / "same" / "d.bin").read_bytes()
    small = run([sys.executable, TOOL, "--input", subsets[1] / "packed" / "subset.json.gz", "--output",
                 work / "small" / "d", "--tokenizer", options.tokenizer, "--workers", 1])  # fmt: skip
    megads_rate = (megabytes - sizes[1]) / (megads_seconds - small.seconds)
    print(f"{'MegaDS, without its start':32} {megads_rate:8.2f} MB/s  as the others below")
    for number, (name, make) in enumerate(contenders(options, work).items()):
        timings = []
        for subset in subsets:
            output = work / f"other-{number}-{subset.name}"
            output.mkdir()
            timings.append(make(subset, output))
        more_seconds = timings[1].seconds - timings[0].seconds
        if more_seconds <= 0:
            print(f"{name:32} more text took less time: the machine is busy, or --subset-mb too small")
            continue
        rate = (sizes[1] - sizes[0]) / more_seconds
        same = any(path.read_bytes() == ours for path in output.rglob("*.bin"))
        print(
            f"{name:32} {rate:8.2f} MB/s  MegaDS: {megads_rate / rate:5.1f}x  {timings[1].peak_mb:6.0f} MB  "
            f"{sizes[1]:.1f} MB took {timings[1].seconds:.1f} s  "
            f"{'same .bin as MegaDS' if same else 'another .bin'}",
            flush=True,
        )


def main() -> None:
    options = parse_arguments()
    if options.limit_only:
        measure_limit(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        corpus = options.corpus
        if corpus is None:
            corpus = work / "corpus"
            if not corpus.exists():
                # Elsewhere: what Linux calls a program's peak of memory begins with that of who starts it.
                builder = multiprocessing.get_context("fork").Process(
                    target=build_corpus, args=(options, corpus / "files")
                )
                builder.start()
                builder.join()
                if builder.exitcode:
                    raise SystemExit("the corpus could not be built; what was said is above")
        measure(options, corpus, work)


def measure(options: argparse.Namespace, corpus: Path, work: Path) -> None:
    timings = best_of_megads(options, corpus, work / "megads")
    megabytes = text_megabytes(work / "megads")
    rates = {workers: megabytes / timing.seconds for workers, timing in timings.items()}
    print(f"{megabytes:.1f} MB of text, {len(list(corpus.rglob('*.gz')))} files, {os.cpu_count()} cores")
    for workers, timing in timings.items():
        print(
            f"{f'MegaDS, cold, {workers} worker(s)':32} {rates[workers]:8.2f} MB/s  {timing.seconds:.1f} s  "
            f"{megabytes / timing.cpu_seconds:.2f} MB per CPU-second  {timing.peak_mb:6.0f} MB per process"
        )
    print(f"scaling on 2 workers: {rates[2] / rates[1]:.2f}", flush=True)
    (parts,) = run_limit(options, corpus, work, 1)
    limit = megabytes / sum(parts.values())
    shares = ", ".join(f"{part} {megabytes / max(seconds, 1e-9):.0f}" for part, seconds in parts.items())
    print(
        f"{'limit, 1 core':32} {limit:8.2f} MB/s  ({shares}); MegaDS is at {rates[1] / limit:.0%} of it",
        flush=True,
    )
    both = sum(megabytes / sum(loop.values()) for loop in run_limit(options, corpus, work, 2))
    print(
        f"{'limit, 2 cores':32} {both:8.2f} MB/s  scaling of the bare loop: {both / limit:.2f}; "
        f"MegaDS is at {rates[2] / both:.0%} of it",
        flush=True,
    )
    if options.megatron_lm or options.datatrove_python or options.dolma_bin:
        compare(options, corpus, work, megabytes, timings[1].seconds)


if __name__ == "__main__":
    main()
