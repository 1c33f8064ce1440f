"""Reading speed side by side with peers, on the same pictures: images per second, ratios, memory, cost per stage.

Every contender runs in a process of its own on the same cores, keeps its pipeline open, and is asked in turn, round
after round, for some images; what counts are medians of the ratios within a round, so that a busy machine slows all
alike. All of them shuffle: ours as in training, the others as far as four shards reach. Peers that are not installed
(`pip install mosaicml-streaming litdata`) are left out and said to be. The last line of output is one JSON object.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.loader import Position, train_batches
from vaegan_dist.data.manifest import Manifest, ShardInfo, write_manifest
from vaegan_dist.data.order import EpochOrder

BATCH, STREAMS, BLOCK_SHARDS = 128, 64, 4
AHEAD = 16  # batches, more than any contender reads ahead
PATIENCE_SECONDS = 120.0
RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Case:
    """Pictures of one kind."""

    name: str
    side: int
    channels: int
    count: int
    images: int  # asked for per round
    encoding: str


CASES = (
    Case("jpeg64", 64, 3, 8192, 8192, "jpg"),
    Case("jpeg256", 256, 3, 1024, 2048, "jpg"),
    Case("digits28", 28, 1, 8192, 8192, "png"),
)


def picture(number: int, case: Case) -> np.ndarray:
    """A picture with the spectrum of photographs (amplitude 1/f), coloured; uint8 [H, W, C]."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(case.side)[:, None], np.fft.rfftfreq(case.side)[None, :])
    frequency[0, 0] = 1 / case.side
    noise = np.fft.rfft2(rng.standard_normal((case.channels, case.side, case.side))) / frequency
    planes = np.fft.irfft2(noise, s=(case.side, case.side))
    planes = 0.75 * planes[:1] + 0.25 * planes if case.channels == 3 else planes
    low, high = planes.min(), planes.max()
    return ((planes - low) / (high - low) * 255).astype(np.uint8).transpose(1, 2, 0)


def encode(pixels: np.ndarray, case: Case) -> bytes:
    """JPEG of quality 90 with 4:2:0 colour, as cameras write it; PNG for digits."""
    if case.encoding == "jpg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "420"))
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0]).save(stream, "PNG")
    return stream.getvalue()


def decode_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def decode_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data)


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"pillow": decode_pillow, "simplejpeg": decode_simplejpeg}


# The same pictures in the format of each contender.


def write_all(folder: Path, case: Case) -> None:
    """Shards for us and webdataset (digits for us: chunks), and the peers' own formats."""
    pixels = [picture(n, case) for n in range(case.count)]
    encoded = [encode(image, case) for image in pixels]
    per_shard = case.count // 8
    write_shards(folder / "tar", case, encoded, per_shard)
    if case.encoding == "png":
        write_chunks(folder / "chunks", case, pixels, per_shard)
    if find_spec("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=2**22) as writer:
            for number, data in enumerate(encoded):
                writer.write({"image": data, "label": number % 10})
    if find_spec("litdata"):
        from litdata.streaming.writer import BinaryWriter

        (folder / "lit").mkdir()
        lit = BinaryWriter(str(folder / "lit"), chunk_bytes=2**22)
        for number, data in enumerate(encoded):
            lit[number] = {"image": data, "label": number % 10}
        lit.done()
        lit.merge()


def describe(folder: Path, case: Case, layout: Any, counts: list[int]) -> None:
    paths = sorted(folder.glob("*.tar"))
    shards = tuple(
        ShardInfo(name=p.name, samples=n, bytes=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest())
        for p, n in zip(paths, counts, strict=True)
    )
    size: dict[str, Any] = {"height": case.side, "width": case.side, "channels": case.channels}
    write_manifest(folder, Manifest(layout=layout, classes=tuple("0123456789"), shards=shards, **size))


def write_shards(folder: Path, case: Case, encoded: list[bytes], per_shard: int) -> None:
    folder.mkdir(parents=True)
    counts = []
    for first in range(0, case.count, per_shard):
        with webdataset.TarWriter(str(folder / f"{first:08d}.tar"), encoder=False) as tar:
            part = range(first, min(first + per_shard, case.count))
            for n in part:
                tar.write({"__key__": f"{n:08d}", case.encoding: encoded[n], "cls": str(n % 10).encode()})
            counts.append(len(part))
    describe(folder, case, "files", counts)


def write_chunks(folder: Path, case: Case, pixels: list[np.ndarray], per_shard: int) -> None:
    folder.mkdir(parents=True)
    for first in range(0, case.count, per_shard):
        with webdataset.TarWriter(str(folder / f"{first:08d}.tar"), encoder=False) as tar:
            for at in range(first, first + per_shard, 256):
                part = range(at, min(at + 256, first + per_shard))
                images, labels = io.BytesIO(), io.BytesIO()
                np.save(images, np.stack([pixels[n] for n in part]))
                np.save(labels, np.array([n % 10 for n in part], np.int64))
                tar.write({"__key__": f"{at:08d}", "images.npy": images.getvalue(), "labels.npy": labels.getvalue()})
    describe(folder, case, "chunks", [per_shard] * (case.count // per_shard))


# The contenders: endless iterators over batches.


def stack(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The peers' batches: what a default collate does, for uint8 arrays."""
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    return images, torch.tensor([label for _, label in samples])


def epochs(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def ours(folder: Path, case: Case, workers: int, *, kind: str = "tar", in_memory: bool = False) -> Iterator[Any]:
    return train_batches(
        open_dataset(str(folder / kind), in_memory=in_memory),
        seed=0,
        streams=STREAMS,
        batch_size=BATCH,
        block_shards=BLOCK_SHARDS,
        position=Position(0, 0),
        rank=0,
        world_size=1,
        loader_workers=workers,
        prefetch=4,
    )


def raw(folder: Path, case: Case, workers: int) -> Iterator[Any]:
    """Bytes only, in our order: what no reader can beat."""
    data = open_dataset(str(folder / "tar"), in_memory=False)
    ends = np.cumsum(data.shard_samples)
    epoch = 0
    while True:
        order = EpochOrder(data.shard_samples, 0, epoch, STREAMS, BATCH, BLOCK_SHARDS)
        for step in range(order.steps):
            ids = order.batch(step)
            where = np.searchsorted(ends, ids, side="right")
            batch = []
            for shard, place in zip(where.tolist(), (ids - ends[where]).tolist(), strict=True):
                index = data._shards.index(shard)
                batch.append(data._shards.file(shard).read(int(index.size[place]), int(index.offset[place])))
            yield batch
        epoch += 1


def decoded(sample: dict[str, Any], encoding: str, decoder: str) -> tuple[np.ndarray, int]:
    return DECODERS[decoder](sample[encoding]), int(sample["cls"])


def stock_webdataset(folder: Path, case: Case, workers: int, *, decoder: str) -> Iterator[Any]:
    urls = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    data = data.shuffle(case.count // 8 * BLOCK_SHARDS)
    data = data.map(functools.partial(decoded, encoding=case.encoding, decoder=decoder))
    data = data.batched(BATCH, collation_fn=stack)
    return epochs(webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0))


class Mapped:
    """Collate of the peers that hand out dictionaries of bytes."""

    def __init__(self, decoder: str) -> None:
        self.decoder = decoder

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        return stack([(DECODERS[self.decoder](sample["image"]), int(sample["label"])) for sample in samples])


def mosaicml(folder: Path, case: Case, workers: int, *, decoder: str) -> Iterator[Any]:
    from streaming import StreamingDataset

    block = case.count // 8 * BLOCK_SHARDS
    data = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH, shuffle_block_size=block)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": Mapped(decoder)}
    return epochs(DataLoader(data, batch_size=BATCH, drop_last=True, **options))


def litdata(folder: Path, case: Case, workers: int, *, decoder: str) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "lit"), shuffle=True, drop_last=True)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": Mapped(decoder)}
    return epochs(StreamingDataLoader(data, batch_size=BATCH, **options))


def contenders(case: Case, workers: int) -> dict[str, Callable[..., Iterator[Any]]]:
    """Those that can run here, by name."""
    found: dict[str, Callable[..., Iterator[Any]]] = {"ours": ours, "webdataset_pillow": stock("pillow")}
    if not workers:
        found["raw_bytes"] = raw
    if case.encoding == "jpg":
        found["webdataset_simplejpeg"] = stock("simplejpeg")
    else:
        found["ours_chunks"] = functools.partial(ours, kind="chunks")
        found["ours_in_memory"] = functools.partial(ours, kind="chunks", in_memory=True)
    for name, package, make in (("mosaicml_streaming", "streaming", mosaicml), ("litdata", "litdata", litdata)):
        if find_spec(package):
            found[name] = functools.partial(make, decoder="pillow")
            if case.encoding == "jpg":
                found[f"{name}_simplejpeg"] = functools.partial(make, decoder="simplejpeg")
    return found


def stock(decoder: str) -> Callable[..., Iterator[Any]]:
    return functools.partial(stock_webdataset, decoder=decoder)


# Measuring.


def serve(
    pipe: Any, make: Callable[..., Iterator[Any]], folder: Path, case: Case, workers: int, cores: set[int]
) -> None:
    """A contender's process: consume as many images as asked for, tell the seconds and the peak memory in MiB."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    batches = make(folder, case, workers)
    for _ in range(8):
        next(batches)
    pipe.send("ready")
    while (images := pipe.recv()) is not None:
        # While the others were asked, batches were read ahead; those are not what is measured.
        for _ in range(AHEAD):
            next(batches)
        begin = time.perf_counter()
        for _ in range(images // BATCH):
            next(batches)
        seconds = time.perf_counter() - begin
        pipe.send((seconds, memory()))
    if hasattr(batches, "close"):
        batches.close()
    pipe.send("done")


def answer(pipe: Any) -> Any:
    """What a contender says; None if it has ended or says nothing for long."""
    with contextlib.suppress(EOFError, ConnectionError):
        if pipe.poll(PATIENCE_SECONDS):
            return pipe.recv()
    return None


def memory() -> float:
    """MiB of this process that no other shares (proportional share of what others do), its children included."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            total += proportional(Path("/proc") / child)
    return (total + proportional(Path("/proc/self"))) / 1024


def proportional(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure(folder: Path, case: Case, workers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians per contender: images/s, MiB, and how many times as fast `ours` was within each round."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = set(allowed[: max(1, workers)])
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, make in contenders(case, workers).items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, make, folder, case, workers, cores))
        process.start()
        there.close()
        if answer(here) is None:
            print(f"{case.name}: {name} did not start and is left out", flush=True)
            process.kill()
        else:
            running[name] = here, process
    seconds: dict[str, list[float]] = {name: [] for name in running}
    resident: dict[str, float] = {}
    for turn in range(rounds):
        for name in sorted(running, key=lambda n: hashlib.sha256(f"{turn}{n}".encode()).digest()):
            running[name][0].send(case.images)
            found = answer(running[name][0])
            if found is None:
                raise SystemExit(f"error: {case.name}: {name} hangs or has ended in round {turn}")
            seconds[name].append(found[0])
            resident[name] = found[1]
    for here, process in running.values():
        here.send(None)
        answer(here)
        process.join(30)
        process.kill()
    return {
        name: {
            "images_per_second": statistics.median(case.images / s for s in seconds[name]),
            "ratio": statistics.median(other / own for other, own in zip(seconds[name], seconds["ours"], strict=True)),
            "memory_mib": resident[name],
        }
        for name in running
    }


def stages(folder: Path, case: Case) -> dict[str, float]:
    """Microseconds per image of our reader, stage by stage, one thread."""
    data = open_dataset(str(folder / "tar"), in_memory=False)
    data.read(range(len(data)))
    begin = time.perf_counter()
    order = EpochOrder(data.shard_samples, 0, 0, STREAMS, BATCH, BLOCK_SHARDS)
    batches = [order.batch(step) for step in range(order.steps)]
    ordered = time.perf_counter()
    where, files = np.cumsum(data.shard_samples), []
    for ids in batches:
        for sample in ids.tolist():
            shard = int(np.searchsorted(where, sample, side="right"))
            index, place = data._shards.index(shard), sample - int(where[shard])
            files.append(data._shards.file(shard).read(int(index.size[place]), int(index.offset[place])))
    fetched = time.perf_counter()
    row = np.empty((case.side, case.side, case.channels), np.uint8)
    for content in files:
        simplejpeg.decode_jpeg(content, "RGB", buffer=row)
    opened = time.perf_counter()
    for ids in batches:
        data.read(ids)
    whole = time.perf_counter()
    names = ("order", "read", "decode", "all of read()")
    moments = (begin, ordered, fetched, opened, whole)
    return {n: (b - a) / len(files) * 1e6 for n, a, b in zip(names, moments, moments[1:], strict=False)}


def mixing() -> dict[str, float]:
    """Largest correlation of a sample's place in the manifest with its place in the epoch, over 8 epochs."""
    found = {}
    for shards in ((2500,) * 2, (1000,) * 64, (500,) * 400):
        worst = 0.0
        for epoch in range(8):
            order = EpochOrder(shards, 0, epoch, STREAMS, BATCH, BLOCK_SHARDS)
            ids = np.stack([order.batch(step) for step in range(order.steps)])
            places = np.repeat(np.arange(order.steps), BATCH)
            worst = max(worst, abs(float(np.corrcoef(ids.ravel(), places)[0, 1])))
        found[f"{len(shards)} shards of {shards[0]}"] = worst
    return found


def table(case: Case, processes: str, results: dict[str, dict[str, float]]) -> str:
    """Markdown of one measurement."""
    lines = [
        f"\n{case.name}, {processes}\n",
        "| reader | images/s | ours is … times as fast | memory MiB |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=lambda item: -item[1]["images_per_second"]):
        lines.append(f"| {name} | {row['images_per_second']:,.0f} | {row['ratio']:.2f} | {row['memory_mib']:.0f} |")
    return "\n".join(lines)


def machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    versions = {}
    for name in ("torch", "numpy", "webdataset", "simplejpeg", "pillow", "mosaicml-streaming", "litdata"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return (
        f"{model.split(':')[1].strip()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), "
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64x64 JPEG in one process only, within 3 minutes")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per measurement")
    parser.add_argument("--record", action="store_true", help=f"append the results to {RESULTS.name}")
    options = parser.parse_args()
    rounds = min(options.rounds, 5) if options.quick else options.rounds
    report = [f"\n## Data, {time.strftime('%Y-%m-%d')}\n\n{machine()}. Medians of {rounds} rounds."]
    folder = Path(tempfile.mkdtemp(prefix="vaegan-bench-"))
    os.environ["VAEGAN_CACHE"] = str(folder / "cache")
    headline: dict[str, dict[str, float]] = {}
    try:
        for case in CASES[:1] if options.quick else CASES:
            write_all(folder / case.name, case)
            for workers in (0,) if options.quick else (0, 2):
                results = measure(folder / case.name, case, workers, rounds)
                report.append(
                    table(case, f"{workers} reader processes" if workers else "one process, one core", results)
                )
                print(report[-1], flush=True)
                if case is CASES[0] and not workers:
                    headline = results
        costs = ", ".join(f"{name} {cost:.1f}" for name, cost in stages(folder / CASES[0].name, CASES[0]).items())
        report.append(f"\nOur stages, jpeg64, µs per image: {costs}.")
        correlations = ", ".join(f"{name}: {value:.4f}" for name, value in mixing().items())
        report.append(f"\nLargest position correlation of the order in 8 epochs: {correlations}.")
        print("\n".join(report[-2:]), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(report) + "\n")
    peers = ("webdataset_pillow", "webdataset_simplejpeg", "mosaicml_streaming", "litdata")
    summary: dict[str, float | None] = {
        f"speed_vs_{name}": round(headline[name]["ratio"], 3) if name in headline else None for name in peers
    }
    summary["images_per_second"] = round(headline["ours"]["images_per_second"], 1)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
