"""What images are normalised by where ``data.mean`` is null: the statistics of the weights that a student begins with.

The networks of a run are made after its data, so these are found from the config alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kd.config.timm_source import TARGETS
from kd.records import weight_files

log = logging.getLogger(__name__)

SET = ("mean", "std")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data section with ``mean`` and ``std`` where both are null and the student's weights come with some.

    Weights of a run come with those that the run has recorded, a timm network's with those of its ``pretrained_cfg``.
    Where there are none the section stays as it is. What was chosen is logged, with the size of the images.
    """
    node = dict(config["data"])
    if any(key not in node or node[key] is not None for key in SET):
        return node
    found, whose = _of_the_student(config["student"])
    if not found:
        return node
    node |= {key: [float(value) for value in found[key]] for key in SET}
    size = found.get("input_size") or found.get("input_shape")
    same = size is None or "image_size" not in node or size[-1] == node["image_size"]
    asked = "" if same else f", now {node['image_size']}"
    details = f"; it was trained on {size[-2]}×{size[-1]} pixels" if size else ""
    if "interpolation" in found:
        details += f", {found['interpolation']}, {found['crop_pct']:g} of the shorter edge (data.crop_pct)"
    details += f": data.image_size={size[-1]}{asked}" if size else ""
    log.info(
        "images are normalised by mean %s, std %s, as those of %s were (data.mean, data.std)%s",
        *(node["mean"], node["std"], whose, details),
    )
    return node


def of_timm(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the pretrained configuration of a timm network by its node; {} for other networks, or unknown names."""
    name = model.get("name") or model.get("model_name")
    if model.get("_target_") not in TARGETS or not name or ":" in name:
        return {}
    import timm  # start-up: of timm's networks alone

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {} if config is None else config.to_dict()


def _of_the_student(section: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return statistics and size, and whose they are; {} for a student that begins at random."""
    model, checkpoint = section["model"] or {}, section["checkpoint"]
    if checkpoint is not None:
        recorded = weight_files.about(checkpoint, section.get("epoch")).get("data") or {}
        if recorded:
            return (recorded if recorded.get("mean") else {}), str(checkpoint)
    if checkpoint is None and not model.get("pretrained"):
        return {}, ""
    own = of_timm(model)
    return (own if own.get("mean") else {}), str(model.get("name"))
