"""What a person needs to know after a run has failed, below the one line that says why."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from vaegan_dist.config import Config
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.records import Record, integer, text
from vaegan_dist.training.checkpoint import newest_whole
from vaegan_dist.training.remote import standing
from vaegan_dist.training.resume import run_folder


class Aftermath:
    """Passes a run's records on; adds to its failure how far it came, what stands, and how to continue."""

    def __init__(self, config: Config, on_record: Callable[[Record], None]) -> None:
        self.config, self.on_record = config, on_record
        self.reached, self.phase = 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A wrong configuration or input is one line: nothing has been trained.
        if isinstance(error, VaeganError) and error.exit_code == VaeganError.exit_code:
            try:
                error.add_note(self.block())
            except (VaeganError, OSError) as trouble:
                error.add_note(f"  checkpoint   unknown: {trouble}")

    def note(self, record: Record) -> None:
        """A record of the run."""
        self.on_record(record)
        self.reached = integer(record, "images_seen") or self.reached
        self.phase = text(record, "phase") or self.phase

    def block(self) -> str:
        """Those lines."""
        folder = run_folder(self.config)
        found = self._stands()
        again = max(self.reached - found[1], 0) if found else self.reached
        rows = [("run", f"{self.config.run.name}, in {self.config.run.storage}")]
        if self.reached:
            where = f", phase {self.phase}" if self.phase else ""
            rows.append(("reached", f"{self.reached:,} of {self.config.total_images:,} images{where}"))
        if found is not None:
            rows.append(("checkpoint", f"{found[0]}, whole; {again:,} images are done again"))
            rows.append(("to continue", "the same command again, once the cause above is mended"))
        else:
            rows.append(("checkpoint", "none stands yet; the same command starts the run again"))
        history = folder / "history.jsonl"
        if history.exists():
            rows.append(("history", str(history)))
        return "\n".join(f"  {name:12} {value}" for name, value in rows)

    def _stands(self) -> tuple[str, int] | None:
        """Where the newest whole checkpoint stands, and its images; None without one."""
        if is_remote(self.config.run.storage):
            return standing(self.config)
        found, _ = newest_whole(run_folder(self.config))
        return (str(found.path), found.progress.images_seen) if found else None
