"""A sweep whose storage is a URL: what its report needs comes to this machine, and its results go to the store."""

from pathlib import Path

from vaegan_dist.files import write_whole
from vaegan_dist.sweeps.journal import FILE, StoreJournal
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.report import FILE as REPORT
from vaegan_dist.sweeps.result import BEST, best_trial
from vaegan_dist.sweeps.trial import TRIALS
from vaegan_dist.training.checkpoint import BrokenCheckpointError, newest_whole
from vaegan_dist.training.remote import SMALL_BYTES, RemoteRun, remote_run

# What the report shows of a trial or links to.
SHOWN = ("samples.png", "reconstructions.png", "curves.png")


def gather(plan: Plan) -> None:
    """Put the trials' pictures, and the winner's checkpoint and history, into the sweep's folder on this machine.

    Raises:
        InputError, DataError: the store cannot be read.
    """
    remote = remote_run(plan.config)
    if remote is None:
        return
    best = best_trial(plan)
    names = [name for name in remote.objects.sizes(TRIALS) if name.count("/") == 2 and name.endswith(SHOWN)]
    if best is not None:
        trial = f"{TRIALS}/{best.name}"
        source = RemoteRun(f"{remote.url}/{trial}", plan.folder / trial)
        _fetch_newest(source)
        names.append(f"{trial}/history.jsonl")
    for name, content in zip(names, remote.objects.many(names, SMALL_BYTES), strict=True):
        path = plan.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _fetch_newest(source: RemoteRun) -> None:
    for name in source.drop_others():  # an earlier start may have left others, under the same name too
        try:
            source.fetch(name)
        except BrokenCheckpointError:
            continue  # as in a folder: the one before it, then
        return


def publish(plan: Plan) -> None:
    """Upload the results: table, report, pictures, a copy of the ledger, and best/, whose checkpoint is sealed last.

    Raises:
        InputError, DataError: the store cannot be written.
    """
    remote = remote_run(plan.config)
    if remote is None:
        return
    write_whole(plan.folder / FILE, b"".join(line + b"\n" for line in StoreJournal(remote).read()))
    pictures = sorted((plan.folder / "pictures").glob("*.png"))
    for path in (plan.folder / FILE, plan.folder / "sweep.json", plan.folder / "sweep.csv", *pictures):
        remote.objects.upload(path.relative_to(plan.folder).as_posix(), path)
    if (plan.folder / BEST).exists():
        _publish_best(remote, plan.folder / BEST)
    remote.objects.upload(REPORT, plan.folder / REPORT)


def _publish_best(remote: RemoteRun, folder: Path) -> None:
    best = RemoteRun(f"{remote.url}/{BEST}", folder)
    best.take_over()
    found, _ = newest_whole(folder)
    if found is None:
        best.push_rest()
    else:
        best.replace(found.path)
