"""Places in buckets, against emulators of both services."""

import itertools

import buckets
import pytest

from pipeline import artifacts, places
from pipeline.errors import PipelineError
from pipeline.places import BucketPath

NAMES = itertools.count()


@pytest.fixture(scope="module", params=buckets.EMULATORS)
def served(request):
    with buckets.EMULATORS[request.param]() as found:
        yield found


@pytest.fixture
def root(served, monkeypatch):
    """A prefix that is empty."""
    url, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return places.place_of(f"{url}/some/where-{next(NAMES)}")


def test_what_is_written_is_read(root):
    file = root / "a" / "b.json"
    assert not file.is_file()
    assert not root.exists()
    with pytest.raises(FileNotFoundError, match=r"no (s3|gs)://a-bucket(-\d+)?/some/where-\d+/a/b\.json"):
        file.read_bytes()
    artifacts.write_json(file, {"a": 1})
    assert file.is_file()
    assert root.exists()
    assert not root.is_file()
    assert file.read_text() == '{\n  "a": 1\n}\n'
    artifacts.write_json(file, {"a": 2})
    assert '"a": 2' in file.read_text()
    assert str(file).endswith("/a/b.json")
    assert file.name == "b.json"


def test_files_are_those_below_and_no_neighbours(root):
    for name in ("b", "a/2", "a/1"):
        (root / name).write_bytes(name.encode())
    BucketPath(f"{root}-neighbour").write_bytes(b"x")
    assert places.files(root) == ["a/1", "a/2", "b"]
    places.remove(root / "a")
    assert places.files(root) == ["b"]
    places.remove(root / "b")
    places.remove(root / "b")  # nothing there is no error
    assert not root.exists()


def test_files_that_are_missing_torn_or_changed_are_named(root, tmp_path):
    entries = {}
    for name, data in {"whole": b"0123", "torn": b"0123", "changed": b"0123", "gone": b"0123"}.items():
        (tmp_path / name).write_bytes(data)
        entries[name] = places.entry(tmp_path / name)
        (root / name).write_bytes(data)
    assert places.damage(root, entries, verify=False) == places.damage(root, entries, verify=True) == []
    assert places.entry(root / "whole") == entries["whole"]
    (root / "torn").write_bytes(b"012")
    (root / "changed").write_bytes(b"0124")
    places.remove(root / "gone")
    assert places.damage(root, entries, verify=False) == [
        "torn: shorter than the 4 bytes written",
        "gone: missing",
    ]
    assert places.damage(root, entries, verify=True) == [
        "torn: 3 bytes, written with 4",
        "changed: sha256 differs from the one written",
        "gone: missing",
    ]


def _build(root, data=b"tensor", settings=None, commit="1"):
    (root / "shards" / "0.bin").write_bytes(data)
    contract = {"block_size": 8, "provenance": {"git_commit": commit}}
    return artifacts.seal(root, kind="teacher_cache", settings=settings or {"a": 1}, contract=contract)


def test_an_artifact_is_absent_until_its_manifest_is_there(root):
    (root / "shards" / "0.bin").write_bytes(b"tensor")
    assert not artifacts.exists(root)
    with pytest.raises(artifacts.MissingArtifact, match="an unfinished one is at"):
        artifacts.read(root, "teacher_cache", make_with="the test")
    sealed = _build(root)
    assert artifacts.exists(root)
    assert artifacts.read(root, "teacher_cache", make_with="the test", verify=True) == sealed
    assert set(sealed.files) == {"contract.json", "shards/0.bin"}


def test_the_same_files_have_the_same_fingerprint_in_a_bucket_and_in_a_directory(root, tmp_path):
    scratch = artifacts.open_scratch(tmp_path / "cache", resume=False)
    (scratch / "shards").mkdir()
    artifacts.write_bytes(scratch / "shards" / "0.bin", b"tensor")
    contract = {"block_size": 8, "provenance": {"git_commit": "1"}}
    local = artifacts.seal(tmp_path / "cache", kind="teacher_cache", settings={"a": 1}, contract=contract)
    _build(root)
    assert (root / artifacts.MANIFEST).read_bytes() == (local.path / artifacts.MANIFEST).read_bytes()


def test_two_that_complete_it_at_once_leave_one_artifact(root):
    """The second seals what the first has sealed already; of who made it the first says."""
    first = _build(root, commit="1")
    assert _build(root, commit="2") == first
    assert artifacts.read(root, "teacher_cache", make_with="the test", verify=True).contract == first.contract


@pytest.mark.parametrize("text", ["s3://bucket", "gs:///prefix", "gs://bucket/", "https://somewhere/a"])
def test_what_names_no_place_is_refused(text):
    with pytest.raises(PipelineError, match=text):
        places.place_of(text)


@pytest.mark.parametrize(
    ("url", "name"),
    [("s3://a-bucket/cache", "AWS_ENDPOINT_URL"), ("gs://a-bucket/cache", "TENSORSTORE_GCS_HTTP_URL")],
)
def test_no_network_is_one_error_with_the_url(monkeypatch, url, name):
    monkeypatch.setattr(places, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})
    places.context.cache_clear()
    places._bucket.cache_clear()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        monkeypatch.setenv(key, "of-a-test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(PipelineError, match=rf"{url}/manifest.json cannot be reached: .*check the network") as raised:
        artifacts.exists(places.place_of(url))
    assert "\n" not in str(raised.value)
    places.context.cache_clear()
    places._bucket.cache_clear()


def test_a_bucket_that_is_not_there_is_one_error_with_the_url(served, monkeypatch):
    url, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    other = places.place_of(f"{url}-that-is-not-there/cache")
    with pytest.raises(PipelineError, match=f"{other}/file cannot be reached"):
        (other / "file").write_bytes(b"x")
