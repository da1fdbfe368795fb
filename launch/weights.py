"""Downloads the model's three files once, into the usual Hugging Face cache.

A file of the cache is snapshots/COMMIT/NAME, a link to blobs/ETAG. ETAG is the file's hash: sha256 for large files,
git's sha1 for small ones. A file can therefore be checked offline. huggingface_hub 2.4.0 may store a large file in a
folder that all repositories share: blobs/ETAG is then also a link, to a name that is not a sha256 (its
utils/_shared_blobs.py). The hash is therefore the name of the first link, and shared files are never changed here.

Large files come by Xet, the library's parallel download, if the hub offers it. When a download fails, the library
deletes what it has received (`_download_to_tmp_and_move` in its file_download.py), which is costly at 8.9 GB. If Xet
fails or is not available, the files are downloaded here with the library's `http_get`, into a folder beside the
blobs. The next run resumes there.
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
from .files import cache_folder

FILES = ("params.json", "tekken.json", "consolidated.safetensors")
# Fixed revisions: see docs/server.md.
PINNED = {"mistralai/Voxtral-Mini-4B-Realtime-2602": "2769294da9567371363522aac9bbcfdd19447add"}
TRIES = 3  # in a row that bring no data


def is_full_size(name: str, folder: Path) -> bool:
    """Return whether this is the published model, or a model of the same shapes."""
    if name in PINNED:
        return True
    try:
        params = json.loads((folder / "params.json").read_text())
        return (params["dim"], params["n_layers"]) == (3072, 26)
    except (OSError, ValueError, KeyError):
        return False


def download(repository: str, revision: str = "") -> Path:
    """Return the folder with the three files. Only missing and damaged ones are downloaded. Raises Stop."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read at import; telemetry requests one more file
    from huggingface_hub import constants, try_to_load_from_cache

    revision = revision or PINNED.get(repository, "main")
    try:
        paths = [try_to_load_from_cache(repository, file, revision=revision) for file in FILES]
    except ValueError:  # HFValidationError
        raise Stop(f"MODEL={repository} is neither a folder nor a name that a repository can have") from None
    try:
        bad = [path for path in paths if isinstance(path, str) and not is_intact(path)]
    except OSError as error:
        raise Stop(f"{error.filename}: {error.strerror}") from None
    if not bad and all(isinstance(path, str) for path in paths):
        return Path(paths[-1]).parent
    if constants.HF_HUB_OFFLINE:
        what = f"{bad[0]} is damaged" if bad else f"{repository} is not in {constants.HF_HUB_CACHE}"
        raise Stop(f"{what}, and HF_HUB_OFFLINE forbids the download: unset it")
    return fetch_all(repository, revision, Path(constants.HF_HUB_CACHE))


def fetch_all(repository: str, revision: str, cache: Path) -> Path:
    """Download what is missing or damaged. Return the folder. Raises Stop for all errors."""
    import httpx2
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, utils

    utils.logging.set_verbosity_error()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page, folder = f"{endpoint}/{repository}", cache / f"models--{repository.replace('/', '--')}"
    blobs, partials = folder / "blobs", folder / "voxtral-partial"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        expected = {file: get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)) for file in FILES}
        if not all(about.etag and about.commit_hash and about.size for about in expected.values()):
            raise Stop(f"{endpoint} does not answer as a hub does: is there a login page or a proxy in between?")
        missing = {file: about for file, about in expected.items() if not is_intact(blobs / about.etag, about.etag)}
        partial = sum(p.stat().st_size for about in missing.values() if (p := partials / about.etag).exists())
        to_come = sum(about.size for about in missing.values()) - partial
        if to_come > (free := shutil.disk_usage(blobs).free):
            raise Stop(
                f"the download to {cache} needs {to_come / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: "
                "free disk space, or set HF_HOME to a folder on another disk"
            )
        if missing:
            print(f"downloading {repository} to {cache}: {to_come / 1e9:.1f} GB", file=sys.stderr)
            partials.mkdir(exist_ok=True)
        for file, about in missing.items():
            if (blob := blobs / about.etag).exists():
                print(f"warning: {blob} is damaged: downloading it again", file=sys.stderr)
            fetch(repository, file, about, partials / about.etag, blob)
        if missing and not any(partials.iterdir()):
            partials.rmdir()
        # Finds the blobs, makes the links, and records the commit of `main`.
        path = [hf_hub_download(repository, file, revision=revision) for file in FILES][-1]
    except errors.HfHubHTTPError as error:
        status, token = error.response.status_code, f"set HF_TOKEN to your token ({endpoint}/settings/tokens)"
        if isinstance(error, errors.RevisionNotFoundError):
            text = f"has no revision {revision}: see MODEL_REVISION"
        elif isinstance(error, errors.RemoteEntryNotFoundError):
            file = str(error.response.url).rsplit("/", 1)[-1]
            text = f"has no {file}: MODEL must be a Voxtral Realtime in Mistral's format"
        elif isinstance(error, errors.GatedRepoError):
            text = f"requires that you agree to its terms: agree there, then {token}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            text = f"does not exist, or is private: check MODEL, or {token}"
        else:
            text = f"answers with HTTP {status}: {'check HF_TOKEN' if status in (401, 403) else 'try again later'}"
        raise Stop(f"{page} {text}") from None
    except (httpx2.TransportError, errors.LocalEntryNotFoundError) as error:
        text = f"{page} cannot be reached: {network.cause(error, endpoint)}"
        raise Stop(f"{text} (the first start needs the network, later ones do not)") from None
    except OSError as error:
        raise Stop(f"{error.filename or cache}: {error.strerror or error}") from None
    return Path(path).parent


def fetch(repository: str, file: str, about, partial: Path, blob: Path) -> None:
    """Download one file to `blob`: by Xet, or by HTTP into `partial`, which resumes an earlier try.

    `about`: the library's HfFileMetadata. A file at `blob` stays until the new one is complete. Raises Stop, OSError.
    """
    from huggingface_hub.file_download import is_xet_available

    with open(partial, "ab") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another program is downloading {file}: wait for it") from None
        # The library would accept a damaged blob, so Xet is not used for one.
        by_xet = about.xet_file_data and is_xet_available() and not part.tell() and not os.path.lexists(blob)
        if not by_xet or not fetch_by_xet(repository, file, about.commit_hash, blob):
            fetch_by_http(repository, file, about, part)
            if not is_intact(partial, about.etag):
                partial.unlink()
                raise Stop(f"{file} was damaged during the download: run this again")
            partial.replace(blob)  # if that is a link to a shared file, this replaces the link
        partial.unlink(missing_ok=True)


def fetch_by_xet(repository: str, file: str, commit: str, blob: Path) -> bool:
    """Download with the library. Return False if that failed, or if the file is damaged. Raises Stop on Ctrl+C."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repository, file, revision=commit, tqdm_class=progress())
    except KeyboardInterrupt:
        raise Stop(f"stopped; the next start repeats {file} (with HF_HUB_DISABLE_XET=1 it resumes)", 130) from None
    except Exception as error:  # Xet has many errors, and with each of them plain HTTP may still work
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: Xet's download failed ({reason}): falling back to plain HTTP", file=sys.stderr)
        return False
    return is_intact(blob, blob.name)


def fetch_by_http(repository: str, file: str, about, part: BinaryIO) -> None:
    """Append to `part` the bytes that it lacks. Raises Stop, OSError."""
    import httpx2
    from huggingface_hub import hf_hub_url, utils
    from huggingface_hub.file_download import http_get

    url, size = hf_hub_url(repository, file, revision=about.commit_hash), about.size
    headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    options = {"expected_size": size, "displayed_filename": file, "headers": headers, "tqdm_class": progress()}
    tries = 0
    while (there := part.tell()) < size:
        try:
            http_get(url, part, resume_size=there, **options)
        except (httpx2.TransportError, OSError) as error:
            if getattr(error, "errno", None):  # the disk, not the network
                raise
            tries = tries + 1 if part.tell() <= there else 0
            if tries == TRIES:
                raise Stop(
                    f"the download of {file} was interrupted at {part.tell() / 1e9:.2f} of {size / 1e9:.2f} GB: "
                    f"{network.cause(error, url)}; run this again to resume it"
                ) from None
            time.sleep(1)
    part.flush()


def progress() -> type | None:
    """Return the class of the progress bar. None: the library's. In a log file it is one line a minute."""
    from huggingface_hub import utils

    class Lines(utils.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"mininterval": 60, "maxinterval": 60, "disable": False})

        def display(self, msg=None, pos=None):
            print(self, file=sys.stderr, flush=True)

    return None if sys.stderr.isatty() else Lines


def is_intact(path: str | Path, name: str = "") -> bool:
    """Return whether a file exists and has the hash `name`; default: the name of the blob to which `path` links.

    A file is read only if it changed since its last check. Raises OSError.
    """
    path = Path(path)
    if not path.exists():
        return False
    name = name or (Path(os.readlink(path)).name if path.is_symlink() else "")
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return True  # a system without symbolic links, hence no hash; the library has checked the size
    checked, about = cache_folder() / "checked", path.stat()
    line = f"{name} {about.st_ino} {about.st_size} {about.st_mtime_ns}\n"
    if checked.exists() and line in checked.read_text():
        return True
    if file_hash(path, name) != name:
        return False
    with checked.open("a") as file:
        file.write(line)
    return True


def file_hash(path: Path, name: str) -> str:
    """Return the hash of a file as the hub computes it. `name`, the expected one, decides: sha256 or git's sha1."""
    from huggingface_hub.utils.sha import git_hash

    with open(path, "rb") as file:
        if len(name) == 40:
            return git_hash(file.read())
        if path.stat().st_size > 1e9:
            print(f"checking {path.name}", file=sys.stderr)
        return hashlib.file_digest(file, "sha256").hexdigest()
