"""Files of a model on the Hugging Face Hub, brought into the local cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TEXT = ("*.json", "*.txt", "*.model")  # configuration and tokenizer, never weights


def fetch_configs(repo: str, *, cache_dir: str | None = None) -> Path:
    """Brings everything but the weights of a hub model here.

    Args:
        repo: "owner/name".
        cache_dir: default the Hub's own cache.
    Returns:
        The folder of the snapshot.
    Raises:
        ConnectionError: offline, no such model, no access; one sentence with the reason.
    """
    from huggingface_hub import snapshot_download

    return Path(
        _attempt(
            repo, snapshot_download, repo_id=repo, allow_patterns=list(_TEXT), cache_dir=cache_dir
        )
    )


def fetch_weights(repo: str, names: Sequence[str], *, cache_dir: str | None = None) -> Path:
    """Brings the first file of `names` that a hub model has here; shards come with an index.

    Raises:
        ConnectionError: as `fetch_configs`; also when it has none of them.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    failure: Exception | None = None
    for name in names:
        try:
            path = Path(
                _attempt(repo, hf_hub_download, repo_id=repo, filename=name, cache_dir=cache_dir)
            )
        except ConnectionError as error:
            failure = failure or error
            continue
        if name.endswith(".index.json"):
            shards = f"{name.split('.', 1)[0]}-*"
            _attempt(
                repo, snapshot_download, repo_id=repo, allow_patterns=[shards], cache_dir=cache_dir
            )
        return path
    raise failure or ConnectionError(f"load: no weight file of {repo} is known")


def _attempt(repo: str, download: Any, **arguments: Any) -> str:
    try:
        return download(**arguments)
    except Exception as error:  # the Hub's client has a dozen kinds, and its HTTP library more
        from huggingface_hub import constants

        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise ConnectionError(
            f"load: {repo} could not be had from the Hugging Face Hub ({reason[:200]}{offline})"
        ) from error
