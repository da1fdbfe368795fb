"""The model's three files: from the hub into the ordinary Hugging Face cache, once.

huggingface_hub 2.4.0 throws away what it had when a download fails (`_download_to_tmp_and_move` in its
file_download.py), which hurts at 8.9 GB. So the bytes are fetched here, with its `http_get`, into
`blobs/HASH.incomplete`, where the next run goes on; the library then finds the blob and links it.
A blob is named after its hash (sha256, or git's sha1 for small files), so it can be checked offline.
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

from . import Stop
from .delay import cache_folder

FILES = ("params.json", "tekken.json", "consolidated.safetensors")
# Revisions that were tried, or that others pin: see the README.
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
    if all(isinstance(path, str) for path in paths):
        bad = [blob for path in paths if not is_whole(blob := Path(path).resolve())]
        if not bad:
            return Path(paths[-1]).parent
        for blob in bad:
            print(f"warning: {blob} is damaged: downloading it again", file=sys.stderr)
            blob.unlink()
    if constants.HF_HUB_OFFLINE:
        raise Stop(
            f"{repository} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it: unset it"
        )
    return fetch_all(repository, revision, Path(constants.HF_HUB_CACHE))


def fetch_all(repository: str, revision: str, cache: Path) -> Path:
    """Download what is missing. Raises Stop for everything that can go wrong on the way."""
    import httpx2
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, utils

    utils.logging.set_verbosity_error()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page = f"{endpoint}/{repository}"
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        wanted = {file: get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)) for file in FILES}
        if not all(about.etag and about.commit_hash and about.size for about in wanted.values()):
            raise Stop(f"{endpoint} does not answer as a hub does: is there a login page or a proxy in between?")
        missing = {f: about for f, about in wanted.items() if not (blobs / about.etag).exists()}
        partial = sum(
            p.stat().st_size for about in missing.values() if (p := blobs / f"{about.etag}.incomplete").exists()
        )
        to_come = sum(about.size for about in missing.values()) - partial
        if to_come > (free := shutil.disk_usage(blobs).free):
            raise Stop(
                f"{to_come / 1e9:.1f} GB are still to be downloaded to {cache}, but {free / 1e9:.1f} GB are free: "
                "make room there, or set HF_HOME to a folder on another disk"
            )
        if missing:
            print(f"downloading {repository} to {cache}: {to_come / 1e9:.1f} GB", file=sys.stderr)
        for file, about in missing.items():
            url = hf_hub_url(repository, file, revision=about.commit_hash)
            fetch(url, file, blobs / about.etag, about.size)
        path = ""
        for file in FILES:
            # Finds the blob and makes the link, and the note of what `main` is.
            path = hf_hub_download(repository, file, revision=revision)
            if not is_whole(Path(path).resolve()):
                raise Stop(f"{file} came damaged from {page}: run this again")
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
        mend = "look at HF_TOKEN" if status in (401, 403) else "try again later"
        raise Stop(f"{page} answers with HTTP {status}: {mend}") from None
    except (httpx2.TransportError, errors.LocalEntryNotFoundError):
        raise Stop(f"{page} cannot be reached: the first start needs the network, later ones do not") from None
    except OSError as error:
        raise Stop(f"{error.filename or cache}: {error.strerror or error}") from None
    return Path(path).parent


def fetch(url: str, name: str, blob: Path, size: int) -> None:
    """Download one file of `size` bytes to `blob`, going on where an earlier try ended. Raises Stop, OSError."""
    import httpx2
    from huggingface_hub import utils
    from huggingface_hub.file_download import http_get

    class Lines(utils.tqdm):
        """In a journal a line a minute is better than a bar that is drawn over."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"mininterval": 60, "maxinterval": 60, "disable": False})

        def display(self, msg=None, pos=None):
            print(self, file=sys.stderr, flush=True)

    partial = blob.with_name(f"{blob.name}.incomplete")
    headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    tries = 0
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another program downloads {name}: wait for it") from None
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)
        while (there := file.tell()) < size:
            options = {"expected_size": size, "displayed_filename": name, "headers": headers}
            try:
                http_get(url, file, resume_size=there, tqdm_class=None if sys.stderr.isatty() else Lines, **options)
            except (httpx2.TransportError, OSError) as error:
                if getattr(error, "errno", None):  # the disk, not the network
                    raise
                tries = tries + 1 if file.tell() <= there else 0
                if tries == TRIES:
                    raise Stop(
                        f"the download of {name} broke off at {file.tell() / 1e9:.2f} of {size / 1e9:.2f} GB: "
                        "run this again, it goes on from there"
                    ) from None
                time.sleep(1)
    if file_hash(partial, blob.name) != blob.name:
        partial.unlink()
        raise Stop(f"{name} came damaged from the hub: run this again")
    partial.replace(blob)


def is_whole(blob: Path) -> bool:
    """Whether a blob's bytes are those of its name. Reads them only if they may have changed since the last time."""
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True  # no symbolic links here, so no hash: the library has checked its size
    notes = cache_folder() / "checked.json"
    try:
        known = json.loads(notes.read_text())
    except (OSError, ValueError):
        known = {}
    status = blob.stat()
    now = [status.st_size, status.st_mtime_ns]
    if known.get(str(blob)) == now:
        return True
    if file_hash(blob, blob.name) != blob.name:
        return False
    notes.with_suffix(".new").write_text(json.dumps(known | {str(blob): now}))
    notes.with_suffix(".new").replace(notes)
    return True


def file_hash(path: Path, name: str) -> str:
    """The hash the hub names a file after: sha256 of large files, git's sha1 of small ones."""
    with open(path, "rb") as file:
        if len(name) == 64:
            if path.stat().st_size > 1e9:
                print(f"checking {path.name}", file=sys.stderr)
            return hashlib.file_digest(file, "sha256").hexdigest()
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        git.update(file.read())
        return git.hexdigest()
