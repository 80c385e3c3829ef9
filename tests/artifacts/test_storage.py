"""Places in buckets, against emulators of both services."""

import itertools

import pytest

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.files import write_bytes, write_json
from pipeline.artifacts.storage import BucketPath
from pipeline.errors import MissingArtifact, PipelineError
from tests.support import buckets

NAMES = itertools.count()


@pytest.fixture(scope="module", params=buckets.SERVICES)
def served(request):
    with buckets.EMULATORS[request.param]() as found:
        yield found


@pytest.fixture
def root(served, monkeypatch):
    """A prefix that is empty."""
    url, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return storage.parse_path(f"{url}/some/where-{next(NAMES)}")


def test_what_is_written_is_read(root):
    file = root / "a" / "b.json"
    assert not file.is_file()
    assert not root.exists()
    with pytest.raises(FileNotFoundError, match=r"no (s3|gs)://a-bucket(-\d+)?/some/where-\d+/a/b\.json"):
        file.read_bytes()
    write_json(file, {"a": 1})
    assert file.is_file()
    assert root.exists()
    assert not root.is_file()
    assert file.read_text() == '{\n  "a": 1\n}\n'
    write_json(file, {"a": 2})
    assert '"a": 2' in file.read_text()
    assert str(file).endswith("/a/b.json")
    assert file.name == "b.json"


def test_files_are_those_below_and_no_neighbours(root):
    for name in ("b", "a/2", "a/1"):
        (root / name).write_bytes(name.encode())
    BucketPath(f"{root}-neighbour").write_bytes(b"x")
    assert storage.list_files(root) == ["a/1", "a/2", "b"]
    storage.remove(root / "a")
    assert storage.list_files(root) == ["b"]
    storage.remove(root / "b")
    storage.remove(root / "b")  # nothing there is no error
    assert not root.exists()


def test_files_that_are_missing_torn_or_changed_are_named(root, tmp_path):
    entries = {}
    for name, data in {"whole": b"0123", "torn": b"0123", "changed": b"0123", "gone": b"0123"}.items():
        (tmp_path / name).write_bytes(data)
        entries[name] = storage.file_record(tmp_path / name)
        (root / name).write_bytes(data)
    assert storage.damaged_files(root, entries, verify=False) == storage.damaged_files(root, entries, verify=True) == []
    assert storage.file_record(root / "whole") == entries["whole"]
    (root / "torn").write_bytes(b"012")
    (root / "changed").write_bytes(b"0124")
    storage.remove(root / "gone")
    assert storage.damaged_files(root, entries, verify=False) == [
        "torn: shorter than the 4 bytes written",
        "gone: missing",
    ]
    assert storage.damaged_files(root, entries, verify=True) == [
        "torn: 3 bytes, written with 4",
        "changed: sha256 differs from the one written",
        "gone: missing",
    ]


def _build(root, data=b"tensor", settings=None, commit="1"):
    (root / "shards" / "0.bin").write_bytes(data)
    contract = {"block_size": 8, "provenance": {"git_commit": commit}}
    return artifact.seal(
        root, kind="teacher_cache", key="0123456789ab", settings=settings or {"a": 1}, parents={}, contract=contract
    )


def test_an_artifact_is_absent_until_its_manifest_is_there(root):
    (root / "shards" / "0.bin").write_bytes(b"tensor")
    assert not artifact.exists(root)
    with pytest.raises(MissingArtifact, match="an unfinished one is at"):
        artifact.read(root, "teacher_cache", make_with="the test")
    sealed = _build(root)
    assert artifact.exists(root)
    assert artifact.read(root, "teacher_cache", make_with="the test", verify=True) == sealed
    assert set(sealed.files) == {"contract.json", "shards/0.bin"}


def test_the_same_files_have_the_same_fingerprint_in_a_bucket_and_in_a_directory(root, tmp_path):
    scratch = artifact.open_scratch(tmp_path / "cache", resume=False)
    (scratch / "shards").mkdir()
    write_bytes(scratch / "shards" / "0.bin", b"tensor")
    contract = {"block_size": 8, "provenance": {"git_commit": "1"}}
    local = artifact.seal(
        tmp_path / "cache", kind="teacher_cache", key="0123456789ab", settings={"a": 1}, parents={}, contract=contract
    )
    _build(root)
    assert (root / artifact.MANIFEST).read_bytes() == (local.path / artifact.MANIFEST).read_bytes()


def test_two_that_complete_it_at_once_leave_one_artifact(root):
    """The second seals what the first has sealed already; of who made it the first says."""
    first = _build(root, commit="1")
    assert _build(root, commit="2") == first
    assert artifact.read(root, "teacher_cache", make_with="the test", verify=True).contract == first.contract


@pytest.mark.parametrize("text", ["s3://bucket", "gs:///prefix", "gs://bucket/", "https://somewhere/a"])
def test_what_names_no_place_is_refused(text):
    with pytest.raises(PipelineError, match=text):
        storage.parse_path(text)


@pytest.mark.parametrize(
    ("url", "name"),
    [("s3://a-bucket/cache", "AWS_ENDPOINT_URL"), ("gs://a-bucket/cache", "TENSORSTORE_GCS_HTTP_URL")],
)
def test_no_network_is_one_error_with_the_url(monkeypatch, url, name):
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})
    storage.tensorstore_context.cache_clear()
    storage._bucket.cache_clear()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        monkeypatch.setenv(key, "of-a-test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(PipelineError, match=rf"{url}/manifest.json cannot be reached: .*check the network") as raised:
        artifact.exists(storage.parse_path(url))
    assert "\n" not in str(raised.value)
    storage.tensorstore_context.cache_clear()
    storage._bucket.cache_clear()


def test_a_bucket_that_is_not_there_is_one_error_with_the_url(served, monkeypatch):
    url, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    other = storage.parse_path(f"{url}-that-is-not-there/cache")
    with pytest.raises(PipelineError, match=f"{other}/file cannot be reached"):
        (other / "file").write_bytes(b"x")
