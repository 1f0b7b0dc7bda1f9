"""Pushes a folder to the Hub, with its model card: an adapter, a plain model or a packed model."""

import json
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.tree import is_hub_name
from .card import check_base, name_repository, part_of, write_card
from .card_facts import facts_of_folder


# What training leaves beside a model, and nobody loads.
LEFT_OUT = [
    f"{PREFIX_CHECKPOINT_DIR}-*/*",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    ".*",
]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    report: Any = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Push the folder of an adapter, a model or a packed model to the Hub, with a model card.

    If the folder has a card of this package, it stays, unless `report` or `base_model` tells more. Checkpoints and
    states of a training are left out.

    Args:
        folder: the folder, as `save_pretrained`, `save_merged_model`, `compress` or packing wrote it.
        repo_id: the name on the Hub, such as "user/name". The repository is made if there is none.
        report: the report of the run, as in `write_card`.
        base_model: the Hub id of the base model. That of an adapter is also written into its `adapter_config.json`.
        private: whether a new repository is private. None leaves this to the Hub.
        token: the access token. None takes the one of `hf auth login`.
        revision: the branch to push to. It is made if there is none.
        create_pr: whether to open a pull request.
        commit_message: the message of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        TypeError: `report` is not a report.
        ValueError: the folder holds no model, or `base_model` is not a Hub id. Nothing is pushed.
    """
    folder = Path(folder)
    check_base(base_model)
    facts = facts_of_folder(folder)
    if facts.kind == "adapter":
        _name_base(folder / ADAPTER_CONFIG, base_model)
    if part_of(folder) is None or report is not None or base_model is not None:
        write_card(folder, report=report, base_model=base_model, repo_id=repo_id)
    name_repository(folder, repo_id)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or f"Upload {'adapter' if facts.kind == 'adapter' else 'model'}",
        ignore_patterns=LEFT_OUT,
    )
    return str(commit.pr_url or commit.commit_url)


def _name_base(path: Path, base_model: str | None) -> None:
    """Let the configuration of an adapter name the base model by its Hub id."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    elif not is_hub_name(config.get("base_model_name_or_path")):
        warnings.warn(
            f"The adapter names {config.get('base_model_name_or_path')!r} as its base model, which others do not "
            "find on the Hub. Push the base model, and give its name as `base_model`.",
            stacklevel=3,
        )
