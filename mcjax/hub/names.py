"""From a model's name on the Hugging Face hub to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""What is taken from a repository: never pickles, never code."""

UNWANTED = ("*/*", "consolidated*")
"""Of that what is left: the same weights again, in their makers' own form."""


def local(model: str | Path) -> Path:
    """Finds the folder of a model, downloading it if it is not here.

    Files go to the cache of `huggingface_hub`, whose environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN,
    HF_HUB_OFFLINE) is honoured; what is there already is not read again.

    Args:
      model: a path, or a name on the hub, OWNER/NAME or OWNER/NAME@REVISION. What exists as a path
        is one.

    Returns:
      The folder. A path that does not exist is given back, for whoever opens it to refuse.

    Raises:
      ValueError: if a name cannot be had, with why.
    """
    match = NAME.fullmatch(str(model))
    if Path(model).exists() or match is None or str(model).startswith("."):
        return Path(model)
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = snapshot_download(
            match["repository"],
            revision=match["revision"],
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except errors.GatedRepoError:
        reason = (
            "its makers ask for their licence to be accepted first; do so on its page, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder here and no such repository on the hub for you"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {match['revision']!r}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        reason = f"it is no folder, it is not in the cache {constants.HF_HUB_CACHE}, and {why}"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
    else:
        return Path(folder)
    raise ValueError(f"cannot get {model}: {reason}")
