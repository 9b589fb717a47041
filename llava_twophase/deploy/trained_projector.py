"""Find out what a trained projector belongs to: its file, LLM, vision tower and settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_twophase.errors import UserError, short_repr
from llava_twophase.joining import parts_of_fingerprint
from llava_twophase.layers import Layers, as_layers
from llava_twophase.multi_scale import DEFAULT_SCALES, parse_scales
from llava_twophase.projectors.build import ProjectorSpec, build_projector, recorded_spec
from llava_twophase.projectors.find import source_digests
from llava_twophase.projectors.names import is_llava
from llava_twophase.train.data.tower_check import TowerSettings
from llava_twophase.train.model.projector import FILE, different_shapes, projector_type, read_projector

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class TrainedProjector:
    """A projector file and the settings that it was trained with.

    Attributes:
        path: ``mm_projector.bin`` or another file with its weights.
        projector_type: ``linear``, ``mlpNx_gelu``, or a type that LLaVA does not have.
        llm: Folder or hub id of the base LLM.
        vision_towers: Folder or hub id of the vision tower, or of several whose features are joined on channels.
        select_layer: Hidden state of the tower that the projector reads; -2 is the second to last. Several are
            concatenated on channels.
        select_feature: ``patch`` (without the CLS token) or ``cls_patch``.
        image_aspect_ratio: ``square`` or ``pad``.
        s2_scales: Scales of LLaVA's S2 mode in pixels, smallest first; none for one scale.
        llm_dtype: Dtype that the LLM ran in; None where it is not recorded.
        tower_dtypes: Dtype that each tower ran in; None where it is not recorded.
        interpolate_patch_grid: Whether patch grids of other sizes are resampled to the first tower's.
        spec: What a projector that LLaVA does not have is built from; None for LLaVA's own types.
        source: Digests of the files that its classes came from, by module name.
    """

    path: Path
    projector_type: str
    llm: str
    vision_towers: tuple[str, ...]
    select_layer: Layers
    select_feature: str
    image_aspect_ratio: str
    s2_scales: tuple[int, ...] = ()
    llm_dtype: str | None = None
    tower_dtypes: tuple[str | None, ...] = (None,)
    interpolate_patch_grid: bool = False
    spec: ProjectorSpec | None = None
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def tower_settings(self) -> list[TowerSettings]:
        """What the projector reads of each tower."""
        return [
            TowerSettings(tower, self.select_layer, self.select_feature, self.image_aspect_ratio, self.s2_scales)
            for tower in self.vision_towers
        ]

    def only_tower(self, system: str) -> str:
        """Return the vision tower for a system that has one.

        Args:
            system: Its name, for the error.

        Raises:
            UserError: The projector reads the joined features of several towers.
        """
        if len(self.vision_towers) > 1:
            raise UserError(
                f"{self.path} reads the joined features of {len(self.vision_towers)} vision towers "
                f"({', '.join(self.vision_towers)}), but {system} takes one tower and cannot load it; "
                "llava-use-projector caption and evaluate can"
            )
        return self.vision_towers[0]

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the projector's tensors under the names of its module: ``0.weight``, ``0.bias``, ``2.weight``, ..."""
        return read_projector(self.path)


def find_projector(
    run: str | Path, llm: str | None = None, vision_tower: str | Sequence[str] | None = None, **overrides: Any
) -> TrainedProjector:
    """Find the projector of a run, and the settings that it was trained with.

    Args:
        run: An ``--output_dir``, or a projector file; a ``config.json`` beside the file is used.
        llm: ``--model_name_or_path``; overrides what the configuration says.
        vision_tower: ``--vision_tower``, several for a projector of joined features; overrides what the configuration
            says.
        overrides: ``select_layer``, ``select_feature`` or ``image_aspect_ratio``; None keeps the recorded value.

    Returns:
        The projector with all settings.

    Raises:
        UserError: There is no projector, or its LLM or tower is neither recorded nor given.
    """
    path = _projector_file(Path(run))
    config, arguments = _json(path.with_name("config.json")), _json(path.with_name("arguments.json"))
    cache = _json(path.with_name("feature_cache.json"))
    llm = llm or config.get("_name_or_path")
    given = vision_tower or config.get("mm_vision_tower") or ()
    towers = (given,) if isinstance(given, (str, Path)) else tuple(given)
    absent = [flag for flag, value in (("--model_name_or_path", llm), ("--vision_tower", towers)) if not value]
    if absent:
        where = path.with_name("config.json")
        found = f"{where} does not name its models" if config else f"there is no {where} that names its models"
        raise UserError(f"{run}: {found}; give {' and '.join(absent)}")
    recorded = {
        "select_layer": config.get("mm_vision_select_layer", -2),
        "select_feature": config.get("mm_vision_select_feature", "patch"),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "s2_scales": parse_scales(bool(config.get("s2")), str(config.get("s2_scales", DEFAULT_SCALES))),
    }
    recorded.update({name: value for name, value in overrides.items() if value is not None})
    recorded["select_layer"] = as_layers(recorded["select_layer"])
    return TrainedProjector(
        path=path,
        projector_type=_projector_type(path, config),
        spec=recorded_spec(config),
        source=config.get("mm_projector_source", {}),
        llm=str(llm),
        vision_towers=tuple(map(str, towers)),
        llm_dtype=_llm_dtype(arguments.get("training", {})),
        tower_dtypes=_tower_dtypes(arguments, cache, len(towers)),
        interpolate_patch_grid=bool(config.get("mm_interpolate_patch_grid")),
        **recorded,
    )


def _projector_type(path: Path, config: Mapping[str, Any]) -> str:
    kind = config.get("mm_projector_type") or projector_type(read_projector(path))
    if not is_llava(kind) and recorded_spec(config) is None:
        raise UserError(
            f"{path.with_name('config.json')} has mm_projector_type {kind} without mm_projector_input, which this "
            "project's training writes; expected linear, mlpNx_gelu, or a run of this project"
        )
    return str(kind)


def load_projector(run: str | Path | TrainedProjector, **overrides: Any) -> nn.Module:
    """Load a trained projector as a module, without its LLM and tower.

    Args:
        run: An ``--output_dir``, a projector file, or what ``find_projector`` returned.
        overrides: As for ``find_projector``.

    Returns:
        A module ``[B, L, D] -> [B, L', H]`` on the CPU in evaluation mode, in the dtype of its file.

    Raises:
        UserError: The file cannot be read, or its shapes do not form the projector that its configuration says.
    """
    projector = run if isinstance(run, TrainedProjector) else find_projector(run, **overrides)
    weights = projector.weights()
    module = _build(projector, weights)
    found, expected = different_shapes(weights, module)
    if found or expected:
        raise UserError(
            f"{projector.path} has {short_repr(found, 400)}, but a {projector.projector_type} projector has "
            f"{short_repr(expected, 400)}"
        )
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    module.to(dtype).load_state_dict(weights)
    return module.requires_grad_(False).eval()


def _build(projector: TrainedProjector, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    spec = projector.spec
    if spec is None:
        matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
        return build_projector(projector.projector_type, matrices[0].shape[1], matrices[-1].shape[0])
    module = build_projector(spec.kind, spec.tower_width, spec.llm_width, spec.patches, spec.kwargs)
    found = source_digests(module)
    changed = sorted(
        name for name in found.keys() | projector.source.keys() if found.get(name) != projector.source.get(name)
    )
    if changed:
        logger.warning(
            "%s was trained with another version of the source of %s; what it computes may differ",
            *(projector.path, ", ".join(changed)),
        )
    return module


def _projector_file(run: Path) -> Path:
    expected = "expected the --output_dir of a training run, or a projector file"
    if not run.exists():
        raise UserError(f"{run} does not exist; {expected}")
    if run.is_file():
        return run
    if not (run / FILE).is_file():
        unfinished = any(run.glob("checkpoint-*")) or run.name.startswith("checkpoint-")
        hint = ": its training has not finished; run the same training command again" if unfinished else f"; {expected}"
        raise UserError(f"{run} has no {FILE}{hint}")
    return run / FILE


def _llm_dtype(training: Mapping[str, Any]) -> str | None:
    if not training:
        return None
    return "bfloat16" if training.get("bf16") else "float16" if training.get("fp16") else "float32"


def _tower_dtypes(arguments: Mapping[str, Any], cache: Mapping[str, Any], towers: int) -> tuple[str | None, ...]:
    recorded = [part.get("compute_dtype") for part in parts_of_fingerprint(cache.get("fingerprint", {}))]
    defaults: list[str | None] = [None] * towers
    if arguments:
        # An on-the-fly run. LLaVA parity: its tower runs in fp16 unless the run is in bf16.
        given = arguments["model"].get("compute_dtype") or ("bf16" if arguments["training"].get("bf16") else "fp16")
        names = given if isinstance(given, list) else [given] * towers
        defaults = [_DTYPES[name] for name in names]
    if len(recorded) != towers:  # another number of towers was given
        recorded = [None] * towers
    return tuple(dtype or default for dtype, default in zip(recorded, defaults, strict=False))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}
