"""The model card: README.md of an exported model, with the front matter that model hubs read."""

import json
from pathlib import Path
from typing import Any, Final

import yaml

from vaegan_dist.evaluation.table import number
from vaegan_dist.use.model import Model

LOADING: Final = {
    "safetensors": """```python
import vaegan_dist

model = vaegan_dist.load("{folder}")
x = model.sample(64, seed=0)    # pictures [64, {shape}] in [-1, 1]
z = model.encode(x)             # latents [64, {latent}]
x = model.decode(z)
```""",
    "diffusers": """```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{folder}")
z = vae.encode(x).latent_dist.mean    # x: pictures [B, {shape}] in [-1, 1]
x = vae.decode(z).sample
```""",
    "onnx": """```python
import onnxruntime

encoder = onnxruntime.InferenceSession("{folder}/encoder.onnx")
decoder = onnxruntime.InferenceSession("{folder}/decoder.onnx")
mu, logvar = encoder.run(None, {{"x": x}})    # x: float32 [B, {shape}] in [-1, 1]
(x,) = decoder.run(None, {{"z": mu}})
```""",
}
# Section and key of a report -> the metric's name, and its type at model hubs.
METRICS: Final = (
    ("generation", "fid", "FID", "fid"),
    ("reconstruction", "rfid", "reconstruction FID", "fid"),
    ("reconstruction", "psnr", "PSNR", "psnr"),
    ("reconstruction", "ssim", "SSIM", "ssim"),
    ("likelihood", "elbo_bits_per_dim", "evidence bound, bits per dimension", "bits_per_dim"),
)


def model_card(model: Model, kind: str, folder: Path) -> str:
    """Markdown with YAML front matter: data, preset, metrics, pictures, licence to fill in, how to load.

    Args:
        kind: the format of the export.
        folder: where it stands; pictures there are shown.
    """
    report = _report(model)
    front = _front_matter(model, kind, folder.name, report)
    config, image = model.config, model.image
    shape = f"{image.channels}, {image.height}, {image.width}"
    latent = ", ".join(map(str, model.latent_shape))
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {folder.name}", ""]
    lines += [
        f"A VAE-GAN for pictures of {image.width}x{image.height}x{image.channels} with latents [{latent}], trained "
        f"with vaegan_dist on `{Path(config.data.path).name}` for {model.images_seen:,} images "
        f"({'the moving average of its weights' if model.weights == 'ema' else 'its last weights'}).",
        "",
        f"Preset: {config.preset or 'none'}. Phases: "
        + ", ".join(f"{phase.name} ({phase.objective}, {phase.images:,} images)" for phase in config.phases)
        + ".",
        "",
    ]
    for name in ("samples", "reconstructions"):
        if (folder / f"{name}.png").exists():
            lines += [f"![{name}]({name}.png)", ""]
    lines += ["## Use", "", LOADING[kind].format(folder=folder.name, shape=shape, latent=latent), ""]
    lines += ["## Metrics", "", *_metrics(report), ""]
    lines += ["## Licence", "", "Fill in a licence that the training data allow, here and in `license` above.", ""]
    return "\n".join(lines)


def _report(model: Model) -> dict[str, Any] | None:
    """The report of `vaegan-dist evaluate` on these very weights, where one lies in the run."""
    for path in sorted(model.source.parent.glob("evaluations/*/evaluation.json")):
        report: dict[str, Any] = json.loads(path.read_text())
        found = report["model"]
        if found["images_seen"] == model.images_seen and found["weights"] == model.weights:
            return report
    return None


def _front_matter(model: Model, kind: str, name: str, report: dict[str, Any] | None) -> dict[str, Any]:
    data = Path(model.config.data.path).name
    front: dict[str, Any] = {
        "license": "other",
        "library_name": {"diffusers": "diffusers", "onnx": "onnx"}.get(kind, "vaegan_dist"),
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["vae-gan", "vae", "gan", "autoencoder", model.config.model.network],
        "datasets": [data],
    }
    if report is not None:
        values = [(label, type_, report[section].get(key)) for section, key, label, type_ in METRICS]
        known = [{"name": label, "type": type_, "value": value} for label, type_, value in values if value is not None]
        front["metrics"] = sorted({metric["type"] for metric in known})
        result = {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"name": data, "type": data, "split": report["data"]["split"]},
            "metrics": known,
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return front


def _metrics(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return ["Not evaluated yet: run `vaegan-dist evaluate`, then export again."]
    lines = ["| metric | value |", "|---|---|"]
    for section, key, label, _ in METRICS:
        if (value := report[section].get(key)) is not None:
            lines.append(f"| {label} | {number(value)} |")
    if features := report.get("features"):
        lines += [
            "",
            f"FID with the feature network {features['network']} ({features['hash']}), "
            f"{report['generation']['samples']:,} samples against {features['real_pictures']:,} pictures; real against "
            f"real {number(features['fid_floor'])}. Numbers of other networks or counts cannot be compared.",
        ]
    return lines
