"""A model in memory, whole or with parts that accelerate reads anew for each forward, and the folder that those may need.

Only safetensors are read, only from the model's folder, and none of its code is run. It refuses to know requests.
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError, ModelError
from ..stores.scratch import Scratch
from .kind import CLASSES, FAULTS, told
from .plan import GenericPlan

FOLDER = "generic"
DEVICES = {"host": "cpu", "disk": "disk"}


class Loaded:
    """A model and what it was loaded by; to be closed in a worker thread."""

    def __init__(self, model: PreTrainedModel, plan: GenericPlan, scratch: Scratch | None) -> None:
        self.model, self.plan = model, plan
        self._scratch = scratch

    def close(self) -> None:
        """Remove what was written for it. Blocking, idempotent; the memory is free once nobody holds `model`."""
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()

    def __repr__(self) -> str:
        return f"<Loaded {self.plan.architecture}, {self.plan.streamed_nbytes_per_pass} bytes read a pass>"


def load(folder: Path, plan: GenericPlan, cache_dir: Path) -> Loaded:
    """The model in `folder`, placed as `plan` says. Blocking.

    Layers that transformers rebuilds while it loads (most experts) are written again under `cache_dir` if they are to be read for each
    forward; while they are rebuilt, pages of the files count as this process's memory, until the kernel wants them or all is loaded.
    Raises `ModelError` for a model that cannot be loaded, `StoreError` where nothing can be written.
    """
    placed: dict[str, Any] = {}
    scratch = None
    if plan.streamed:
        if find_spec("accelerate") is None:
            raise ModelError(
                f"{folder} does not fit in the memory given, and reading it from disk needs accelerate: pip install 'aollm[generic]', "
                "or give more memory"
            )
        scratch = Scratch.open(cache_dir / FOLDER)
        devices = {name: DEVICES[place] for name, place in plan.placement.items()}
        placed = {"device_map": devices, "offload_folder": scratch.path, "offload_buffers": False}
    told_by: Any = logging  # which has no types
    bars = told_by.is_progress_bar_enabled()
    told_by.disable_progress_bar()
    try:
        model, report = CLASSES[plan.kind].from_pretrained(
            folder, dtype=getattr(torch, plan.dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **placed,
        )  # fmt: skip
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{folder} has no tensor {missing[0]} ({len(missing)} are missing) that {plan.architecture} needs; "
                "is its config.json that of another model, or the model one without a language-model head?"
            )
        _forget_generation_settings(model.eval())
        if plan.rebuilt:
            _let_go_of_files(model)
        return Loaded(model, plan, scratch)
    except FAULTS as error:
        _close(scratch)
        raise ModelError(f"{folder}: transformers cannot load it ({told(error)}); download it again, or take another model") from error
    except BaseException:
        _close(scratch)
        raise
    finally:
        if bars:
            told_by.enable_progress_bar()


def _forget_generation_settings(model: Any) -> None:
    """Leave only which ids are special: how an answer is drawn, and in what cache, is the caller's business."""
    was = model.generation_config
    ids = {name: getattr(was, name) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
    last = was.eos_token_id[0] if isinstance(was.eos_token_id, list) else was.eos_token_id
    model.generation_config = type(was)(**ids, pad_token_id=last if was.pad_token_id is None else was.pad_token_id)


def _let_go_of_files(model: Any) -> None:
    """Copy what is still a view of a mapped file, so that the map goes, and with it the pages that experts were rebuilt from."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type != "meta":
                tensor.data = tensor.data.clone()
    gc.collect()


def _close(scratch: Scratch | None) -> None:
    gc.collect()  # a model that was loaded in part may hold maps of what is removed
    if scratch is not None:
        scratch.close()
