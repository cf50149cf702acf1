"""Data sets on the Hugging Face hub: the folder of their files."""

from collections.abc import Iterable
from pathlib import Path

from fedlotr.errors import InputError


def fetch_data(given: str, suffixes: Iterable[str], option: str = "") -> Path:
    """The folder of a data set: its files with these endings, from the local cache or fetched. No code of it is run.

    option: how messages name it, with its value (default: --data). Raises InputError where there is none, or the hub
    cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    option = option or f"--data {given}"
    hub_id, _, folder = given.partition(":")
    patterns = [f"{folder}/*{suffix}" if folder else f"*{suffix}" for suffix in suffixes]
    try:
        fetched = Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{option}: no such folder, and not a hub id such as org/name") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{option}: no such folder, and the hub cannot be reached (nor is it in the local cache)"
        ) from None
    except HfHubHTTPError as error:
        raise InputError(f"{option}: no such folder, and the hub says: {error.response.status_code}") from None
    return fetched / folder
