"""The evaluators' image tower as two timm models: plain 3 x 3 convolutions over the world's 8 px tiles.

Importing this file registers them with timm, as timm's own model files do; evaluators.register() does so. Nothing is
loaded here. Plain convolutions with batch norm learned this world several times faster than a ConvNeXt or a ResNet of
the same cost.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

# What timm's loaders must know of the images: 128 px, nothing cropped away.
_CONFIG = {
    "url": "",
    "num_classes": 0,
    "input_size": (3, 128, 128),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "stem.0",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({"demo_world_instance": _CONFIG, "demo_world_clip_tower": _CONFIG})


def _layer(into: int, out: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class TileNet(nn.Module):
    """8 px tiles -> 16 x 16, 8 x 8 and 4 x 4 feature maps -> their mean, normalised -> classes (none: the features
    themselves).
    """

    def __init__(self, widths: tuple, num_classes: int = 0, global_pool: str = "avg", in_chans: int = 3):
        super().__init__()
        first, *rest = widths
        self.stem = _layer(in_chans, 48, 8, 8, 0)
        layers = [_layer(48, first, 3, 1, 1)]
        for before, after in zip(widths, rest, strict=False):
            layers.append(_layer(before, after, 3, 1 if before == after else 2, 1))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1])
        self.num_features = widths[-1]
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg"):
        if global_pool != "avg":
            raise ValueError(f"TileNet pools by the mean only, not by {global_pool!r}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def demo_world_instance(pretrained: bool = False, **kwargs) -> TileNet:
    widths = (64, 128, 128, 256, 256, 256)
    return build_model_with_cfg(TileNet, "demo_world_instance", pretrained, widths=widths, **kwargs)


@register_model
def demo_world_clip_tower(pretrained: bool = False, **kwargs) -> TileNet:
    widths = (64, 128, 128, 256, 256)
    return build_model_with_cfg(TileNet, "demo_world_clip_tower", pretrained, widths=widths, **kwargs)
