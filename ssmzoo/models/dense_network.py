"""What networks for dense prediction share: a backbone of the zoo under `maps`, which released weights may fill."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ssmzoo.presets import build_model, build_preset


class DenseNetwork(nn.Module):
    """Base of `Segmenter` and `Detector`; a subclass has `maps` (`DenseMaps`) and `num_classes`."""

    maps_name = "maps"  # where the maps are, for names of parameters

    @property
    def backbone(self) -> nn.Module:
        return self.maps.backbone

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer decay: the backbone's groups, under its name here; everything else is as deep as the last one."""
        return within(f"{self.maps_name}.backbone.", self.backbone.group_matcher(coarse))


def build_backbone(given: Mapping | str | nn.Module) -> nn.Module:
    """A backbone without a classifier: from a configuration, from the name of a preset, or a module as it is."""
    if isinstance(given, nn.Module):
        return given
    return build_preset(given, num_classes=0) if isinstance(given, str) else build_model({**given})


def within(prefix: str, groups: dict) -> dict:
    """timm's `group_matcher` patterns of a part, for the whole that holds it under `prefix`."""

    def moved(pattern):
        return pattern.replace("^", "^" + prefix.replace(".", r"\."), 1) if isinstance(pattern, str) else pattern

    return {
        name: [(moved(p), n) for p, n in patterns] if isinstance(patterns, list) else moved(patterns)
        for name, patterns in groups.items()
    }
