"""A report as a table for people."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table

# Section, key, what a reader calls it, unit.
ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("generation", "fid", "FID", ""),
    ("generation", "kid", "KID", ""),
    ("generation", "precision", "precision", ""),
    ("generation", "recall", "recall", ""),
    ("generation", "density", "density", ""),
    ("generation", "coverage", "coverage", ""),
    ("labels", "divergence", "label divergence", "nats"),
    ("reconstruction", "rfid", "rFID", ""),
    ("reconstruction", "mse", "MSE", "on [0, 1]"),
    ("reconstruction", "psnr", "PSNR", "dB"),
    ("reconstruction", "ssim", "SSIM", ""),
    ("reconstruction", "ms_ssim", "MS-SSIM", ""),
    ("reconstruction", "lpips", "LPIPS", ""),
    ("likelihood", "rate", "rate", "nats/image"),
    ("likelihood", "distortion", "distortion", "nats/image"),
    ("likelihood", "elbo", "evidence bound", "nats/image"),
    ("likelihood", "importance_bound", "importance-weighted bound", "nats/image"),
    ("likelihood", "elbo_bits_per_dim", "evidence bound", "bits/dim"),
    ("likelihood", "importance_bound_bits_per_dim", "importance-weighted bound", "bits/dim"),
    ("latent", "active_units", "active units", ""),
    ("latent", "aggregate_kl", "aggregate posterior to prior", "nats"),
    ("latent", "aggregate_variance", "aggregate variance", ""),
    ("latent", "mig", "MIG of the labels", ""),
)


def table(reports: dict[str, dict[str, Any]]) -> Table:
    """A column for each report, by its name. Reports of different feature networks do not belong into one table."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("")
    for name in reports:
        made.add_column(name, justify="right")
    made.add_column("", style="dim")
    for section, key, label, unit in ROWS:
        values = [report.get(section, {}).get(key) for report in reports.values()]
        if any(value is not None for value in values):
            made.add_row(label, *map(number, values), unit)
    return made


def notes(report: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers: pictures, network, floor, and what is missing."""
    data, generation = report["data"], report["generation"]
    lines = [f"{data['pictures']:,} pictures of the split {data['split']}, {generation['samples']:,} samples"]
    if features := report.get("features"):
        accuracy = f", accuracy {features['accuracy']:.4f}" if features["accuracy"] is not None else ""
        first, second = features["fid_floor_pictures"]
        lines.append(
            f"FID by {features['network']} ({features['hash']}{accuracy}), {features['dims']} features; real against "
            f"real {number(features['fid_floor'])} ({first:,} against {second:,}, {features['fid_floor_of']})"
        )
    likelihood = report["likelihood"]
    lines.append(f"likelihood {likelihood['kind']}, weight {likelihood['weight']:g}")
    return lines + [f"no {name}: {why}" for name, why in report.get("missing", {}).items()]


def text(reports: dict[str, dict[str, Any]], width: int = 120) -> str:
    """The table and the notes on the first report, without colours."""
    file = io.StringIO()
    Console(width=width, no_color=True, file=file).print(table(reports))
    return "\n".join([file.getvalue().rstrip(), "", *notes(next(iter(reports.values())))]) + "\n"


def number(value: float | int | None) -> str:
    """Four significant digits; a dash for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"
