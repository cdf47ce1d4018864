#!/usr/bin/env python3
"""Get a corpus archive (from a URL or a local file) and unpack it safely into a directory.

    utils/data/fetch_archive.py --url http://host/corpus.tar.gz --download-dir downloads --out corpus/name
    utils/data/fetch_archive.py --archive /data/corpus.tar.gz --out corpus/name

Downloading resumes: what has arrived lies in FILE.part and the next attempt asks only for the rest (RFC 9110, section 14). An
archive is never trusted: names that are absolute or climb with `..`, links, devices and absurd sizes are refused before the
first byte is written, and the output directory appears in one rename when everything is in it. Running the command again on
the same archive returns at once.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from speechtx.config.errors import DataError, SpeechtxError

CHUNK = 1 << 18
STAMP = ".archive.json"  # inside the unpacked directory: which archive it came from


def fetch(url: str, path: Path, *, attempts: int = 5, timeout: float = 30.0, pause: float = 2.0) -> Path:
    """Downloads `url` to `path`, resuming from `path.part`, with up to `attempts` connections.

    Args:
        url: http or https address.
        path: where the complete file appears; if it is there already, nothing is asked of the network.
        attempts: connections that may fail without bringing a single new byte before giving up.
        timeout: seconds of silence after which a connection counts as dead.
        pause: seconds before the second attempt; doubles with each further one.

    Raises:
        DataError: the server refuses, or nothing more arrives.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures, reason = 0, ""
    while failures < attempts:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, timeout=timeout):
                os.replace(part, path)
                return path
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500:  # asking again will not change the server's mind
                raise DataError(f"{url}: the server answered {error.code} {error.reason}. {_by_hand(path)}") from error
            reason = f"the server answered {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = str(getattr(error, "reason", error))
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures:
            time.sleep(pause * 2 ** (failures - 1))
    arrived = part.stat().st_size if part.exists() else 0
    raise DataError(
        f"{url}: download failed ({reason}); {arrived} bytes are kept in {part} and the same command resumes. {_by_hand(path)}"
    )


def _by_hand(path: Path) -> str:
    return f"Without access, fetch {path.name} by other means and pass it with --archive FILE."


def _fetch_rest(url: str, part: Path, *, timeout: float) -> bool:
    """One connection: appends what is missing to `part`; True when the file is complete."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing beyond what we have: either complete, or a leftover of another file.
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            return True
        part.unlink()
        return False
    with response:
        if have and response.status != 206:  # a server without ranges starts over, and so do we
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with (
            open(part, "ab" if have else "wb") as out,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, delay=2, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_members(archive: Path, members: Sequence[tarfile.TarInfo], *, max_bytes: int) -> None:
    """Raises DataError for the first member that must not be unpacked."""
    total = 0
    for member in members:
        name = member.name
        where = f"{archive}: member {name!r}"
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or "\\" in name or "\0" in name:
            raise DataError(f"{where} has an absolute or malformed name; refused, nothing was unpacked")
        if ".." in pure.parts:
            raise DataError(f"{where} climbs out of its directory with '..'; refused, nothing was unpacked")
        if member.issym() or member.islnk():
            raise DataError(f"{where} is a link to {member.linkname!r}; refused, nothing was unpacked")
        if not (member.isreg() or member.isdir()):
            raise DataError(f"{where} is neither a file nor a directory (type {member.type!r}); refused, nothing was unpacked")
        total += member.size
    if total > max_bytes:
        raise DataError(f"{archive}: would unpack to {total} bytes, more than the {max_bytes} allowed; nothing was unpacked")


def extract(archive: Path, out_dir: Path, *, max_bytes: int = 8 << 30, digest: str | None = None) -> bool:
    """Unpacks a tar archive into `out_dir`, which appears complete or not at all.

    Args:
        archive: a tar file, compressed or not.
        out_dir: directory to create; an older one that came from another archive is replaced.
        max_bytes: limit on the unpacked size.
        digest: SHA-256 of the archive if known already.

    Returns:
        False when `out_dir` already holds this archive and nothing had to be done.

    Raises:
        DataError: the archive is missing, damaged, or has members that could write elsewhere.
    """
    if not archive.is_file():
        raise DataError(f"{archive}: no such archive")
    digest = digest or sha256_of(archive)
    stamp = out_dir / STAMP
    if stamp.is_file() and json.loads(stamp.read_text())["sha256"] == digest:
        return False
    if out_dir.exists() and not stamp.is_file():
        raise DataError(f"{out_dir}: exists, but was not unpacked by this command; move it away first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = tar.getmembers()
            _check_members(archive, members, max_bytes=max_bytes)
            assert tar.fileobj is not None
            while tar.fileobj.read(CHUNK):  # to the very end, because only there gzip compares its checksum
                pass
            for member in tqdm(members, unit="file", desc=f"unpack {archive.name}", delay=2, disable=None):
                _write_member(tar, member, scratch)
        (scratch / STAMP).write_text(json.dumps({"archive": archive.name, "sha256": digest}) + "\n")
        scratch.chmod(0o755)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        os.replace(scratch, out_dir)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{archive}: damaged or not a tar archive ({error}); fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    """Writes one checked member; permissions, owners and times of the archive are not taken over."""
    target = root / member.name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None, "checked: a regular file"
    with source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, CHUNK)
    if target.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="where the archive is published")
    parser.add_argument("--archive", type=Path, help="a copy you already have; then nothing is downloaded")
    parser.add_argument("--download-dir", type=Path, default=Path("downloads"), help="where a download is kept (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory to unpack into")
    parser.add_argument("--sha256", action="append", default=[], help="a known digest of the archive (may be repeated)")
    parser.add_argument("--max-mib", type=int, default=8192, help="refuse to unpack more than this (%(default)s)")
    args = parser.parse_args(argv)
    if (args.url is None) == (args.archive is None):
        parser.error("give either --url or --archive")
    try:
        archive = args.archive or fetch(args.url, args.download_dir / args.url.rsplit("/", 1)[-1])
        if not archive.is_file():
            raise DataError(f"{archive}: no such archive")
        digest = sha256_of(archive)
        if args.sha256 and digest not in args.sha256:
            # Archives are repacked now and then with the same contents, so the caller checks the contents and this is a warning.
            print(
                f"{archive}: warning: SHA-256 {digest} is none of the known ones; its contents are checked next", file=sys.stderr
            )
        done = extract(archive, args.out, max_bytes=args.max_mib << 20, digest=digest)
    except SpeechtxError as error:
        print(f"fetch_archive: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {'unpacked from' if done else 'already unpacked from'} {archive}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
