"""Bad networks, wrong files and hostile archives: each ends right, or in one clear sentence. No test leaves this machine."""
from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qtseg.data import download as data_download, sources
from qtseg.data.download import DownloadError, fetch
from qtseg.data.sources import fetch_kaggle, unpack


def zipped(**files: bytes) -> bytes:
    """A .zip in memory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


CONTENT = zipped(**{f"ISBI2016_ISIC_Part1_Training_Data__ISIC_{n:07d}.jpg": random.Random(n).randbytes(50_000) for n in range(6)})
OTHER = zipped(**{f"ISBI2016_ISIC_Part1_Training_Data__ISIC_{n:07d}.jpg": random.Random(n + 9).randbytes(50_000) for n in range(6)})
assert len(CONTENT) == len(OTHER) > 300_000
NAME = "ISBI2016_ISIC_Part1_Training_Data.zip"


class Handler(BaseHTTPRequestHandler):
    """Serves the archive's content; the next step of its script says what goes wrong with this request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        archive = self.server.archive
        archive.requests.append(dict(self.headers))
        step = archive.script.popleft() if archive.script else {}
        archive.content, archive.etag = step.get("content", archive.content), step.get("etag", archive.etag)
        if "status" in step:
            self.send_response(step["status"])
            for key, value in {"Content-Length": "0", "Content-Range": f"bytes */{len(archive.content)}", **step.get("headers", {})}.items():
                self.send_header(key, value)
            self.end_headers()
            return
        body, wish = archive.content, self.headers.get("Range")
        known = self.headers.get("If-Range")
        if wish and archive.ranges and (known in (None, archive.etag) or step.get("careless")):
            first = int(wish[len("bytes="):-1]) + step.get("off", 0)
            if first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            body = body[first:]
        else:
            self.send_response(200)
        if archive.etag:
            self.send_header("ETag", archive.etag)
        self.send_header("Content-Type", step.get("type", "application/zip"))
        if archive.lengths:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        self.send(body, step)

    def send(self, body, step):
        """The body: whole, cut short, cut short by a reset, in drops, or with a silence in the middle."""
        try:
            if "cut" in step:
                self.wfile.write(body[:step["cut"]])
                self.close_connection = True
            elif "drops" in step:
                for first in range(0, len(body), step["drops"]):
                    self.wfile.write(body[first:first + step["drops"]])
                    time.sleep(step["pause"])
            elif "silence" in step:
                self.wfile.write(body[:step["silence"]])
                self.server.archive.waiting.wait(5)
                self.close_connection = True
            else:
                self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client has had enough


class Archive:
    """A server on this machine that plays the ISIC archive."""

    def __init__(self):
        self.content, self.etag, self.ranges, self.lengths = CONTENT, '"one"', True, True
        self.script, self.requests, self.waiting = deque(), [], threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.archive = True, self
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/2016/{NAME}"

    def ranges_asked(self) -> list[str | None]:
        """The Range of each request."""
        return [request.get("Range") for request in self.requests]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """What is on this machine need not go round by a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def archive():
    one = Archive()
    yield one
    one.waiting.set()
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def get(archive, tmp_path):
    """fetch, from the archive into tmp_path, impatiently."""
    def fetch_it(**options):
        options = {"wait": 0.001, "timeout": 2.0, "progress": False, "checksums": tmp_path / "checksums.json", **options}
        return fetch(archive.url, tmp_path / NAME, **options)
    return fetch_it


def leftovers(folder: Path) -> list[str]:
    """Everything but the finished file, the record and the locks."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (NAME, "checksums.json", f".{NAME}.lock", ".checksums.json.lock"))


def refusal(error: type[Exception], function, *arguments, **options) -> str:
    """What it says when it refuses: one sentence on one line."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800
    return text


# --- fetch ---------------------------------------------------------------------------------------------------------------------

def test_a_good_network(archive, get, tmp_path):
    assert get().read_bytes() == CONTENT
    assert json.loads((tmp_path / "checksums.json").read_text()) == {NAME: hashlib.sha256(CONTENT).hexdigest()}
    assert leftovers(tmp_path) == [] and archive.ranges_asked() == [None]
    assert all(path.stat().st_mode & 0o666 == 0o666 for path in tmp_path.glob(".*.lock")), "another user can take the lock"


def test_cut_connections_are_continued_where_they_broke(archive, get, tmp_path):
    archive.script.extend([{"cut": 100_000}, {"cut": 50_000}, {"cut": 0}])
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert [request.get("If-Range") for request in archive.requests] == [None, '"one"', '"one"', '"one"']
    assert leftovers(tmp_path) == []


def test_attempts_in_a_row_without_anything_new_are_counted(archive, get, tmp_path):
    archive.script.extend([{"cut": 100_000}, *[{"cut": 0}] * 9])
    text = refusal(DownloadError, get, attempts=4)
    assert "ended after 100,000 of" in text and "100,000 bytes are kept" in text and "--from" in text and archive.url in text
    assert len(archive.requests) == 4  # the one that brought something is the first of four
    assert not (tmp_path / NAME).exists() and not (tmp_path / "checksums.json").exists()


def test_a_later_run_continues(archive, get):
    archive.script.append({"cut": 123_456})
    refusal(DownloadError, get, attempts=1)
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=123456-"]


def test_a_run_killed_just_before_the_end_needs_no_request(archive, get, monkeypatch, tmp_path):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_download, "accept", killed)
        get()
    assert get().read_bytes() == CONTENT and len(archive.requests) == 1 and leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["bytes", "link", "pipe", "another address", "note of nonsense"])
def test_a_part_of_unknown_origin_is_not_continued(archive, get, tmp_path, kind):
    part, note, evil = tmp_path / f"{NAME}.part", tmp_path / f"{NAME}.part.json", bytes(100)
    if kind == "link":
        (tmp_path / "precious").write_bytes(evil)
        part.symlink_to(tmp_path / "precious")
        note.symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.write_bytes(evil)
        if kind != "bytes":
            note.write_text(json.dumps({"url": [1] if kind == "note of nonsense" else "https://x", "validator": '"one"', "size": 1e99}))
    assert get().read_bytes() == CONTENT and archive.ranges_asked() == [None]
    assert not os.path.lexists(part) and not os.path.lexists(note) and (kind != "link" or (tmp_path / "precious").read_bytes() == evil)


def test_a_server_without_ranges_starts_from_nothing(archive, get):
    archive.ranges = False
    archive.script.extend([{"cut": 100_000}, {"cut": 200_000}])
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_without_ranges_that_always_breaks_at_one_place_is_given_up(archive, get):
    archive.ranges = False
    archive.script.extend([{"cut": 100_000}] * 50)
    refusal(DownloadError, get, attempts=3)
    assert len(archive.requests) == 3


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_version_the_size_decides(archive, get, etag):
    archive.etag = etag
    archive.script.append({"cut": 100_000})
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=100000-"] and "If-Range" not in archive.requests[1]


def test_a_file_that_changes_meanwhile_is_not_glued_together(archive, get):
    archive.script.extend([{"cut": 100_000}, {"content": OTHER, "etag": '"two"'}])
    assert get().read_bytes() == OTHER


def test_a_server_that_ignores_if_range_is_found_out(archive, get):
    archive.script.extend([{"cut": 100_000}, {"content": OTHER, "etag": '"two"', "careless": True}])
    assert get().read_bytes() == OTHER
    assert archive.ranges_asked() == [None, "bytes=100000-", None]


def test_a_server_that_sends_another_range_is_found_out(archive, get):
    archive.script.extend([{"cut": 100_000}, {"off": 7}])
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=100000-", None]


def test_a_file_that_has_become_shorter_is_fetched_anew(archive, get):
    """416: the server has nothing after the bytes that we hold."""
    short = zipped(a=b"a")
    archive.script.extend([{"cut": 100_000}, {"content": short, "careless": True}])
    assert get().read_bytes() == short
    assert archive.ranges_asked() == [None, "bytes=100000-", None]


def test_a_cut_body_without_length_is_no_complete_zip(archive, get, tmp_path):
    archive.lengths = False
    archive.script.append({"cut": 100_000})
    assert "no complete .zip" in refusal(DownloadError, get)
    assert leftovers(tmp_path) == [] and not (tmp_path / "checksums.json").exists()
    assert get().read_bytes() == CONTENT


def test_a_slow_trickle_is_no_error(archive, get):
    archive.script.append({"drops": 20_000, "pause": 0.03})
    assert get(timeout=0.4).read_bytes() == CONTENT  # 16 pauses, longer than the timeout together
    assert len(archive.requests) == 1


def test_silence_is_an_error_and_is_continued(archive, get):
    archive.script.append({"silence": 50_000})
    assert get(timeout=0.2).read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, "bytes=50000-"]


def test_a_trickle_is_given_up_and_can_be_continued(archive, get):
    """Each connection brings something, and still it must end."""
    archive.script.extend([{"drops": 500, "pause": 0.02}] * 3)
    text = refusal(DownloadError, get, timeout=0.2, least_speed=1e6, attempts=3)
    assert "too slow (only " in text and "bytes are kept" in text and len(archive.requests) == 3
    assert get().read_bytes() == CONTENT and archive.ranges_asked()[-1] is not None


def test_what_will_not_pass_is_said_at_once(archive, get, tmp_path):
    for count, status in enumerate((404, 403), 1):
        archive.script.append({"status": status})
        text = refusal(DownloadError, get, page="https://challenge.isic-archive.com/data/")
        assert f"answers {status}" in text and "https://challenge.isic-archive.com/data/" in text and "--from" in text
        assert len(archive.requests) == count and leftovers(tmp_path) == []


def test_what_may_pass_is_tried_again(archive, get):
    archive.script.extend([{"cut": 100_000}, *({"status": status} for status in (429, 503, 408))])
    assert get(attempts=8).read_bytes() == CONTENT
    assert archive.ranges_asked() == [None] + ["bytes=100000-"] * 4


def test_no_server_at_all(archive, get, tmp_path):
    archive.server.shutdown()
    archive.server.server_close()
    text = refusal(DownloadError, get, attempts=2)
    assert "no connection to 127.0.0.1" in text and "bytes are kept" not in text


def test_a_web_page_instead_of_the_file(archive, get, tmp_path):
    archive.script.append({"type": "text/html; charset=utf-8"})
    assert "web page instead of the file" in refusal(DownloadError, get)
    assert leftovers(tmp_path) == []


def test_an_empty_file_is_not_the_file(archive, tmp_path):
    archive.script.append({"status": 200})
    text = refusal(DownloadError, fetch, archive.url, tmp_path / "FIVES.rar", checksums=tmp_path / "c.json", progress=False)
    assert "empty" in text and not (tmp_path / "FIVES.rar").exists() and not (tmp_path / "c.json").exists()


def test_an_answer_of_another_kind_is_not_the_file(archive, get):
    """202, which figshare's bouncers use, is a success to urllib."""
    archive.script.append({"status": 202})
    assert get().read_bytes() == CONTENT and len(archive.requests) == 2


def test_only_https(tmp_path):
    for url in ("http://example.org/a.zip", "ftp://example.org/a.zip", "file:///etc/passwd", "a.zip"):
        assert "only https://" in refusal(ValueError, fetch, url, tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_no_hop_leads_astray(archive, get, tmp_path):
    for place in ("ftp://127.0.0.1/a.zip", "http://example.org/a.zip?token=SECRET", "//example.org/a.zip", "file:///etc/passwd", "data:text/plain,x"):
        archive.script.append({"status": 307, "headers": {"Location": place}})
        text = refusal(DownloadError, get)
        assert not archive.script and "SECRET" not in text
        assert "only https:// addresses are downloaded, got" in text or "cannot be downloaded" in text
    redirects, request = data_download.CheckedRedirects(), data_download.urllib.request.Request("https://isic.example/a.zip")
    text = refusal(ValueError, redirects.redirect_request, request, None, 302, "Found", {}, "http://127.0.0.1/admin")  # a hop in the middle
    assert "only https://" in text and leftovers(tmp_path) == []


def test_a_file_larger_than_the_limit(archive, get, tmp_path, monkeypatch):
    text = refusal(DownloadError, get, most=len(CONTENT) - 1)
    assert f"{len(CONTENT):,} bytes" in text and f"QTSEG_MAX_DOWNLOAD={len(CONTENT)} " in text and leftovers(tmp_path) == []
    archive.lengths = False  # not announced
    assert "QTSEG_MAX_DOWNLOAD=" in refusal(DownloadError, get, most=100_000) and leftovers(tmp_path) == []
    monkeypatch.setenv("QTSEG_MAX_DOWNLOAD", str(len(CONTENT)))
    assert get(most=100_000).read_bytes() == CONTENT
    monkeypatch.setenv("QTSEG_MAX_DOWNLOAD", "1 GB")
    assert "QTSEG_MAX_DOWNLOAD must be a whole number, got '1 GB'" in refusal(ValueError, get)


def test_a_redirect_is_followed_with_its_range(archive, get):
    archive.script.extend([{"status": 302, "headers": {"Location": archive.url + "?signed"}}, {"cut": 100_000},
                           {"status": 302, "headers": {"Location": archive.url + "?signed"}}])
    assert get().read_bytes() == CONTENT
    assert archive.ranges_asked() == [None, None, "bytes=100000-", "bytes=100000-"]


def test_a_wrong_checksum(archive, get, tmp_path):
    (tmp_path / "checksums.json").write_text(json.dumps({NAME: "0" * 64, "another.zip": "1" * 64}))
    text = refusal(DownloadError, get)
    assert "another SHA-256 than was recorded" in text and "checksums.json" in text
    assert not (tmp_path / NAME).exists() and (tmp_path / f"{NAME}.wrong").read_bytes() == CONTENT
    assert json.loads((tmp_path / "checksums.json").read_text())[NAME] == "0" * 64
    (tmp_path / "checksums.json").write_text(json.dumps({"another.zip": "1" * 64}))  # the remedy
    assert get().read_bytes() == CONTENT
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == {NAME, "another.zip"}


def test_a_file_that_rotted_on_the_disk_is_fetched_again(archive, get, tmp_path, capsys):
    damaged = bytearray(get().read_bytes())
    damaged[1000] ^= 1
    (tmp_path / NAME).write_bytes(damaged)
    assert get().read_bytes() == CONTENT
    assert (tmp_path / f"{NAME}.wrong").read_bytes() == damaged and "has changed" in capsys.readouterr().out


def test_a_file_put_there_by_hand_is_taken_and_recorded(archive, get, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    get()
    assert archive.requests == [] and json.loads((tmp_path / "checksums.json").read_text())[NAME] == hashlib.sha256(CONTENT).hexdigest()


def test_a_broken_record_is_said(archive, get, tmp_path):
    for text in ("{", "[1]", "7", '{"a.zip": 5}', '{"a":' * 100_000, '{"a.zip": ' + "9" * 5000 + "}"):
        (tmp_path / "checksums.json").write_text(text)
        assert "holds no checksums" in refusal(DownloadError, get)
        assert (tmp_path / "checksums.json").read_text() == text


def test_planted_links_beside_the_file_overwrite_nothing(archive, get, tmp_path):
    (tmp_path / "precious").write_text("mine")
    for place in (f".{NAME}.lock", ".checksums.json.lock"):
        (tmp_path / place).symlink_to(tmp_path / "precious")
        assert place in refusal(OSError, get)
        (tmp_path / place).unlink()
    assert get().read_bytes() == CONTENT and (tmp_path / "precious").read_text() == "mine"


def test_no_room_is_said_before_anything_is_written(archive, get, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    text = refusal(OSError, get)
    assert "no space" in text and "0 MB are free" in text
    assert not (tmp_path / NAME).exists() and len(archive.requests) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full")
def test_a_disk_that_fills_up_on_the_way(archive, get, tmp_path, monkeypatch):
    usual = open
    def full(path, mode="r", *more, **options):
        return usual("/dev/full", "ab") if mode == "ab" else usual(path, mode, *more, **options)

    monkeypatch.setattr("builtins.open", full)
    assert "No space left" in refusal(OSError, get) and len(archive.requests) == 1, "a full disk is not tried again; prepare_set names the remedy"


def test_the_bar_counts_what_came_before(archive, get, capsys):
    archive.script.append({"cut": 100_000})
    get(progress=True)
    said = capsys.readouterr().out
    assert "100,000 bytes are kept" in said and "100%" in said and NAME in said


def test_without_progress_nothing_is_printed(archive, get, capsys):
    archive.script.extend([{"cut": 100_000}, {"status": 503}])
    get(progress=False)
    assert capsys.readouterr() == ("", "")


def test_two_threads_download_once(archive, get, capsys):
    archive.script.append({"drops": 30_000, "pause": 0.02})
    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get().read_bytes() == CONTENT and len(archive.requests) == 1
    assert capsys.readouterr().out.count("waiting for another process") == 3, "said once by each that waits"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to have a second process without importing everything again")
def test_a_killed_process_leaves_its_bytes_and_no_lock(archive, get, tmp_path):
    archive.script.append({"silence": 100_000})
    other = os.fork()
    if other == 0:
        try:
            get(timeout=20)
        finally:
            os._exit(1)
    part, deadline = tmp_path / f"{NAME}.part", time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    waiter = threading.Thread(target=get)
    waiter.start()
    time.sleep(0.1)
    assert waiter.is_alive() and len(archive.requests) == 1, "the second one waits"
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    waiter.join(20)
    assert (tmp_path / NAME).read_bytes() == CONTENT and leftovers(tmp_path) == []
    assert int(archive.ranges_asked()[1][len("bytes="):-1]) > 0


def test_many_records_at_once_lose_none(tmp_path):
    checksums, content = tmp_path / "checksums.json", hashlib.sha256(b"x").hexdigest()
    (tmp_path / "x").write_bytes(b"x")
    threads = [threading.Thread(target=data_download.is_recorded, args=(tmp_path / "x", f"{n}.zip", checksums)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(checksums.read_text()) == {f"{n}.zip": content for n in range(16)}


# --- fetch_kaggle --------------------------------------------------------------------------------------------------------------

STUB = '''
import os, sys, pathlib, requests
BEHAVIOUR = os.environ["STUB"]
print("Warning: Looks like you're using an outdated API Version")
if BEHAVIOUR == "exit at import":
    exit(1)


class Api:
    _authenticated = BEHAVIOUR != "no token"

    def authenticate(self):
        print("Authentication required to call the Kaggle API.")
        exit(1)

    def download(self, name, path, quiet):
        assert quiet and sys.argv[:3] == ["kaggle", self.kind, "download"]
        target = pathlib.Path(path) / (name.split("/")[-1] + ".zip")
        if BEHAVIOUR.isdigit():
            error = requests.exceptions.HTTPError(f"{BEHAVIOUR} Client Error for url: https://x?Signature=S3CRET")
            error.response = type("Response", (), {"status_code": int(BEHAVIOUR)})()
            raise error
        if BEHAVIOUR == "no network":
            raise requests.exceptions.ConnectionError("HTTPSConnectionPool(host='api.kaggle.com')")
        if BEHAVIOUR == "bug":
            raise TypeError("token KGAT_0123456789abcdef0123456789 was " + os.environ["KAGGLE_API_TOKEN"])
        if BEHAVIOUR == "full":
            raise OSError(28, "No space left on device")
        if BEHAVIOUR == "crash":
            os._exit(3)
        if BEHAVIOUR == "stall":
            target.write_bytes(b"PK"), target.with_name(".pid").write_text(str(os.getpid()))
            target.with_name(".pid").rename(target.with_name("pid")), __import__("time").sleep(30)
        if BEHAVIOUR == "part":
            target.write_bytes(b"PK"), pathlib.Path(f"{target}.kaggle-partial").write_text("{}")
            raise ConnectionError("reset")
        if BEHAVIOUR == "continue":
            assert target.read_bytes() == b"PK"
        if BEHAVIOUR == "no leftover":
            assert not target.exists()
        target.write_bytes(b"<html>" if BEHAVIOUR == "web page" else pathlib.Path(os.environ["STUB_ZIP"]).read_bytes())
        pathlib.Path(f"{target}.kaggle-partial").unlink(missing_ok=True)

    def dataset_download_files(self, name, path=None, quiet=True):
        self.kind = "datasets"
        self.download(name, path, quiet)

    def competition_download_files(self, name, path=None, quiet=True):
        self.kind = "competitions"
        self.download(name, path, quiet)


api = Api()
'''
REQUESTS = '''
class RequestException(IOError): pass
class HTTPError(RequestException): pass
class ConnectionError(RequestException): pass
'''
BUSI = "aryashah2k/breast-ultrasound-images-dataset"
SECRET = "KGAT_5ecret0f7he7est0123456789abc"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """fetch_kaggle against a stub of the package, which a child process imports; the first argument says how it behaves."""
    stubs = tmp_path / "stubs"
    for name, text in {"kaggle": STUB, "requests": ""}.items():
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text(text)
    (stubs / "requests" / "__init__.py").write_text("from . import exceptions\n")
    (stubs / "requests" / "exceptions.py").write_text(REQUESTS)
    (tmp_path / "stub.zip").write_bytes(zipped(**{"benign__benign (1).png": b"picture"}))
    monkeypatch.setenv("PYTHONPATH", str(stubs))
    monkeypatch.setenv("STUB_ZIP", str(tmp_path / "stub.zip"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)

    def fetch_it(behavior, kind="dataset", name=BUSI, **options):
        monkeypatch.setenv("STUB", behavior)
        options = {"checksums": tmp_path / "out" / "checksums.json", "progress": False, **options}
        return fetch_kaggle(kind, name, tmp_path / "out", **options)
    return fetch_it


@pytest.mark.parametrize(("kind", "name"), [("dataset", BUSI), ("competition", "bkai-igh-neopolyp")])
def test_kaggle_success(kaggle, tmp_path, kind, name, capsys):
    path = kaggle("well", kind, name)
    assert path == tmp_path / "out" / f"{name.split('/')[-1]}.zip" and zipfile.is_zipfile(path)
    assert json.loads((tmp_path / "out" / "checksums.json").read_text()) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sorted(file.name for file in path.parent.glob("[!.]*")) == sorted([path.name, "checksums.json"])
    assert capsys.readouterr() == ("", "")


def test_kaggle_is_not_asked_twice(kaggle):
    assert kaggle("well") == kaggle("crash")


@pytest.mark.parametrize(("behavior", "words"), [
    ("no token", "wants an API token, and there is none"),
    ("exit at import", "wants an API token, and there is none"),  # as kaggle 2.0 in Colab does
    ("403", "accept the rules at https://www.kaggle.com/competitions/data-science-bowl-2018/rules first"),
    ("no network", "no connection to Kaggle (ConnectionError)"),
    ("bug", "the kaggle client failed (TypeError"),
    ("crash", "ended with code 3"),
])
def test_kaggle_refusals(kaggle, tmp_path, behavior, words, capsys):
    text = refusal(DownloadError, kaggle, behavior, "competition", "data-science-bowl-2018")
    assert words in text and "https://www.kaggle.com/competitions/data-science-bowl-2018/data" in text and "--from" in text
    assert "KGAT" not in text + "".join(capsys.readouterr()) and "S3CRET" not in text
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_kaggle_refusals_by_their_status():
    for status, words in ((401, "does not accept the API token"), (404, f"no dataset named {BUSI}"),
                          (403, f"Kaggle refuses {BUSI}: it is private")):
        text = str(sources.kaggle_refusal({"problem": status}, "dataset", BUSI, "https://x"))
        assert words in text and "https://x in a browser" in text


def test_kaggle_package_missing(kaggle, tmp_path, monkeypatch):
    """A package of that name which is not there for the child: imports of kaggle fail as if it had never been installed."""
    (tmp_path / "stubs" / "sitecustomize.py").write_text("import sys; sys.modules['kaggle'] = None\n")
    assert "needs kaggle: pip install kaggle;" in refusal(DownloadError, kaggle, "well")


def test_kaggle_full_disk(kaggle):
    assert "no space left" in refusal(OSError, kaggle, "full")


def test_kaggle_silence(kaggle):
    started = time.monotonic()
    assert "next to nothing came for 0 s" in refusal(DownloadError, kaggle, "stall", timeout=0.4)
    assert time.monotonic() - started < 20, "the child was ended, not waited for"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs fork and /proc, to kill a parent and look after its child")
def test_kaggle_client_does_not_outlive_its_parent(kaggle, tmp_path):
    """Else a second run would write into the same file as the orphan of the first."""
    parent = os.fork()
    if parent == 0:
        try:
            kaggle("stall")
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not (found := [path.read_text() for path in tmp_path.glob("out/*.part/pid")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    client = int(found[0])
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while Path(f"/proc/{client}").exists() and "Z" not in Path(f"/proc/{client}/stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline, "the client still runs"
    assert zipfile.is_zipfile(kaggle("no leftover"))


def test_kaggle_sends_something_else(kaggle, tmp_path):
    assert "no complete .zip" in refusal(DownloadError, kaggle, "web page")
    assert not (tmp_path / "out" / "checksums.json").exists()
    assert zipfile.is_zipfile(kaggle("well"))


def test_kaggle_continues_what_the_client_has_noted(kaggle, tmp_path):
    assert "it continues" in refusal(DownloadError, kaggle, "part")
    assert zipfile.is_zipfile(kaggle("continue"))


def test_kaggle_continues_nothing_else(kaggle, tmp_path):
    folder = tmp_path / "out" / f"{BUSI.split('/')[1]}.zip.part"
    folder.mkdir(parents=True)
    (folder / f"{BUSI.split('/')[1]}.zip").write_bytes(b"of an unknown version")
    assert zipfile.is_zipfile(kaggle("no leftover"))


# --- unpack --------------------------------------------------------------------------------------------------------------------

FILES = {"set/images/a.jpg": b"image" * 1000, "set/masks/a.png": b"mask", "set/LICENSE.txt": b"CC0"}


def make_zip(path: Path, files: dict[str, bytes], kinds: dict[str, int] = {}) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, (kinds.get(name, stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpack(tmp_path):
    path = make_zip(tmp_path / "archive", {**FILES, "__MACOSX/._a": b"?", "set/.DS_Store": b"?"})  # by content, not by name
    assert unpack(path, tmp_path / "out", progress=False) == tmp_path / "out"
    assert tree(tmp_path / "out") == FILES
    assert unpack(tmp_path / "gone", tmp_path / "out") == tmp_path / "out", "a second time does nothing"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["archive", "out"]


def test_folders_and_backslashes(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"set/": b"", "set\\images\\a.jpg": b"1"}, {"set/": stat.S_IFDIR})
    assert tree(unpack(path, tmp_path / "out", progress=False)) == {"set/images/a.jpg": b"1"}


def test_names_that_lead_out_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("../evil.txt", "/tmp/evil.txt", "set/../../evil.txt", "C:\\evil.txt", "..\\evil.txt"):
        path = make_zip(tmp_path / "in" / "archive", {**FILES, name: b"evil"})
        assert "would be written outside" in refusal(ValueError, unpack, path, tmp_path / "in" / "out", progress=False)
        assert [entry.name for entry in sorted(tmp_path.rglob("*"))] == ["in", "archive"], "nothing was written at all"


def test_links_and_devices_are_refused(tmp_path):
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO):
        path = make_zip(tmp_path / "archive", {**FILES, "set/link": b"/etc/passwd"}, {"set/link": kind})
        assert "link or a device" in refusal(ValueError, unpack, path, tmp_path / "out", progress=False), kind
        assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]


def test_a_long_name_makes_no_long_sentence(tmp_path):
    for name in ("../" + "n" * 5000, "/".join("ab" * 200)):
        assert len(refusal(ValueError, unpack, make_zip(tmp_path / "a.zip", {name: b"1"}), tmp_path / "out", progress=False)) < 500
    content = make_zip(tmp_path / "a.zip", {"n" * 5000: b"1"}).read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"n" * 5000, b"m" * 5000, 1))  # the header differs from the table of contents
    text = refusal(ValueError, unpack, tmp_path / "a.zip", tmp_path / "out", progress=False)
    assert len(text) < 500 and "\n" not in text


def test_names_that_no_disk_takes_are_refused(tmp_path):
    for number, names in enumerate((["a/" * 1200 + "x"], ["n" * 300], ["a/b", "a"])):
        path = make_zip(tmp_path / f"{number}", dict.fromkeys(names, b""))
        text = refusal(ValueError, unpack, path, tmp_path / "out", progress=False)
        assert "is refused" in text and not (tmp_path / "out").exists(), text


def test_an_encrypted_archive_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # the flag, in the table of contents
    path.write_bytes(content)
    assert "encrypted" in refusal(ValueError, unpack, path, tmp_path / "out", progress=False)


def zip_bomb(path: Path) -> Path:
    """A .zip whose table of contents promises 4 GB."""
    content = bytearray(make_zip(path, FILES).read_bytes())
    content[(place := content.rindex(b"PK\x01\x02") + 24):place + 4] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    return path


def test_absurd_expansion_is_refused(tmp_path):
    path = zip_bomb(tmp_path / "bomb")
    assert "would swell" in refusal(ValueError, unpack, path, tmp_path / "out", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bomb"]


def test_a_name_twice_is_refused(tmp_path):
    """Also where only some disks take the two for one name; and a file and a folder of one name."""
    for names in (["set/a.png", "set/A.png"], ["a\u0308.png", "\u00e4.png"]):
        path = make_zip(tmp_path / "archive", dict.fromkeys(names, b"1"))
        assert "would be one file" in refusal(ValueError, unpack, path, tmp_path / "out", progress=False)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a.png", b"1")
        archive.writestr("a.png", b"2")
    assert "would be one file" in refusal(ValueError, unpack, tmp_path / "a.zip", tmp_path / "out", progress=False)


def test_damage_is_said(tmp_path):
    path = make_zip(tmp_path / "archive", {f"{n}.bin": random.Random(n).randbytes(20_000) for n in range(4)})
    content = bytearray(path.read_bytes())
    content[30_000] ^= 0x10
    for damaged in (content[:50_000], content):
        path.write_bytes(damaged)
        assert "download it again" in refusal(ValueError, unpack, path, tmp_path / "out", progress=False)
        assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]


def test_a_zip_turned_bit_by_bit_never_ends_in_another_error(tmp_path):
    """Every byte of the headers and of the table of contents, in all its bits."""
    path = make_zip(tmp_path / "a.zip", {"a.png": b"picture", "b.png": b"mask"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xff]) + whole[place + 1:])
        try:
            out = unpack(path, tmp_path / f"out{place}", progress=False)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            shutil.rmtree(out)


def test_no_archive(tmp_path):
    for content, words in ((b"<!DOCTYPE html><html>", "a web page"), (b"", "no complete .zip"), (b"picture", "no complete .zip")):
        (tmp_path / "a.zip").write_bytes(content)
        assert words in refusal(ValueError, unpack, tmp_path / "a.zip", tmp_path / "out")


def test_unpack_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_no_room_to_unpack(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    text = refusal(OSError, unpack, make_zip(tmp_path / "a.zip", FILES), tmp_path / "out", progress=False)
    assert "no space left in" in text and [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_a_disk_that_fills_up_while_unpacking(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.shutil, "copyfileobj", full)
    text = refusal(OSError, unpack, make_zip(tmp_path / "a.zip", FILES), tmp_path / "out", progress=False)
    assert "no space left" in text and [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_an_interrupted_unpacking_leaves_nothing_and_is_done_again(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", FILES)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sources.shutil, "copyfileobj", interrupted)
        unpack(path, tmp_path / "out", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]
    assert tree(unpack(path, tmp_path / "out", progress=False)) == FILES


def test_two_unpack_at_once(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{n}": bytes(10_000) for n in range(200)})
    threads = [threading.Thread(target=unpack, args=(path, tmp_path / "out"), kwargs={"progress": False}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tree(tmp_path / "out")) == 200 and sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zip", "out"]


RAR = b"Rar!\x1a\x07\x01\x00 and so on"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Only one unpacking command on the path: a stub that gets the archive's and the folder's place as {0} and {1}."""
    def install(name, script):
        place = {"bsdtar": ("$2", "$4"), "unar": ("$5", "$4"), "7z": ("$4", "${3#-o}")}[name]
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nset -e\n" + script.replace("ARCHIVE", place[0]).replace("FOLDER", place[1]) + "\n")
        path.chmod(0o755)
        monkeypatch.setattr(sources.shutil, "which", lambda command: str(path) if command == name else None)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "FIVES.rar").write_bytes(RAR)
    return install


@pytest.mark.parametrize("name", ["bsdtar", "unar", "7z"])
def test_a_rar_is_left_to_a_tool(tmp_path, tool, name):
    tool(name, 'test -d "FOLDER"; mkdir -p "FOLDER/train/Original"; cp "ARCHIVE" "FOLDER/train/Original/1_A.png"')
    out = unpack(tmp_path / "FIVES.rar", tmp_path / "out", progress=False)
    assert tree(out) == {"train/Original/1_A.png": RAR}


def test_a_rar_without_a_tool(tmp_path, monkeypatch):
    (tmp_path / "FIVES.rar").write_bytes(RAR)
    monkeypatch.setattr(sources.shutil, "which", lambda command: None)
    text = refusal(OSError, unpack, tmp_path / "FIVES.rar", tmp_path / "out")
    assert "by hand" in text and "--from" in text and "unar" in text and [entry.name for entry in tmp_path.iterdir()] == ["FIVES.rar"]


@pytest.mark.parametrize(("script", "error", "words"), [
    ('echo "wrong password?" >&2; exit 2', OSError, "bsdtar could not unpack FIVES.rar (wrong password?)"),
    ('touch "FOLDER/../evil"', ValueError, "wrote outside"),
    ('truncate -s 300M "FOLDER/zeros"; sleep 20', ValueError, "would swell to more than 256 MB"),
    ('ln -s /etc/passwd "FOLDER/evil"', ValueError, "evil is a link or a device"),
    ('mkdir "FOLDER/a"; mkfifo "FOLDER/a/evil"', ValueError, "evil is a link or a device"),
])
def test_a_tool_is_watched(tmp_path, tool, script, error, words):
    tool("bsdtar", script)
    assert words in refusal(error, unpack, tmp_path / "FIVES.rar", tmp_path / "out", progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["FIVES.rar", "bin"]
