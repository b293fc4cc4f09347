"""Networks: sizes, names, initial weights, the published layout."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from heterosync.errors import UserError
from heterosync.models import Classifier as Net
from heterosync.models import MMoE, build_encoder, resolved_weights
from heterosync.models.mechanism import mechanism
from heterosync.models.published import from_published, load_published, to_published
from heterosync.training.settings import TrainingSettings


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def tiny() -> MMoE:
    torch.manual_seed(0)
    return MMoE("resnet_tiny").eval()


def images(n: int = 4, size: int = 32, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts():  # G14
    assert count(Net()) == 11_177_025
    model = MMoE()
    assert count(model) == 23_723_650
    assert count(model.encoders) == 2 * 11_439_168
    assert count(model.skips) == 2 * 16_416
    assert count(model.experts) == 786_792
    assert count(model.gates) == 24_600
    assert count(model.towers) == 2 * 545
    assert count(resnet18(weights=None)) == 11_689_512


def test_state_names_are_torchvisions():  # G15
    names = list(Net().state_dict())
    norm = [n for n, m in Net().named_modules() if isinstance(m, nn.BatchNorm2d)]
    tensors = [n for n in names if n.rsplit(".", 1)[0] in norm]
    assert (len(names), len(tensors), sum("bn" in n for n in tensors)) == (122, 100, 85)
    assert [n.removeprefix("net.") for n in names] == list(resnet18(weights=None).state_dict())


def test_tiny_has_width_8_and_batchnorm():
    net = build_encoder("resnet_tiny")
    assert [net.layer1[0].conv1.out_channels, net.layer4[0].conv2.out_channels, net.fc.out_features] == [8, 64, 64]
    assert net.layer1[0].downsample is None
    assert count(MMoE("resnet_tiny")) < 400_000


def test_logits_are_stable_and_shaped(tiny):
    primary, anchor = tiny(images(5), images(5, seed=1))
    assert primary.shape == anchor.shape == (5,)
    assert Net("resnet_tiny")(images(3)).shape == (3,)
    with torch.no_grad():
        nn.init.constant_(tower_bias := tiny.towers[0].fc2.bias, 200.0)
    logit, _ = tiny(images(2), images(2))
    loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(2))
    assert 150 < loss.item() < 250  # a sigmoid would have lost this
    nn.init.zeros_(tower_bias)


@pytest.mark.parametrize("device_dtype", [torch.bfloat16])
def test_autocast_gives_float32_logits(tiny, device_dtype):
    with torch.autocast("cpu", device_dtype):
        a, b = tiny(images(), images())
        c = Net("resnet_tiny")(images())
    assert a.dtype == b.dtype == c.dtype == torch.float32
    exact, _ = tiny(images(), images())
    assert (a - exact).abs().max() < 0.05


def test_scores_in_bfloat16_are_not_tied(tiny):
    torch.manual_seed(0)
    x, net = images(200), Net("resnet_tiny").eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert net.net.layer1(net.net.relu(net.net.bn1(net.net.conv1(x)))).dtype == torch.bfloat16
        for scores in (torch.sigmoid(net(x)), torch.sigmoid(tiny(x, x)[0])):
            assert len(scores.unique()) > 190


def test_grey_encoder_answers_as_its_rgb_copy():
    torch.manual_seed(3)
    rgb = build_encoder("resnet_tiny").eval()
    torch.manual_seed(3)
    grey = build_encoder("resnet_tiny", channels=1).eval()
    x = images(2, channels=1)
    torch.testing.assert_close(grey(x), rgb(x.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)


def test_weights_from_a_file(tmp_path):
    state = resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "ok.pth")
    net = build_encoder("resnet18", weights=str(tmp_path / "ok.pth"))
    assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    grey = build_encoder("resnet18", channels=1, weights=str(tmp_path / "ok.pth"))
    torch.testing.assert_close(grey.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))


def test_auto_weights_without_cache_start_at_random(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    build_encoder("resnet18", weights="auto")
    assert "random weights" in caplog.text
    with pytest.raises(UserError, match="resnet18-f37072fd.pth does not exist"):
        build_encoder("resnet18", weights="imagenet")
    (tmp_path / "checkpoints").mkdir()
    state = resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert torch.equal(build_encoder("resnet18", weights="auto").conv1.weight, state["conv1.weight"])


def test_what_the_weights_setting_means_here(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert [resolved_weights(w) for w in ("none", "auto")] == ["none", "none"]
    with pytest.raises(UserError, match="does not exist"):
        resolved_weights("imagenet")
    file = tmp_path / "mine.pth"
    for content in (b"one", b"another"):
        file.write_bytes(content)
        assert resolved_weights(str(file)) == "file sha256:" + hashlib.sha256(content).hexdigest()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"weights")
    assert [resolved_weights(w) for w in ("none", "auto", "imagenet")] == ["none", "imagenet", "imagenet"]
    assert resolved_weights("auto", "resnet_tiny") == "none"


def test_a_bare_name_means_a_file_in_torchs_cache_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pth").write_bytes(b"here")
    with pytest.raises(UserError, match="hub/checkpoints/mine.pth does not exist: put the file there"):
        resolved_weights("mine.pth")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "mine.pth").write_bytes(b"cached")
    for weights, content in (("mine.pth", b"cached"), ("./mine.pth", b"here")):
        assert TrainingSettings(weights=weights).weights_path == (content == b"here")
        assert resolved_weights(weights) == "file sha256:" + hashlib.sha256(content).hexdigest()


def test_bad_weight_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.pth does not exist"):
        build_encoder("resnet18", weights=str(tmp_path / "nowhere.pth"))
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"torn.pth is no readable"):
        build_encoder("resnet18", weights=str(tmp_path / "torn.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"'conv1.weight' is \(1,\)"):
        build_encoder("resnet18", weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="resnet_tiny"):
        build_encoder("resnet_tiny", weights="imagenet")
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_encoder("resnet19")


class PublishedExpert(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class PublishedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build_encoder("resnet_tiny")
        self.net.fc = nn.Identity()
        self.myfc = nn.Linear(64, 64)

    def forward(self, x):
        return self.myfc(self.net(x)).relu()


class PublishedLayout(nn.Module):
    """The network of docs/hsl.md once more, expert by expert, with the published names (evaluation mode only)."""

    def __init__(self):
        super().__init__()
        self.encoding_1, self.encoding_2 = PublishedEncoder(), PublishedEncoder()
        self.down1, self.down2 = nn.Linear(64, 32), nn.Linear(64, 32)
        self.experts = nn.ModuleList(PublishedExpert(128, 62, 32) for _ in range(12))
        self.towers = nn.ModuleList(PublishedExpert(32, 16, 1) for _ in range(2))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(128, 12), nn.Softmax(1)) for _ in range(2))

    def forward(self, x1, x2):
        f = [self.encoding_1(x1), self.encoding_2(x2)]
        e = torch.softmax(torch.cat(f, 1) / 3, 1)
        outputs = [expert(e) for expert in self.experts]
        probabilities = []
        for t, down in enumerate((self.down1, self.down2)):
            gate = self.gates[t](e)
            mixture = sum(gate[:, j : j + 1] * outputs[j] for j in range(12))
            probabilities.append(torch.sigmoid(self.towers[t](mixture + down(f[t]))).squeeze(1))
        return probabilities


def test_published_state_gives_the_same_predictions():
    torch.manual_seed(1)
    theirs, ours = PublishedLayout().double().eval(), MMoE("resnet_tiny").double().eval()
    load_published({f"module.{k}": v for k, v in theirs.state_dict().items()}, ours)
    x1, x2 = images(4).double(), images(4, seed=2).double()
    for p, logit in zip(theirs(x1, x2), ours(x1, x2), strict=True):
        torch.testing.assert_close(torch.sigmoid(logit), p, rtol=1e-12, atol=1e-13)


def test_published_round_trip_of_the_full_network(tmp_path):
    model = MMoE()
    state = model.state_dict()
    published = to_published(state)
    assert len(published) == len(state) + 4 * 11
    assert published["experts.7.fc1.weight"].shape == (62, 1024)
    back = from_published(published, state)
    assert list(back) == list(state) and all(torch.equal(back[k], state[k]) for k in state)
    torch.save(published, tmp_path / "best.pth")
    other = MMoE()
    load_published(tmp_path / "best.pth", other)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))


def test_published_layout_errors_name_the_tensor(tiny, tmp_path):
    good = to_published(tiny.state_dict())
    cases = [
        ({k: v for k, v in good.items() if k != "down1.bias"}, "'down1.bias' is missing"),
        ({**good, "gates.0.0.bias": torch.zeros(6)}, r"'gates.0.0.bias' is \(6,\), the network needs \(12,\)"),
        ({**good, "gates.2.0.bias": torch.zeros(12)}, "unknown tensor 'gates.2.0.bias'"),
    ]
    for state, message in cases:
        with pytest.raises(UserError, match=message):
            load_published(state, tiny)
    torch.save(tiny, tmp_path / "whole.pth")
    with pytest.raises(UserError, match="whole.pth is no readable"):
        load_published(tmp_path / "whole.pth", tiny)


def test_mechanism_agrees_with_autograd_and_leaves_no_trace(tiny):
    x, y = images(6), torch.tensor([0.0, 1, 0, 1, 0, 1])
    a = images(6, seed=5)
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    tiny.train()
    found = mechanism(tiny, x, y, a, y)
    assert tiny.training and list(tiny.state_dict()) == list(before)
    assert all(p.grad is None for p in tiny.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    tiny.eval()
    norms = []
    for logit in tiny(x, a):
        tiny.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logit, y).backward(retain_graph=True)
        norms.append(torch.cat([p.grad.flatten() for p in tiny.encoders[0].parameters()]).norm())
    tiny.zero_grad(set_to_none=True)
    assert found["primary_gradient"] == pytest.approx(norms[0].item(), rel=1e-3)
    assert found["anchor_gradient"] == pytest.approx(norms[1].item(), rel=1e-3)
    assert found["anchor_gradient_ratio"] == pytest.approx((norms[1] / norms[0]).item(), rel=1e-3)
    assert 0 < found["partner_effect"] < 0.1
    assert 0 < found["mixture_share"] < 1
