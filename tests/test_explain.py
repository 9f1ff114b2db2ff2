"""Grad-CAM against the class activation map that it equals for pooling and one linear layer, and on shuffled weights."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from raredistill.models.network import Network, linear_head
from raredistill.runs.maps import grad_cam, randomised


def network(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = linear_head(6, 3, 0.0)
    return Network(body, head, name="tiny", channels=1, classes=3, image_size=12, mean=[0.5], std=[0.5])


def test_the_map_is_the_class_activation_map_of_a_linear_head():
    made, images = network(), torch.rand(2, 1, 12, 12)
    for place in range(3):
        with torch.no_grad():
            features = made.body[1](made.body[0]((images - 0.5) / 0.5))
            weighted = F.relu(torch.einsum("k,nkhw->nhw", made.head[1].weight[place], features))
        expected = weighted / weighted.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        np.testing.assert_allclose(grad_cam(made, images.clone(), place), expected.double().numpy(), atol=1e-5)


def test_shuffled_weights_keep_their_numbers_and_lose_their_order():
    before, after = network(), randomised(network())
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one.flatten().sort().values, other.flatten().sort().values)
    assert not torch.equal(before.body[0].weight, after.body[0].weight)
