"""utils/data/fetch_archive.py: a download that resumes, and an extraction that trusts nothing."""

from __future__ import annotations

import http.server
import importlib.util
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from speechtx.config.errors import DataError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fetch_archive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_archive", REPO / "utils" / "data" / "fetch_archive.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTENT = random.Random(0).randbytes(300_000)


class Server:
    """A web server for one file, with the faults real ones have; remembers the Range headers it was sent."""

    def __init__(self, *, ranges: bool = True, drop_after: int | None = None, status: int = 200, chunked: bool = False) -> None:
        self.requests: list[str | None] = []
        self.drop_after = drop_after
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(wanted)
                if status != 200:
                    self.send_error(status)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
                if start >= len(CONTENT):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                    self.end_headers()
                    return
                body = CONTENT[start:]
                self.send_response(206 if start else 200)
                if chunked:  # the length is not told beforehand
                    self.send_header("Transfer-Encoding", "chunked")
                    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
                else:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if outer.drop_after is not None:
                    body, outer.drop_after = body[: outer.drop_after], None
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/corpus.tar.gz"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[Server] = []

    class Tracked(Server):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            servers.append(self)

    yield Tracked
    for server in servers:
        server.close()


def test_a_download_arrives_whole_and_is_not_fetched_twice(fetch_archive, serve, tmp_path):
    server, path = serve(), tmp_path / "downloads" / "corpus.tar.gz"
    fetch_archive.fetch(server.url, path)
    fetch_archive.fetch(server.url, path)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_dropped_connection_resumes_where_it_stopped(fetch_archive, serve, tmp_path):
    server, path = serve(drop_after=100_000), tmp_path / "corpus.tar.gz"
    fetch_archive.fetch(server.url, path, pause=0)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-"]


def test_a_connection_that_drops_without_having_told_the_length_is_no_whole_file(fetch_archive, serve, tmp_path):
    server, path = serve(drop_after=100_000, chunked=True), tmp_path / "corpus.tar.gz"
    fetch_archive.fetch(server.url, path, pause=0)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_an_interrupted_download_goes_on_with_the_next_command(fetch_archive, serve, tmp_path):
    server, path = serve(), tmp_path / "corpus.tar.gz"
    (tmp_path / "corpus.tar.gz.part").write_bytes(CONTENT[:250_000])
    fetch_archive.fetch(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["bytes=250000-"]


def test_a_server_without_ranges_does_not_corrupt_the_file(fetch_archive, serve, tmp_path):
    server, path = serve(ranges=False), tmp_path / "corpus.tar.gz"
    (tmp_path / "corpus.tar.gz.part").write_bytes(b"x" * 1000)
    fetch_archive.fetch(server.url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_is_complete_or_too_long_is_handled(fetch_archive, serve, tmp_path, size):
    server, path = serve(), tmp_path / "corpus.tar.gz"
    (tmp_path / "corpus.tar.gz.part").write_bytes((CONTENT + b"extra")[:size])
    fetch_archive.fetch(server.url, path, pause=0)
    assert path.read_bytes() == CONTENT


def test_a_missing_file_says_how_to_go_on_without_the_network(fetch_archive, serve, tmp_path):
    server = serve(status=404)
    with pytest.raises(DataError, match=r"answered 404.*--archive"):
        fetch_archive.fetch(server.url, tmp_path / "corpus.tar.gz", pause=0)
    assert len(server.requests) == 1


def test_a_broken_server_is_given_up_after_the_attempts(fetch_archive, serve, tmp_path):
    server = serve(status=503)
    with pytest.raises(DataError, match="503"):
        fetch_archive.fetch(server.url, tmp_path / "corpus.tar.gz", attempts=3, pause=0)
    assert len(server.requests) == 3


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def regular(name: str, content: bytes = b"data") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


HOSTILE = {
    "absolute": [regular("/tmp/speechtx-hostile-member")],
    "dotdot": [regular("../outside")],
    "dotdot-inside": [regular("a/../../outside")],
    "backslash": [regular("a\\..\\outside")],
    "symlink": [special("link", tarfile.SYMTYPE, "..")],
    "symlink-then-file": [special("link", tarfile.SYMTYPE, ".."), regular("link/outside")],
    "hardlink": [special("link", tarfile.LNKTYPE, "/etc/passwd")],
    "device": [special("disk", tarfile.BLKTYPE)],
    "character-device": [special("null", tarfile.CHRTYPE)],
    "fifo": [special("pipe", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_writes_nothing_anywhere(fetch_archive, tmp_path, members):
    room = tmp_path / "room"
    room.mkdir()
    archive = make_tar(tmp_path / "hostile.tar.gz", regular("fine.txt"), *members)
    with pytest.raises(DataError, match=r"hostile\.tar\.gz.*refused"):
        fetch_archive.extract(archive, room / "corpus" / "name")
    assert [path for path in room.rglob("*") if path.is_file()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.tar.gz", "room"]
    assert not Path("/tmp/speechtx-hostile-member").exists()


def test_an_archive_that_would_fill_the_disk_is_refused(fetch_archive, tmp_path):
    archive = make_tar(tmp_path / "bomb.tar.gz", regular("zeros", bytes(2_000_000)))
    with pytest.raises(DataError, match="more than the 1000000 allowed"):
        fetch_archive.extract(archive, tmp_path / "out", max_bytes=1_000_000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "not-a-tar"])
def test_a_damaged_archive_leaves_nothing_half_extracted(fetch_archive, tmp_path, damage):
    archive = make_tar(
        tmp_path / "a.tar.gz", *(regular(f"wav/{index}", random.Random(index).randbytes(5000)) for index in range(20))
    )
    data = bytearray(archive.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b"<html>not found</html>")
    archive.write_bytes(data)
    with pytest.raises(DataError, match="damaged or not a tar archive"):
        fetch_archive.extract(archive, tmp_path / "out" / "corpus")
    assert list((tmp_path / "out").iterdir()) == []


def test_extraction_happens_once_and_again_for_another_archive(fetch_archive, tmp_path):
    first = make_tar(tmp_path / "a.tar.gz", regular("one.txt", b"1"))
    second = make_tar(tmp_path / "b.tar.gz", regular("two.txt", b"2"))
    out = tmp_path / "corpus"
    assert fetch_archive.extract(first, out) is True
    assert fetch_archive.extract(first, out) is False
    assert fetch_archive.extract(second, out) is True
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == ["two.txt"]


def test_a_folder_that_the_user_made_is_not_overwritten(fetch_archive, tmp_path):
    archive = make_tar(tmp_path / "a.tar.gz", regular("one.txt"))
    out = tmp_path / "corpus"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="move it away"):
        fetch_archive.extract(archive, out)
    assert (out / "mine.txt").read_text() == "precious"


def test_an_unknown_digest_warns_and_a_missing_archive_fails(fetch_archive, tmp_path, capsys):
    archive = make_tar(tmp_path / "a.tar.gz", regular("one.txt"))
    assert fetch_archive.main(["--archive", str(archive), "--out", str(tmp_path / "out"), "--sha256", "0" * 64]) == 0
    assert fetch_archive.sha256_of(archive) in capsys.readouterr().err
    assert fetch_archive.main(["--archive", str(tmp_path / "no.tar.gz"), "--out", str(tmp_path / "out")]) == 1
    assert "no such archive" in capsys.readouterr().err
