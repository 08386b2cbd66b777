import copy

import pytest
import timm
import torch
from torch import nn

from captioner.model.depthwise import DepthwiseConv2d, replace_depthwise_convolutions


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "padding", "size"), [(5, 2, 9), (7, 3, 4), (5, 0, 8), (7, 5, 6)]
)
def test_the_gradient_is_torchs(kernel: int, padding: int, size: int, bias: bool):
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 6, kernel, padding=padding, groups=6, bias=bias).double()
    ours = DepthwiseConv2d.like(copy.deepcopy(theirs))
    inputs = [torch.randn(3, 6, size, size + 1, dtype=torch.double).requires_grad_() for _ in "ab"]
    inputs[1].data.copy_(inputs[0].data)
    results = [conv(x) for conv, x in zip((theirs, ours), inputs, strict=True)]
    for result in results:
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    torch.testing.assert_close(*results)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_under_autocast_the_weights_keep_their_dtype():
    conv = DepthwiseConv2d(4, 4, 5, padding=2, groups=4, bias=False)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    y.float().sum().backward()
    assert (y.dtype, conv.weight.grad.dtype, x.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    seen_by_all = conv.weight.sum((1, 2, 3)).expand(2, 4)  # the outputs' gradients are 1
    torch.testing.assert_close(x.grad[:, :, 2, 2], seen_by_all, atol=0.02, rtol=0.02)


def test_only_what_it_can_compute_is_replaced():
    network = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(8, 8, 5, padding=2, groups=8),
            "small": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "strided": nn.Conv2d(8, 8, 5, padding=2, stride=2, groups=8),
            "dilated": nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8),
            "grouped": nn.Conv2d(8, 8, 5, padding=2, groups=4),
            "dense": nn.Conv2d(1, 1, 5, padding=2),
            "named": nn.Conv2d(8, 8, 5, padding="same", groups=8),
            "wrapped": nn.Conv2d(8, 8, 5, padding=2, groups=8, padding_mode="circular"),
            "oblong": nn.Conv2d(8, 8, (5, 7), padding=(2, 3), groups=8),
        }
    )
    before = network.state_dict()
    replace_depthwise_convolutions(network)
    assert [n for n, m in network.items() if isinstance(m, DepthwiseConv2d)] == ["depthwise"]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_backbone_gives_the_same_features():
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="").eval()
    ours = copy.deepcopy(theirs)
    replace_depthwise_convolutions(ours)
    assert any(isinstance(module, DepthwiseConv2d) for module in ours.modules())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.forward_features(images), ours.forward_features(images))
