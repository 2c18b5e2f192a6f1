"""Repositories on the Hugging Face Hub: their names, their files, and uploads.

``huggingface_hub`` speaks to the Hub, keeps in its cache what it downloads, and knows the user's token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import InputError, first_line
from ..files import require_regular

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(
    rf"(?P<repo>{PART}/{PART})(?:/(?P<file>[^@]+\.ckpt))?(?:@(?P<revision>\w[\w./-]{{0,199}}))?", re.ASCII
)
PATHS = (".ckpt", ".h5", ".hdf5", ".json", ".lerobot", ".npz", ".safetensors", ".yaml", ".zarr", ".zip")
"""Endings of files and datasets, which no repository's name is taken to have."""
SECONDS = 10.0
"""How long the Hub may take to answer."""


@dataclass(frozen=True)
class HubName:
    """A checkpoint on the Hub: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a file in it,
    ``OWNER/NAME/FILE.ckpt@REVISION``.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: a branch, tag or commit; None: what the repository has now.
        file: a path in the repository; None: the repository is the checkpoint.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    @staticmethod
    def parse(text: str) -> HubName | None:
        """The name that a text has the form of; None: it has another form, as most paths have."""
        found = NAME.fullmatch(text)
        if found is None or ".." in text or "--" in found["repo"]:
            return None
        if found["repo"].endswith((*PATHS, ".git")):
            return None
        return HubName(found["repo"], found["revision"], found["file"])

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


@dataclass
class HubFiles:
    """The files of a repository at one commit, downloaded one by one.

    Attributes:
        name: of the repository.
        sizes: its files' paths and their bytes, None where they aren't known.
        commit: that the Hub says; None: the Hub can't be reached, and the files are those in the cache.
        folder: of the cache that they are in; None before the first was downloaded.
        fetched: paths of those that were downloaded.
    """

    name: HubName
    sizes: Mapping[str, int | None]
    commit: str | None
    folder: Path | None = None
    fetched: list[str] = field(default_factory=list)

    @staticmethod
    def of(name: HubName) -> HubFiles:
        """What the Hub has now; where it can't be reached, what was downloaded before.

        Raises:
            InputError: ``huggingface_hub`` isn't installed, there is no such repository or revision, the user
                may not read it, or the Hub can't be reached and nothing was downloaded.
        """
        try:
            api = _api()
        except InputError as error:
            raise InputError(f"nothing is at {name}, and the Hugging Face Hub can't be asked for it: {error}")
        try:
            about = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=SECONDS)
            if not about.sha:
                raise ValueError("it names no commit")
            return HubFiles(name, {each.rfilename: each.size for each in about.siblings or []}, about.sha)
        except Exception as error:
            refusal = _refusal(name, error)
            if refusal is not None:
                raise refusal
            reason = first_line(error)
        try:
            folder = Path(api.snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        except (OSError, ValueError) as error:
            # A snapshot that another program left incomplete may still have what is needed.
            place = getattr(error, "snapshot_path", None)
            if place is None:
                raise InputError(
                    f"nothing is at {name}, and the Hugging Face Hub can't be reached to look for it there "
                    f"({reason:.120}): correct the path, or connect"
                )
            folder = Path(place)
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return HubFiles(name, sizes, None, folder)

    def fetch(self, file: str, most: int) -> Path:
        """Downloads a file, unless it is in the cache; returns its path there.

        Args:
            file: its path in the repository.
            most: bytes that it may have.

        Raises:
            InputError: the repository has no such file, it has more bytes, or others than the Hub says, or it
                can't be downloaded.
        """
        if file not in self.sizes:
            where = self.name.repo if self.commit else f"what was downloaded of {self.name.repo}"
            raise InputError(f"{where} has no file {file!r:.200}: name a repository with a whole checkpoint")
        size = self.sizes[file]
        if size is not None and size > most:
            raise InputError(f"{self.name}: {file} has {size} bytes, {most} are the most that is read")
        if self.commit is not None:
            self._download(file)
        path = self.path(file)
        require_regular(path, most)
        found = path.stat().st_size
        if size is not None and found != size:
            raise InputError(
                f"{path} has {found} bytes, but {self.name} {size}: remove it, and it is downloaded again"
            )
        self.fetched.append(file)
        return path

    def path(self, file: str) -> Path:
        """The path of a file that was downloaded."""
        assert self.folder is not None
        return self.folder / file

    def _download(self, file: str) -> None:
        # The first is asked for by the revision, from which the cache learns the commit that it means.
        revision = self.name.revision if self.folder is None else self.commit
        try:
            path = Path(_api().hf_hub_download(self.name.repo, file, revision=revision))
        except Exception as error:
            raise _refusal(self.name, error) or InputError(
                f"{self.name}: {file} can't be downloaded ({first_line(error):.160}): try again"
            )
        self.folder = path.parents[len(PurePosixPath(file).parts) - 1]
        if self.folder.name != self.commit:
            raise InputError(f"{self.name} was changed while it was downloaded: try again")


def page(repo: str) -> str:
    """A repository's address.

    Raises:
        InputError: ``huggingface_hub`` isn't installed.
    """
    return f"{_api().endpoint}/{repo}"


def upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool) -> str:
    """Writes files to a repository in one commit, and makes the repository if there is none.

    Args:
        repo: ``OWNER/NAME``.
        files: paths or contents by their paths in the repository; its other files stay.
        private: whether it must be private; a new one that needn't is public.

    Returns:
        The commit's address.

    Raises:
        InputError: ``huggingface_hub`` isn't installed, the user isn't logged in or may not write there, the
            repository is public but must be private, or the Hub can't be reached.
    """
    api = _api()
    from huggingface_hub import CommitOperationAdd

    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo, timeout=SECONDS).private:
            raise InputError(f"{repo} exists and is public: make it private in its settings, or name another")
        added = [
            CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
            for place, content in files.items()
        ]
        message = f"Upload a policy with paradiffpolicy {__version__}"
        return str(api.create_commit(repo, added, commit_message=message).commit_url)
    except InputError:
        raise
    except Exception as error:
        raise _refusal(HubName(repo), error) or InputError(
            f"{repo} can't be written ({first_line(error):.160}): try again; files change all or none"
        )


def _api() -> HfApi:
    if find_spec("huggingface_hub") is None:
        raise InputError("huggingface_hub isn't installed: pip install 'paradiffpolicy[hub]'")
    from huggingface_hub import HfApi

    return HfApi(library_name="paradiffpolicy", library_version=__version__)


def _refusal(name: HubName, error: Exception) -> InputError | None:
    """The Hub's answer as an error for the user; None: it isn't an answer, or says that the Hub is down."""
    from huggingface_hub import errors

    login = "or log in with 'hf auth login'"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name} is gated: ask for access on its page, {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name.repo} on the Hugging Face Hub has no revision {name.revision}: correct it")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"nothing is at {name}, and the Hugging Face Hub has no model of this name that you may see: "
            f"correct the path or the name, {login}"
        )
    if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code >= 500:
        return None
    if error.response.status_code in (401, 403):
        return InputError(f"{name}: the Hugging Face Hub doesn't allow it: use a token that may, {login}")
    return InputError(f"{name}: the Hugging Face Hub refuses ({first_line(error):.160}): correct the name")
