"""Versions, champions and claims in MLflow's own registry."""

import threading

import pytest

from pipeline.errors import PipelineError
from pipeline.tracking import registry
from pipeline.tracking.registry import CHAMPION, PREVIOUS, Registry, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One store for this file."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def model(folder, request):
    return Registry(request.node.name.replace("[", " "), uri=None, output_dir=folder)


def draft(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "README.md").write_text(f"the card of {name}")
    return directory


def test_a_draft_is_one_version_however_often_it_is_registered(model, tmp_path):
    one = model.register(draft(tmp_path, "a"), "fa", run_id=None, record={"speedup": 1.0})
    again = model.register(tmp_path / "a", "fa", run_id=None, record={"speedup": 2.0})
    other = model.register(draft(tmp_path, "b"), "fb", run_id=None, record={"speedup": 3.0})
    assert (one.number, again.number, other.number) == ("1", "1", "2")
    assert model.of_number("1").record == {"speedup": 2.0}
    assert model.of_number("2").fingerprint == "fb"


def test_the_champion_is_an_alias_and_an_address(model, folder, tmp_path):
    assert model.of_alias(CHAMPION) is None
    made = model.register(draft(tmp_path, "a"), "fa", run_id=None, record={})
    assert model.of_alias(CHAMPION) is None
    model.move(CHAMPION, made.number)
    assert model.of_alias(CHAMPION) == made
    for address in (f"models:/{model.name}@champion", f"models:/{model.name}/1"):
        assert resolve(address, uri=None, output_dir=folder).source == str(tmp_path / "a")
    assert model.of_alias(PREVIOUS) is None


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("tiny@champion", "is no address of a model"),
        ("models:/nothing@champion", "has no such alias"),
        ("models:/nothing/3", "models:/nothing/3: "),
    ],
)
def test_an_address_that_leads_nowhere_is_one_clear_error(folder, address, problem):
    with pytest.raises(PipelineError, match=problem):
        resolve(address, uri=None, output_dir=folder)


def test_a_draft_of_another_machine_is_said(model, folder, tmp_path):
    directory = draft(tmp_path, "a")
    model.move(CHAMPION, model.register(directory, "fa", run_id=None, record={}).number)
    directory.rename(tmp_path / "b")
    with pytest.raises(PipelineError, match="which is not on this machine"):
        resolve(f"models:/{model.name}@champion", uri=None, output_dir=folder)


def test_of_many_that_promote_at_once_one_at_a_time_moves_the_champion_and_the_others_say_so(model, folder):
    together, finished, inside, lost = threading.Barrier(4), threading.Barrier(4), [], []

    def promote(name):
        own = Registry(model.name, uri=None, output_dir=folder)
        together.wait()
        try:
            with own.claimed(name):
                inside.append(name)
                finished.wait()
        except PipelineError as error:
            lost.append(str(error))
            finished.wait()

    threads = [threading.Thread(target=promote, args=(f"run {name}",)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1
    assert lost == [f"{inside[0]} moves the champion of {model.name} at this moment; try again in a minute"] * 3
    with model.claimed("run e"):
        pass


def test_a_claim_that_was_left_behind_blocks_nobody_for_long(model, monkeypatch):
    name = f"{model.name}{registry.CLAIM}"
    model._client.create_registered_model(name, tags={registry.CLAIMANT: "run c"})
    with pytest.raises(PipelineError, match="run c moves the champion"), model.claimed("run d"):
        pass
    monkeypatch.setattr(registry, "CLAIM_SECONDS", 0.0)
    with model.claimed("run d"):
        pass
    assert model._client.search_registered_models(f"name = '{name}'") == []


def test_of_two_that_find_an_old_claim_one_wins(model, folder, monkeypatch):
    name = f"{model.name}{registry.CLAIM}"
    model._client.create_registered_model(name, tags={registry.CLAIMANT: "run of yesterday"})
    monkeypatch.setattr(registry, "CLAIM_SECONDS", 0.0)
    other = Registry(model.name, uri=None, output_dir=folder)

    def the_other_comes(seconds):
        model._client.delete_registered_model(name)
        other._create_claim(name, "run b")

    monkeypatch.setattr(registry.time, "sleep", the_other_comes)
    with pytest.raises(PipelineError, match="run b moves the champion"), model.claimed("run a"):
        pass


def test_a_store_that_cannot_create_a_claim_says_why(folder):
    with (
        pytest.raises(PipelineError, match="MLflow at .*name"),
        Registry("a/b", uri=None, output_dir=folder).claimed("r"),
    ):
        pass
