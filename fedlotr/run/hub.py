"""A folder as a repository of models on the Hugging Face hub, or on what HF_ENDPOINT names in its place."""

from pathlib import Path

from fedlotr.errors import FedlotrError, InputError


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder and return the address of the repository, which is made where there is none.

    The token is the one of `hf auth login` or of HF_TOKEN. A repository that is there stays as public as it is.
    Raises InputError where the hub does not let us, or the name is none; FedlotrError where it cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    if get_token() is None:
        raise InputError("--to hub: there is no token; log in (hf auth login), or set HF_TOKEN to one that may write")
    try:
        made = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type="model", commit_message="From a run of fedlotr"
        )
        if private and not api.repo_info(made.repo_id, repo_type="model").private:
            return f"{made} (it was there already, and is public)"
    except HFValidationError as error:
        raise InputError(f"--repo {repo}: {error}; expected ORG/NAME") from error
    except OfflineModeIsEnabled as error:
        raise FedlotrError("--to hub: HF_HUB_OFFLINE is set; unset it to reach the hub") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        why = {401: "it does not know the token", 403: "the token may not write there"}.get(code, f"it says {code}")
        raise InputError(
            f"--repo {repo}: the hub refuses ({why}): {error.server_message or 'no reason given'}"
        ) from error
    except (httpx.TransportError, ValueError) as error:
        what = (
            f"{constants.ENDPOINT} cannot be reached" if isinstance(error, httpx.TransportError) else "it was not sent"
        )
        raise FedlotrError(f"--to hub: {what} ({type(error).__name__}: {error})") from error
    return str(made)
