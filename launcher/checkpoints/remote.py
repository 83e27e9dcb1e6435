"""Checkpoints in an object store, by any fsspec URL: a copy from which another machine goes on.

A checkpoint there is what a checkpoint is here: its files, and last of all its manifest, without which nobody looks at
them. Object stores make each object appear whole; nothing is renamed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.checkpoints import folders
from launcher.checkpoints.disk import sync_folder
from launcher.checkpoints.files import path_inside
from launcher.checkpoints.manifest import MANIFEST_NAME, Manifest, faults_of, parse_manifest
from launcher.checkpoints.retention import Candidate, is_pinned, score_of, to_prune
from launcher.errors import CheckpointError, StorageError
from launcher.recipe.run_sections import CheckpointSection


class RemoteCheckpoints:
    """A run's checkpoints below a URL, which belongs to this run alone.

    Args:
        url: such as `s3://bucket/runs/mine`, or a path.

    Raises:
        StorageError: fsspec does not know the URL's kind, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self.files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StorageError(f"checkpoint.directory {url} cannot be used: {error}") from error
        self.root = str(root).rstrip("/")

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints there, ascending.

        Raises:
            StorageError: the store does not answer.
        """
        try:
            self.files.invalidate_cache()
            if not self.files.exists(self.root):
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self.files.ls(self.root, detail=False)]
            found = [name for name in names if folders.is_name(name)]
            return sorted(
                folders.step_of(Path(name)) for name in found if self.files.exists(self._path(name, MANIFEST_NAME))
            )
        except Exception as error:  # each store has exceptions of its own
            raise self._failure("be listed", error) from error

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint there says of itself.

        Raises:
            CheckpointError: it is damaged or of another version.
        """
        return parse_manifest(self._manifest_bytes(step), self._path(folders.folder_name(step)))

    def _manifest_bytes(self, step: int) -> bytes:
        try:
            content: bytes = self.files.cat_file(self._path(folders.folder_name(step), MANIFEST_NAME))
        except Exception as error:
            raise self._failure("be read", error) from error
        return content

    def upload(self, folder: Path) -> bool:
        """Copy a committed checkpoint there, its manifest last.

        Returns:
            Whether there was something to do.

        Raises:
            StorageError: the store refused it, or the folder was pruned meanwhile; nothing half is left to be read.
        """
        step = folders.step_of(folder)
        try:
            content = (folder / MANIFEST_NAME).read_bytes()
            marker = self._path(folder.name, MANIFEST_NAME)
            if self.files.exists(marker):
                if self._manifest_bytes(step) == content:
                    return False
                self.files.rm_file(marker)
            for name, record in parse_manifest(content, str(folder)).files.items():
                target = self._path(folder.name, name)
                self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(path_inside(folder, name)), target)
                if (size := self.files.info(target)["size"]) != record.size:
                    raise StorageError(f"{target} has {size:,} bytes instead of {record.size:,}")
            self.files.pipe_file(marker, content)
        except (StorageError, CheckpointError):
            raise
        except Exception as error:
            raise self._failure(f"take {folder.name}", error) from error
        return True

    def download(self, step: int, checkpoints: Path) -> Path:
        """Fetch a checkpoint into a run's folder; it appears there once it verifies.

        Raises:
            CheckpointError: what came is not what the manifest says.
            StorageError: the store or the disk fails.
        """
        content = self._manifest_bytes(step)
        name = folders.folder_name(step)
        manifest = parse_manifest(content, self._path(name))
        incomplete = checkpoints / (name + folders.INCOMPLETE)
        shutil.rmtree(incomplete, ignore_errors=True)
        try:
            incomplete.mkdir(parents=True)
            for file in manifest.files:
                target = path_inside(incomplete, file)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(self._path(name, file), str(target))
            (incomplete / MANIFEST_NAME).write_bytes(content)
        except CheckpointError:
            raise
        except Exception as error:
            raise self._failure(f"give {name}", error) from error
        if wrong := faults_of(incomplete, contents=True):
            raise CheckpointError(f"{name} from {self.url} is damaged: {'; '.join(wrong)}")
        final = checkpoints / name
        if final.exists():
            folders.set_aside(final)
        incomplete.rename(final)
        sync_folder(checkpoints)
        return final

    def prune(self, section: CheckpointSection, checkpoints: Path) -> list[int]:
        """Delete there what the recipe does not keep; what is pinned here is kept there.

        Returns:
            Steps that were deleted.
        """
        candidates = []
        for step in self.steps():
            try:
                loss = score_of(self.manifest(step))
            except CheckpointError:
                loss = None
            candidates.append(Candidate(step, loss, is_pinned(checkpoints / folders.folder_name(step))))
        going = to_prune(candidates, section)
        for step in going:
            place = self._path(folders.folder_name(step))
            try:
                self.files.rm_file(f"{place}/{MANIFEST_NAME}")  # first, so that nobody trusts the rest
                self.files.rm(place, recursive=True)
            except FileNotFoundError:
                continue
            except Exception as error:
                raise self._failure("be pruned", error) from error
        return going

    def _failure(self, what: str, error: Exception) -> StorageError:
        return StorageError(f"checkpoint.directory {self.url} cannot {what}: {type(error).__name__}: {error}")


def fetch_newest(remote: RemoteCheckpoints, checkpoints: Path, tell: Callable[[str], None]) -> Path | None:
    """Give a machine that has no checkpoint, or only older ones, the newest one that is there and whole.

    Args:
        remote: where to look.
        checkpoints: the run's folder.
        tell: told a line about each damaged one, and about the one that came.
    """
    present = folders.newest_of_full_size(checkpoints)
    newest_here = -1 if present is None else folders.step_of(present)
    for step in reversed([step for step in remote.steps() if step > newest_here]):
        try:
            folder = remote.download(step, checkpoints)
        except CheckpointError as error:
            tell(f"{error}; the one before it is used")
            continue
        tell(f"fetched {folder.name} from {remote.url}")
        return folder
    return None
