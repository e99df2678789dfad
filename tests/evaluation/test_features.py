"""Extractors: Inception with weights of a file, functions of the user's own, and what is said where something is
missing.
"""

import urllib.error

import pytest
import torch
from helpers import seed
from torch import nn

import hvae_ebm_prior.evaluation.features as features_module
from hvae_ebm_prior.evaluation.features import custom_extractor, extract, inception_extractor, to_rgb_bytes
from hvae_ebm_prior.saving.digest import digest_images, digest_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights with the names and shapes of Inception's, read off torch-fidelity's network."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"

    def write(inception):
        if not path.exists():
            with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
                patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
                patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
                shapes = inception.FeatureExtractorInceptionV3("any", ["2048"]).state_dict()
            generator = seed(0)
            made = {}
            for name, value in shapes.items():
                if value.ndim > 1:
                    made[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
                else:
                    made[name] = (
                        torch.zeros(value.shape, dtype=value.dtype)
                        if "bias" in name or "mean" in name
                        else torch.ones(value.shape)
                    )
            torch.save(made, path)
        return path

    return write


@pytest.fixture
def inception(torch_fidelity):
    return features_module.fidelity("feature_extractor_inceptionv3")


def test_inception_is_torch_fidelitys(inception, weights, monkeypatch):
    path = weights(inception)
    extractor = inception_extractor(path)
    images = torch.rand(2, 1, 20, 20, generator=seed(0))
    found, logits = extract(extractor, images, CPU)
    network = inception.FeatureExtractorInceptionV3(
        "any", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )
    pixels = torch.tensor([round(255 * p) for p in images.flatten().tolist()], dtype=torch.uint8).reshape(2, 1, 20, 20)
    expected = network(torch.cat((pixels, pixels, pixels), dim=1))
    assert found.shape == (2, 2048)
    assert torch.equal(found, expected[0])
    assert torch.equal(logits, expected[1])
    # Only the published weights make it an FID.
    assert extractor.distance == "FD"
    assert "other weights" in extractor.name
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", features_module.digest_file(path))
    assert inception_extractor(path).distance == "FID"


def test_offline_the_error_names_the_file_and_where_to_put_it(inception, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no route to host") as caught:
        inception_extractor()
    said = str(caught.value)
    assert inception.URL_INCEPTION_V3 in said
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in said
    assert "--weights path/to/weights-inception-2015-12-05-6726825d.pth" in said
    with pytest.raises(
        FileNotFoundError, match=r"no file nowhere\.pth; it should be weights-inception-2015-12-05-6726825d\.pth"
    ):
        inception_extractor("nowhere.pth")


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_hold_other_things_are_refused_and_never_run(inception, tmp_path, capsys):
    for content in ({"fc.weight": torch.zeros(2)}, Trap(), [1]):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception weights"):
            inception_extractor(tmp_path / "bad.pth")
    assert "code ran" not in capsys.readouterr().out


def test_pixels_are_rounded_to_the_nearest_level():
    levels = torch.arange(256).float().reshape(1, 1, 16, 16) / 255
    assert torch.equal(
        to_rgb_bytes(levels), torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    )
    assert to_rgb_bytes(torch.full((1, 3, 1, 1), 100.4 / 255)).unique().tolist() == [100]
    with pytest.raises(ValueError, match=r"1 or 3 channels, \(N, C, H, W\), got \(1, 2, 4, 4\)"):
        to_rgb_bytes(torch.zeros(1, 2, 4, 4))


def test_names_and_digests_of_functions():
    class Tap(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def features(self, images):
            return images.flatten(1)

    module = Tap()
    assert custom_extractor("folder/mine.py:make", module.features).digest == digest_weights(module)
    assert (
        custom_extractor("folder/mine.py:make", module.features).name
        == custom_extractor("mine.py:make", module).name
        == "mine:make"
    )
    assert custom_extractor("a.b:make", lambda x: x.flatten(1)).digest is None
    assert not module.training
    before = digest_weights(module)
    module.weight.data[0] = 2
    assert digest_weights(module) != before
    with pytest.raises(TypeError, match="a.b:make to return a function of images"):
        custom_extractor("a.b:make", 3)
    assert digest_images(torch.zeros(1, 1, 2, 2)) != digest_images(torch.zeros(2, 1, 2, 1))


def test_extraction_goes_by_chunks_and_checks_shapes():
    images = torch.rand(7, 1, 2, 2)
    found, logits = extract(lambda x: (x.flatten(1).double(), x.flatten(1)[:, :3]), images, CPU, chunk_size=3)
    assert torch.equal(found, images.flatten(1))
    assert torch.equal(logits, images.flatten(1)[:, :3])
    sizes = []
    extract(lambda x: sizes.append(len(x)) or x.flatten(1), torch.rand(60, 1, 2, 2), CPU)
    assert sizes == [25, 25, 10]
    for bad in (lambda x: x, lambda x: x.flatten(), lambda x: (x.flatten(1), 3), lambda x: x.flatten(1)[:1]):
        with pytest.raises(ValueError, match="features: expected a matrix"):
            extract(bad, images, CPU)
