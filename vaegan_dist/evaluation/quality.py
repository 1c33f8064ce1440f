"""How close reconstructions come: MSE, PSNR, SSIM, MS-SSIM and LPIPS, as sums that ranks add up."""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.ranks import Ranks

SSIM_WINDOW: Final = 11
MS_SSIM_SIDE: Final = (SSIM_WINDOW - 1) * 2**4 + 1
LPIPS_SIDE: Final = 35
ALEXNET_URL: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class Reconstruction:
    """Adds up what is measured of pairs of pictures, in float64.

    Pictures count on [0, 1]; PSNR is that of the mean squared error over all pictures; SSIM and MS-SSIM are means over
    pictures (Wang et al. 2004 and 2003: Gaussian window of 11, deviation 1.5).
    """

    def __init__(self, height: int, width: int, device: torch.device, lpips: "Lpips | None" = None) -> None:
        self.lpips = lpips
        self.names = ["mse"]
        self.missing: dict[str, str] = {}
        self._offer("ssim", min(height, width) >= SSIM_WINDOW, f"pictures are smaller than {SSIM_WINDOW} pixels")
        self._offer("ms_ssim", min(height, width) >= MS_SSIM_SIDE, f"pictures are smaller than {MS_SSIM_SIDE} pixels")
        self._offer("lpips", lpips is not None, f"no backbone: fetch {ALEXNET_URL} and give --lpips FILE")
        self.sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)

    def _offer(self, name: str, possible: bool, otherwise: str) -> None:
        if possible:
            self.names.append(name)
        else:
            self.missing[name] = otherwise

    def add(self, x: Tensor, x_rec: Tensor) -> None:
        """Pictures `[b, C, H, W]` in [-1, 1] and their reconstructions."""
        real, made = ((image.float().clamp(-1, 1) + 1) / 2 for image in (x, x_rec))
        values = {"mse": (made - real).double().square().flatten(1).mean(1)}
        # Imported here: it takes a second, and training alone has no use for it.
        from torchmetrics.functional import image as similarity

        if "ssim" in self.names:
            found = similarity.structural_similarity_index_measure(made, real, data_range=1.0, reduction="none")
            assert isinstance(found, Tensor)
            values["ssim"] = found
        if "ms_ssim" in self.names:
            values["ms_ssim"] = similarity.multiscale_structural_similarity_index_measure(
                made, real, data_range=1.0, reduction="none"
            )
        if self.lpips is not None:
            values["lpips"] = self.lpips(x, x_rec)
        sums = [values[name].double().sum() for name in self.names]
        self.sums += torch.stack([*sums, self.sums.new_tensor(len(x))])

    def finish(self, ranks: Ranks) -> dict[str, float | None]:
        """Means over all ranks; a collective. None for what cannot be measured."""
        *sums, count = ranks.sum(self.sums).tolist()
        means: dict[str, float | None] = {name: total / count for name, total in zip(self.names, sums, strict=True)}
        mse = means["mse"] or 0.0
        psnr = float(10 * torch.log10(1 / torch.tensor(mse, dtype=torch.float64))) if mse else None
        order = ("ssim", "ms_ssim", "lpips")
        return {"mse": mse, "psnr": psnr, **{name: means.get(name) for name in order}}


class Lpips(nn.Module):
    """LPIPS 0.1 on AlexNet (Zhang et al. 2018, arXiv 1801.03924): the backbone from a file, the learned weights from
    torchmetrics' package.

    Written out because every library's needs torchvision.
    """

    TAPS: Final = (1, 4, 7, 9, 11)
    shift: Tensor
    scale: Tensor

    def __init__(self, file: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        try:
            weights = torch.load(Path(file).expanduser(), map_location="cpu", weights_only=True)
            prefix = "features."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            self.backbone.load_state_dict(own)
        except Exception as error:  # a damaged or foreign file raises anything
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--lpips {file}: does not hold AlexNet's weights: {reason}; fetch {ALEXNET_URL}, or leave --lpips out"
            ) from None
        import torchmetrics

        package = Path(torchmetrics.__file__).parent
        learned = package / "functional" / "image" / "lpips_models" / "alex.pth"
        heads = torch.load(learned, map_location="cpu", weights_only=True)
        self.heads = nn.ParameterList([heads[f"lin{number}.model.1.weight"] for number in range(len(self.TAPS))])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: Tensor, x_rec: Tensor) -> Tensor:
        """Distances `[B]` of pictures in [-1, 1]."""
        pairs = zip(self._features(x), self._features(x_rec), self.heads, strict=True)
        return sum(
            (F.conv2d((one - other).square(), head).mean((1, 2, 3)) for one, other, head in pairs),
            start=torch.zeros(len(x), device=x.device),
        )

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x.float().clamp(-1, 1).expand(-1, 3, -1, -1) - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.backbone):
            x = layer(x)
            if number in self.TAPS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def open_lpips(file: str | None, height: int, width: int, device: torch.device) -> Lpips | None:
    """LPIPS with the backbone in a file; None without one.

    Raises:
        InputError: the file is not AlexNet, or pictures are too small for it.
    """
    if not file:
        return None
    if min(height, width) < LPIPS_SIDE:
        raise InputError(
            f"--lpips: pictures of {width}x{height} are smaller than the {LPIPS_SIDE} pixels that it needs"
        )
    return Lpips(file).to(device)
