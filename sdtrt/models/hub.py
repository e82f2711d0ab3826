"""Files of a Hugging Face hub repository, through huggingface_hub's own cache, token and offline rules."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ModelError, UsageError, first_line

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form `owner/name`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_address(name: str) -> bool:
    """Whether `name` is a page of the hub, and no id."""
    return re.match(r"(https?://)?(huggingface\.co|hf\.co)/", name) is not None


def refuse_address(name: str, option: str, hint: str = "") -> None:
    """Raise `UsageError` for a page of the hub as an option's value."""
    if is_address(name):
        usual = f"use the hub id alone: {option} owner/name"
        raise UsageError(f"{option} takes no web address: {name!r}", hint=hint or usual)


@dataclass(frozen=True)
class Repo:
    """A repository at one revision: a commit, once something was fetched.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; None for the default branch.
        offline: use the cache alone (the environment's `HF_HUB_OFFLINE` does the same).
    """

    repo_id: str
    revision: str | None = None
    offline: bool = False
    console: Console = field(default=QUIET, compare=False, repr=False)

    def fetch(self, patterns: Sequence[str], what: str, *, large: bool = False) -> Path:
        """Bring the files that match into the cache, and return the snapshot's folder.

        Args:
            patterns: shell patterns of paths inside the repository; files that don't exist are no error.
            what: what they are, for the reader (`unet weights`).
            large: worth a progress bar (huggingface_hub's own), unless the console is quiet.

        Raises:
            ModelError: if the repository or revision can't be had, saying why and what to do.
        """
        import huggingface_hub
        from huggingface_hub import errors, utils

        bars: Any = utils  # it exports these functions, though not by name
        hide_bars = (self.console.quiet or not large) and not bars.are_progress_bars_disabled()
        if hide_bars:
            bars.disable_progress_bars()
        self.console.detail(f"{self.repo_id}: fetching the {what}")
        try:
            folder = huggingface_hub.snapshot_download(
                self.repo_id,
                revision=self.revision,
                allow_patterns=list(patterns),
                local_files_only=self.cache_only,
            )
        except errors.HFValidationError as error:
            raise UsageError(f"{self.repo_id!r} is no hub id", hint="write it as owner/name") from error
        except Exception as error:  # HTTP clients differ between huggingface_hub's versions, and so do their errors
            raise self._explain(error, what) from error
        finally:
            if hide_bars:
                bars.enable_progress_bars()
        return Path(folder)

    def files(self) -> frozenset[str] | None:
        """The paths of all files of the repository; None where the hub can't be asked."""
        return None if self.cache_only else _files_of(self)

    @property
    def cache_only(self) -> bool:
        """Whether the hub must not be asked."""
        from huggingface_hub import constants

        return self.offline or bool(constants.HF_HUB_OFFLINE)

    def pinned(self, folder: Path) -> Repo:
        """This repository at the commit of a fetched snapshot, so that later parts are of the same one."""
        return replace(self, revision=folder.name)

    def not_cached(self, what: str) -> ModelError:
        """The error for files that are needed, not in the cache, and not to be downloaded."""
        return ModelError(
            f"{what} of {self.repo_id}: not in the hub cache, and the hub is switched off",
            hint=f"run hf download {self.repo_id} where there is network, or leave HF_HUB_OFFLINE and --offline away",
        )

    def _explain(self, error: Exception, what: str) -> ModelError:
        """What went wrong, for someone who can mend it."""
        from huggingface_hub import errors

        name, page = self.repo_id, f"https://huggingface.co/{self.repo_id}"
        if isinstance(error, errors.GatedRepoError):
            return ModelError(
                f"{name} is gated on the hub, and this machine has no access to it",
                hint=f"accept its licence at {page}, then run hf auth login or set HF_TOKEN",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return ModelError(
                f"the hub has no model {name} that this machine may read, and there is no folder of that name",
                hint="check the spelling; for a private model run hf auth login or set HF_TOKEN",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelError(
                f"{name} has no revision {self.revision!r}", hint=f"see its branches and tags at {page}/tree/main"
            )
        if self.cache_only:
            return self.not_cached(what)
        reason = first_line(error)
        return ModelError(
            f"{what} of {name}: not in the hub cache, and the download failed: {reason}",
            hint="check the network connection and the free disk space, or pass a folder as --model",
        )


@functools.cache
def _files_of(repo: Repo) -> frozenset[str] | None:
    """The paths of a repository's files, asked for once in a process; None where the hub does not answer."""
    import huggingface_hub

    try:
        return frozenset(huggingface_hub.HfApi().list_repo_files(repo.repo_id, revision=repo.revision))
    except Exception as error:  # HTTP clients differ, and so do their errors; what the cache holds may do
        repo.console.detail(f"{repo.repo_id}: no list of its files: {first_line(error)}")
        return None
