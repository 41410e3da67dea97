"""An export -> a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from hf_dsvllm.errors import ExportError

__all__ = ["push_to_hub"]


def push_to_hub(folder: Path, repository: str, *, token: str | None = None) -> str:
    """Upload every file of an export to `repository` (OWNER/NAME); return its address.

    A new repository is private; one that exists stays as it is.  The token is `token`, or what `hf auth login` or
    HF_TOKEN left.  Raises ExportError; the export itself is finished and stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=address.repo_id, commit_message="Export by hf-dsvllm, with its manifest"
        )
    except Exception as error:  # whatever the hub client raises, the user can do the same thing about it
        raise ExportError(
            f"The export is finished in {folder}, but could not be pushed to {repository}: {error}. "
            f"Push it again with `hf upload {repository} {folder}`."
        ) from error
    return str(address)
