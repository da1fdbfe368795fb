"""The model's three files: from the hub into the ordinary Hugging Face cache, once.

A file of the cache is snapshots/COMMIT/NAME, a link to blobs/ETAG, whose name is its hash: sha256 of large
files, git's sha1 of small ones. So it can be checked offline. huggingface_hub 2.4.0 may keep the bytes of a
large file in a place that all repositories share: blobs/ETAG is then a link too, to a name that is no sha256
(utils/_shared_blobs.py there). Hence the hash is taken from the first link, and what lies behind the second
is never changed here.

Large files come by Xet, the library's parallel download, where the hub offers it. The library throws away
what it had when a download fails (`_download_to_tmp_and_move` in its file_download.py), which hurts at
8.9 GB. So when Xet fails, and where there is none, the bytes are fetched here, with the library's `http_get`,
into a folder of our own beside the blobs, where the next run goes on.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import BinaryIO

from . import Stop, network
from .cache import cache_folder, place

FILES = ("params.json", "tekken.json", "consolidated.safetensors")
# Revisions that were tried, or that others pin: see docs/server.md.
PINNED = {"mistralai/Voxtral-Mini-4B-Realtime-2602": "2769294da9567371363522aac9bbcfdd19447add"}
TRIES = 3  # without a new byte


def is_full_size(name: str, folder: Path) -> bool:
    """Whether this is the published model, or one of its shapes."""
    if name in PINNED:
        return True
    try:
        params = json.loads((folder / "params.json").read_text())
        return (params["dim"], params["n_layers"]) == (3072, 26)
    except (OSError, ValueError, KeyError):
        return False


def download(repository: str, revision: str = "") -> Path:
    """Return the folder with the three files; the hub is asked only for what is missing. Raises Stop."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it is read at import, and asks the hub for one file more
    from huggingface_hub import constants, try_to_load_from_cache

    revision = revision or PINNED.get(repository, "main")
    try:
        paths = [try_to_load_from_cache(repository, file, revision=revision) for file in FILES]
    except ValueError:  # HFValidationError
        raise Stop(f"MODEL={repository} is neither a folder nor a name that a repository can have") from None
    try:
        bad = [path for path in paths if isinstance(path, str) and not is_whole(path)]
    except OSError as error:
        raise Stop(f"{error.filename}: {error.strerror}") from None
    if not bad and all(isinstance(path, str) for path in paths):
        return Path(paths[-1]).parent
    if constants.HF_HUB_OFFLINE:
        what = f"{bad[0]} is damaged" if bad else f"{repository} is not in {constants.HF_HUB_CACHE}"
        raise Stop(f"{what}, and HF_HUB_OFFLINE forbids to download it: unset it")
    damaged = {Path(os.readlink(path)).name for path in bad}
    return fetch_all(repository, revision, Path(constants.HF_HUB_CACHE), damaged)


def fetch_all(repository: str, revision: str, cache: Path, damaged: set[str]) -> Path:
    """Download what is missing, or among the blobs known as damaged. Raises Stop for all that can go wrong."""
    import httpx2
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, utils

    utils.logging.set_verbosity_error()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page = f"{endpoint}/{repository}"
    folder = cache / f"models--{repository.replace('/', '--')}"
    blobs, partials = folder / "blobs", folder / "voxtral-partial"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        wanted = {file: get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)) for file in FILES}
        if not all(about.etag and about.commit_hash and about.size for about in wanted.values()):
            raise Stop(f"{endpoint} does not answer as a hub does: is there a login page or a proxy in between?")
        missing = {
            file: about
            for file, about in wanted.items()
            if about.etag in damaged or not is_whole(blobs / about.etag, about.etag)
        }
        partial = sum(p.stat().st_size for about in missing.values() if (p := partials / about.etag).exists())
        to_come = sum(about.size for about in missing.values()) - partial
        if to_come > (free := shutil.disk_usage(blobs).free):
            raise Stop(
                f"{to_come / 1e9:.1f} GB are still to be downloaded to {cache}, but {free / 1e9:.1f} GB are free: "
                "make room there, or set HF_HOME to a folder on another disk"
            )
        if missing:
            print(f"downloading {repository} to {cache}: {to_come / 1e9:.1f} GB", file=sys.stderr)
        for file, about in missing.items():
            if (blob := blobs / about.etag).exists():
                print(f"warning: {blob} is damaged: downloading it again", file=sys.stderr)
            partials.mkdir(exist_ok=True)
            fetch(repository, file, about, partials / about.etag, blob)
        if partials.exists() and not any(partials.iterdir()):
            partials.rmdir()
        # Finds the blobs and makes the links, and the note of what `main` is.
        path = [hf_hub_download(repository, file, revision=revision) for file in FILES][-1]
    except errors.RevisionNotFoundError:
        raise Stop(f"{page} has no revision {revision}: see MODEL_REVISION") from None
    except errors.RemoteEntryNotFoundError as error:
        file = str(error.response.url).rsplit("/", 1)[-1]
        raise Stop(f"{page} has no {file}: MODEL must be a Voxtral Realtime in Mistral's format") from None
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        if isinstance(error, errors.GatedRepoError):
            text = f"{page} wants you to agree to its terms: do so there, then set HF_TOKEN to a token of yours"
        else:
            text = f"{page} does not exist, or is private: look at MODEL, or set HF_TOKEN to a token that may read it"
        raise Stop(f"{text} ({endpoint}/settings/tokens)") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = "look at HF_TOKEN" if status in (401, 403) else "try again later"
        raise Stop(f"{page} answers with HTTP {status}: {fix}") from None
    except (httpx2.TransportError, errors.LocalEntryNotFoundError) as error:
        text = f"{page} cannot be reached: {network.cause(error, endpoint)}"
        raise Stop(f"{text} (the first start needs the network, later ones do not)") from None
    except OSError as error:
        raise Stop(f"{error.filename or cache}: {error.strerror or error}") from None
    return Path(path).parent


def fetch(repository: str, file: str, about, partial: Path, blob: Path) -> None:
    """Download one file to `blob`: by Xet, or through `partial`, going on where an earlier try ended.

    `about` is the library's HfFileMetadata. What is at `blob` stays until the new file is whole. Raises Stop, OSError.
    """
    from huggingface_hub.file_download import is_xet_available

    with open(partial, "ab") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another program downloads {file}: wait for it") from None
        # The library would take a damaged blob for the file.
        by_xet = about.xet_file_data and is_xet_available() and not part.tell() and not os.path.lexists(blob)
        if not by_xet or not fetch_by_xet(repository, file, about.commit_hash, blob):
            fetch_by_http(repository, file, about, part)
            if file_hash(partial, about.etag) != about.etag:
                partial.unlink()
                raise Stop(f"{file} came damaged from the hub: run this again")
            partial.replace(blob)  # where that is a link to what all repositories share, the link is replaced
            note(blob, about.etag)
        partial.unlink(missing_ok=True)


def fetch_by_xet(repository: str, file: str, commit: str, blob: Path) -> bool:
    """The library's parallel download; False if it failed, or brought something else."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repository, file, revision=commit, tqdm_class=progress())
    except KeyboardInterrupt:
        raise Stop(f"stopped; {file} begins anew the next time (with HF_HUB_DISABLE_XET=1 it goes on)", 130) from None
    except Exception as error:  # Xet is in Rust: none of its many errors says that plain HTTP would fail too
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: Xet's download failed ({reason}): going on over plain HTTP", file=sys.stderr)
        return False
    return is_whole(blob, blob.name)


def fetch_by_http(repository: str, file: str, about, part: BinaryIO) -> None:
    """Append to `part` what it lacks. Raises Stop, OSError."""
    import httpx2
    from huggingface_hub import hf_hub_url, utils
    from huggingface_hub.file_download import http_get

    url, size = hf_hub_url(repository, file, revision=about.commit_hash), about.size
    headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    options = {"expected_size": size, "displayed_filename": file, "headers": headers, "tqdm_class": progress()}
    tries = 0
    if part.tell() > size:
        part.truncate(0)
        part.seek(0)
    while (there := part.tell()) < size:
        try:
            http_get(url, part, resume_size=there, **options)
        except (httpx2.TransportError, OSError) as error:
            if getattr(error, "errno", None):  # the disk, not the network
                raise
            tries = tries + 1 if part.tell() <= there else 0
            if tries == TRIES:
                raise Stop(
                    f"the download of {file} broke off at {part.tell() / 1e9:.2f} of {size / 1e9:.2f} GB: "
                    f"{network.cause(error, url)}; run this again, it goes on from there"
                ) from None
            time.sleep(1)
    part.flush()


def progress() -> type | None:
    """None: the library's bar. In a journal a line a minute is better than a bar that is drawn over."""
    from huggingface_hub import utils

    class Lines(utils.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"mininterval": 60, "maxinterval": 60, "disable": False})

        def display(self, msg=None, pos=None):
            print(self, file=sys.stderr, flush=True)

    return None if sys.stderr.isatty() else Lines


def is_whole(path: str | Path, name: str = "") -> bool:
    """Whether a file's bytes are those of its blob's `name`, by default the one that the link `path` goes to.

    Reads them only if they may have changed since the last time.
    """
    path = Path(path)
    if not path.exists():
        return False
    name = name or (Path(os.readlink(path)).name if path.is_symlink() else "")
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return True  # no symbolic links here, so no hash: the library has checked its size
    if known().get(str(path.resolve())) == [name, *state(path)]:
        return True
    if file_hash(path, name) != name:
        return False
    note(path, name)
    return True


def state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def known() -> dict[str, list]:
    """Of each file whose hash was checked: the hash, and size and time (ns) of the file then."""
    try:
        return json.loads((cache_folder() / "checked.json").read_text())
    except (OSError, ValueError):
        return {}


def note(path: Path, name: str) -> None:
    notes = json.dumps(known() | {str(path.resolve()): [name, *state(path)]})
    place(cache_folder() / "checked.json", lambda path: path.write_text(notes))


def file_hash(path: Path, name: str) -> str:
    """The hash the hub names a file after: sha256 of large files, git's sha1 of small ones."""
    from huggingface_hub.utils.sha import git_hash

    with open(path, "rb") as file:
        if len(name) == 40:
            return git_hash(file.read())
        if path.stat().st_size > 1e9:
            print(f"checking {path.name}", file=sys.stderr)
        return hashlib.file_digest(file, "sha256").hexdigest()
