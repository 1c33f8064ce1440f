"""The work of a preparation: pictures are decoded, fitted and encoded in threads and written to shards in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vaegan_dist.data.images import (
    Decoded,
    Encoding,
    PictureError,
    Target,
    decode,
    encode,
    from_array,
    is_grey,
    normalise,
    parse_colour,
)
from vaegan_dist.data.manifest import Layout, ShardInfo
from vaegan_dist.data.plan import SplitPlan
from vaegan_dist.data.prepare_options import PrepareOptions
from vaegan_dist.data.shard_writer import CHUNK, Broken, Finished, Journal, Ready, ShardWriter
from vaegan_dist.data.sources_base import Raw
from vaegan_dist.errors import InputError

CHUNKS_UP_TO_PIXELS = 48 * 48  # a tar member costs 1 KiB and a decoder call: above this size that no longer dominates
PROBED = 64

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Recipe:
    """What each picture is turned into."""

    target: Target
    height: int
    width: int
    layout: Layout
    encoding: Encoding
    quality: int
    guessed: bool
    """the number of channels was guessed from the first pictures"""


def make_recipe(options: PrepareOptions, plan: SplitPlan) -> Recipe:
    """Fix size and channels of the data set, looking at its first pictures where the options leave them open."""
    height = width = options.resolution or 0
    channels = options.channels
    if channels is None or not height:
        probed = [decoded.image for decoded in islice(_good(plan, options.resolution), PROBED)]
        if not probed:
            raise InputError(f"{options.source}: not one of its {len(plan)} pictures can be read; check the source")
        channels = channels or (1 if all(map(is_grey, probed)) else 3)
        height, width = (height, width) if height else (probed[0].height, probed[0].width)
    layout = options.layout
    if layout == "auto":
        layout = "chunks" if height * width <= CHUNKS_UP_TO_PIXELS else "files"
    target = Target(options.resolution, options.crop, parse_colour(options.background), channels)
    return Recipe(target, height, width, layout, options.encoding, options.quality, options.channels is None)


def _good(plan: SplitPlan, resolution: int | None) -> Iterator[Decoded]:
    for index in plan.order:
        try:
            yield _decode(plan.part.read(int(index)), resolution)
        except PictureError:
            continue  # it is named and counted when its turn comes


def _decode(raw: Raw, resolution: int | None) -> Decoded:
    return decode(raw, resolution) if isinstance(raw, bytes) else from_array(raw)


class Work:
    """The writing of all splits: what they share."""

    def __init__(
        self, options: PrepareOptions, recipe: Recipe, output: Path, journal: Journal, progress: Progress, total: int
    ) -> None:
        self.options, self.recipe, self.output, self.journal = options, recipe, output, journal
        self.progress, self.total, self.done = progress, total, 0
        self.broken: list[Broken] = []

    def write(self, plan: SplitPlan) -> list[ShardInfo]:
        """Write the shards of a split that are not there yet; returns all of them."""
        finished = list(self.journal.finished(plan.split))
        shards = [item.shard for item in finished]
        start = finished[-1].end if finished else 0
        for item in finished:
            self._count_broken(item.broken)
        self._advance(start)
        folder = self.output / plan.split
        folder.mkdir(exist_ok=True)
        results = self._pictures(plan, start)
        try:
            while (made := self._shard(plan, results, start, folder, len(shards))) is not None:
                self.journal.add(plan.split, made)
                shards.append(made.shard)
                start = made.end
        finally:
            results.close()
        if not shards:
            raise InputError(f"{self.options.source}: no picture of the split '{plan.split}' can be read; check them")
        return shards

    def _shard(
        self, plan: SplitPlan, results: Iterator[Ready | Broken], start: int, folder: Path, number: int
    ) -> Finished | None:
        """Write the next shard; None when no good picture is left."""
        broken: list[Broken] = []
        with ShardWriter(folder / f"shard-{number:06d}.tar", self.recipe.layout) as shard:
            for end, result in enumerate(results, start + 1):
                self._advance(1)
                if isinstance(result, Broken):
                    broken.append(result)
                    self._count_broken([result])
                    continue
                shard.add(result)
                if shard.samples >= self.options.shard_samples or shard.bytes >= self.options.shard_bytes:
                    return Finished(shard.finish(shard.path.name), end, tuple(broken))
            return Finished(shard.finish(shard.path.name), len(plan), tuple(broken)) if shard.samples else None

    def _count_broken(self, broken: Sequence[Broken]) -> None:
        self.broken.extend(broken)
        if len(self.broken) > self.options.max_bad:
            named = "; ".join(f"{item.name}: {item.cause}" for item in self.broken[-3:])
            raise InputError(
                f"{self.options.source}: {len(self.broken)} broken pictures, max_bad allows {self.options.max_bad} "
                f"({named}); repair or remove them, or raise --max-bad, and run the command again"
            )

    def _advance(self, pictures: int) -> None:
        self.done += pictures
        self.progress(self.done, self.total)

    def _pictures(self, plan: SplitPlan, start: int) -> Generator[Ready | Broken, None, None]:
        """Results in the plan's order from a position on; a bounded number of pictures is in work at a time."""
        workers = self.options.workers or len(os.sched_getaffinity(0))
        step = CHUNK if self.recipe.layout == "chunks" else 16
        tasks = iter(range(start, len(plan), step))
        pool = ThreadPoolExecutor(workers, "prepare")
        waiting: deque[Future[list[Ready | Broken]]] = deque()
        try:
            for task in islice(tasks, 3 * workers):
                waiting.append(pool.submit(self._batch, plan, task, step))
            while waiting:
                done = waiting.popleft().result()
                for task in islice(tasks, 1):
                    waiting.append(pool.submit(self._batch, plan, task, step))
                yield from done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, plan: SplitPlan, start: int, step: int) -> list[Ready | Broken]:
        return [make_picture(plan, int(index), self.recipe) for index in plan.order[start : start + step]]


def make_picture(plan: SplitPlan, index: int, recipe: Recipe) -> Ready | Broken:
    """Read, fit and encode one picture.

    Raises:
        InputError: it is whole, but does not fit what was fixed for the data set.
    """
    target, name = recipe.target, printable(plan.part.names[index])
    try:
        decoded = _decode(plan.part.read(index), target.resolution)
        image = decoded.image
        pixels = normalise(image, target)
    except PictureError as error:
        return Broken(name, printable(str(error)))
    if recipe.guessed and target.channels == 1 and not is_grey(image):
        raise InputError(f"{name}: has colour, the first {PROBED} pictures are grey; set --channels to 1 or 3")
    if pixels.shape[:2] != (recipe.height, recipe.width):
        raise InputError(
            f"{name}: {pixels.shape[1]}x{pixels.shape[0]} pixels, others have {recipe.width}x{recipe.height}; "
            "set --resolution"
        )
    label = None if plan.labels is None else int(plan.labels[index])
    key = plan.keys[index]
    if recipe.layout == "chunks":
        return Ready(key, label, "npy", pixels)
    kept = decoded.jpeg if recipe.encoding == "jpeg" and _fits(decoded, recipe) else None
    content = kept or encode(pixels, recipe.encoding, recipe.quality)
    return Ready(key, label, "jpg" if recipe.encoding == "jpeg" else "png", content)


def _fits(decoded: Decoded, recipe: Recipe) -> bool:
    mode = "L" if recipe.target.channels == 1 else "RGB"
    return decoded.image.size == (recipe.width, recipe.height) and decoded.image.mode == mode


def printable(text: str) -> str:
    """Text that fits on one line whatever a file is called."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )
