import pytest

from pipeline.tracking.run import RunInfo, open_run
from pipeline.tracking.sweeps import MEMBER, Member, description, members_of, ranking


def member(name, status="FINISHED", **metrics):
    return Member(overrides=name, run_id=f"run of {name}", status=status, metrics=metrics)


def speedup(name, value, half):
    return member(name, speedup=value, speedup_low=value - half, speedup_high=value + half)


def test_the_best_is_the_highest_of_the_members_that_finished():
    ranked = ranking([speedup("a", 1.5, 0.1), speedup("b", 2.0, 0.1), member("c", "FAILED", speedup=9.0), member("d")])
    assert ranked.metric == "speedup"
    assert [one.overrides for one in ranked.members] == ["b", "a"]
    assert ranked.equal == 1


@pytest.mark.parametrize(("half", "equal"), [(0.24, 1), (0.26, 2)])
def test_members_whose_intervals_meet_may_be_equally_good(half, equal):
    assert ranking([speedup("a", 1.5, half), speedup("b", 2.0, half)]).equal == equal


def test_a_sweep_of_trainings_is_ranked_by_acceptance_and_one_without_numbers_not_at_all():
    trained = [
        member("a", **{"eval/accept_length": 3.0, "train/loss": 9.0}),
        member("b", **{"eval/accept_length": 2.5}),
    ]
    assert (ranking(trained).metric, ranking(trained).best.overrides) == ("eval/accept_length", "a")
    assert ranking([member("a", **{"train/loss": 1.0})]) is None
    assert ranking([]) is None


def test_the_page_names_the_best_first_and_links_every_member():
    members = [speedup("a", 1.5, 0.1), member("b", "FAILED"), speedup("c", 2.0, 0.1)]
    text = description(members, ranking(members), "7").splitlines()
    assert text[0] == "The best by **speedup**: `c`."
    assert [line.split("|")[1].strip() for line in text[4:]] == ["`c`", "`a`", "`b`"]
    assert text[-1] == "| `b` |  | [FAILED](#/experiments/7/runs/run of b) |"
    assert description(members[1:2], None, "7").splitlines()[0] == "| member | metric | run |"


def test_what_the_stages_of_a_member_measured_is_the_members(tmp_path):
    def opened(name, parent, **tags):
        info = RunInfo(name=name, config={}, params={}, tags=tags, parent_run_id=parent)
        return open_run(info, uri=None, experiment="of sweeps", output_dir=tmp_path)

    with opened("sweep", None) as sweep:
        for member, value in (("seed=0", 1.5), ("seed=1", 2.5)):
            with opened("all", sweep.run_id, **{MEMBER: member}) as everything:
                with opened("train", everything.run_id) as train:
                    train.log_metrics({"eval/accept_length": 3.0})
                with opened("bench", everything.run_id) as bench:
                    bench.log_metrics({"speedup": value})
        found = members_of(sweep.run_id, uri=None, output_dir=tmp_path)
    assert [one.overrides for one in found] == ["seed=0", "seed=1"]
    assert [one.status for one in found] == ["FINISHED"] * 2
    assert [one.metrics["speedup"] for one in found] == [1.5, 2.5]
    assert ranking(found).best.overrides == "seed=1"
