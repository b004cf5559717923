"""The protocol: what is tuned where, what is chosen, what is compared, and what is not run twice."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from telos.trials import (
    Comparison,
    Job,
    Run,
    Store,
    UsageError,
    compare,
    execute,
    loading,
    make_plan,
    resampled_interval,
    runner,
    sources,
)
from telos.trials.comparison import Entry, PlannedRecipe, extend_plan
from telos.trials.sources import fingerprint
from tests.trials import misbehaving
from tests.trials.examples import BLOBS as TASK

BLOBS = "tests.trials.examples:BLOBS"
LOSSES = "cross_entropy,focal,tests.trials.examples:Exploding,tests.trials.examples:Raising,smooth_adversarial_comp_sum"


def numbers(comparison: Comparison) -> dict[str, list[dict[str, float]]]:
    return {
        entry.recipe.label: [run.metrics for run in (*entry.tuning, *entry.evaluation)]
        for entry in comparison.entries
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[tuple[Job, Run]], Path]:
    path = tmp_path_factory.mktemp("compare") / "store.sqlite"
    seen: list[tuple[Job, Run]] = []
    comparison = compare(
        BLOBS,
        LOSSES,
        seeds=5,
        trials=3,
        tuning_seeds=2,
        store=path,
        on_run=lambda number, total, job, run: seen.append((job, run)),
    )
    return comparison, seen, path


def test_every_recipe_gets_the_same_trials_and_seeds(done) -> None:
    comparison, seen, _ = done
    entries = {entry.recipe.label: entry for entry in comparison.entries}
    for name in ("cross_entropy", "focal"):
        entry = entries[name]
        assert [(run.trial, run.seed) for run in entry.tuning] == [
            (trial, 1_000_000 + seed) for trial in range(3) for seed in range(2)
        ]
        assert [run.seed for run in entry.evaluation] == [0, 1, 2, 3, 4]
        assert entry.status == "finished"
    evaluated = [run.key for job, run in seen if job.role == "evaluation"]
    assert len(evaluated) == len(set(evaluated)) == 10
    assert comparison.complete


def test_the_best_mean_on_validation_is_chosen(done) -> None:
    comparison, _, _ = done
    for entry in comparison.entries[:2]:
        means = [
            np.mean([run.metrics["validation_accuracy"] for run in entry.tuning if run.trial == trial])
            for trial in range(3)
        ]
        assert entry.scores == pytest.approx(means)
        assert entry.chosen == int(np.argmax(means))  # the first of equals
        assert all(run.trial == entry.chosen for run in entry.evaluation)
        chosen = next(run for run in entry.tuning if run.trial == entry.chosen)
        assert entry.hyperparameters == chosen.hyperparameters == entry.evaluation[0].hyperparameters


def test_recipes_that_cannot_diverge_or_raise_do_not_stop_the_others(done) -> None:
    comparison, _, _ = done
    by_status = {entry.status: entry for entry in comparison.entries[2:]}
    assert set(by_status) == {"diverged", "failed", "refused"}
    assert by_status["diverged"].reason == "loss is inf at step 3, in epoch 2"
    assert "never works" in str(by_status["failed"].reason)
    assert "needs adversarial_logits" in str(by_status["refused"].reason)
    assert by_status["refused"].tuning == ()
    assert [entry.recipe.label for entry in comparison.ranked] in (
        ["cross_entropy", "focal"],
        ["focal", "cross_entropy"],
    )


def test_differences_are_paired_by_seed(done) -> None:
    comparison, _, _ = done
    assert list(comparison.differences()) == ["focal"]
    difference = comparison.differences()["focal"]
    first, second = (entry.values("test_accuracy") for entry in comparison.entries[:2])
    assert difference.estimate.mean == pytest.approx(
        np.mean([second[seed] - first[seed] for seed in range(5)])
    )
    assert difference.estimate.n == 5
    assert comparison.test_share == pytest.approx(30 / 72)
    assert difference.p_corrected == pytest.approx(difference.estimate.p_value)


def test_the_same_command_repeats_no_finished_run(done) -> None:
    comparison, _, path = done
    trained: list[str] = []
    store = Store(path)
    add = store.add
    store.add = lambda run: (trained.append(run.recipe), add(run))[1]  # type: ignore[method-assign]
    plan = make_plan(BLOBS, LOSSES, seeds=5, trials=3, tuning_seeds=2)
    again = execute(plan, store)
    assert numbers(again) == numbers(comparison)
    # what raised is tried once more, what diverged is a result
    assert set(trained) == {"1.0*tests.trials.examples:Raising @ AdamW"}


def test_more_trials_and_seeds_reuse_what_is_there(done) -> None:
    _, _, path = done
    store = Store(path)
    trained: list[Run] = []
    add = store.add
    store.add = lambda run: (trained.append(run), add(run))[1]  # type: ignore[method-assign]
    larger = execute(make_plan(BLOBS, "focal", seeds=6, trials=4, tuning_seeds=2), store)
    tuned = [run for run in trained if run.role == "tuning"]
    assert {run.trial for run in tuned} == {3}
    kept = larger.entries[0].chosen != 3
    assert len(trained) == 2 + (1 if kept else 6)


def test_two_stores_one_set_of_numbers(done, tmp_path: Path) -> None:
    comparison, _, _ = done
    fresh = compare(
        BLOBS, "cross_entropy,focal", seeds=5, trials=3, tuning_seeds=2, store=tmp_path / "s.sqlite"
    )
    for entry, twin in zip(comparison.entries, fresh.entries, strict=False):
        assert [run.metrics for run in entry.evaluation] == [run.metrics for run in twin.evaluation]
        assert [run.hyperparameters for run in entry.tuning] == [run.hyperparameters for run in twin.tuning]


def test_runs_of_another_version_are_not_mixed_in(done) -> None:
    _, _, path = done
    plan = make_plan(BLOBS, "cross_entropy", seeds=5, trials=3, tuning_seeds=2)
    other = replace(plan, recipes=tuple(replace(recipe, code="older") for recipe in plan.recipes))
    store = Store(path)
    assert Comparison.load(store, plan).entries[0].missing == 0
    assert Comparison.load(store, other).entries[0].missing == 3 * 2 + 5
    assert not Comparison.load(store, other).complete


def test_a_plan_survives_the_store(done) -> None:
    comparison, _, path = done
    store = Store(path)
    store.add_plan(comparison.plan.key, __import__("dataclasses").asdict(comparison.plan))
    loaded = Comparison.load(store)
    assert loaded.plan == comparison.plan
    assert numbers(loaded) == numbers(comparison)


def test_one_trial_needs_no_tuning() -> None:
    comparison = compare(BLOBS, "cross_entropy", seeds=2, trials=1)
    (entry,) = comparison.entries
    assert entry.tuning == ()
    assert (entry.chosen, entry.status, len(entry.evaluation)) == (0, "finished", 2)
    assert comparison.plan.runs == 2


def test_an_in_memory_store_by_default_and_a_grid_over_optimizers() -> None:
    comparison = compare(BLOBS, "cross_entropy", optim="adamw,sgd", seeds=2, trials=1, epochs=1)
    assert [entry.recipe.label for entry in comparison.entries] == [
        "cross_entropy / adamw",
        "cross_entropy / sgd",
    ]
    assert comparison.differences()["cross_entropy / sgd"].verdict == "n too small to test"


def test_a_metric_where_less_is_better() -> None:
    comparison = compare(BLOBS, "cross_entropy", seeds=1, trials=3, tuning_seeds=1, metric="nll")
    (entry,) = comparison.entries
    assert entry.chosen == int(np.argmin([run.metrics["validation_nll"] for run in entry.tuning]))


def test_a_trial_that_diverges_on_one_tuning_seed_is_out() -> None:
    plan = replace(make_plan(BLOBS, "cross_entropy", seeds=1, trials=2, tuning_seeds=2))
    store = Store("sqlite://")
    recipe = plan.recipes[0]

    def run(trial: int, seed: int, status: str, accuracy: float) -> Run:
        return Run(
            f"{trial}{seed}", plan.task, recipe.canonical, "tuning", trial, seed, plan.epochs, recipe.code, {},
            status, metrics={"validation_accuracy": accuracy},
        )  # fmt: skip

    for one in (
        run(0, plan.tuning[0], "finished", 0.5),
        run(0, plan.tuning[1], "finished", 0.5),
        run(1, plan.tuning[0], "finished", 0.9),
        run(1, plan.tuning[1], "diverged", 0.0),
    ):
        store.add(one)
    (entry,) = Comparison.load(store, plan).entries
    assert entry.scores == (0.5, None)
    assert entry.chosen == 0
    assert entry.status == "unfinished"


def test_recipes_that_lost_seeds_come_last() -> None:
    plan = make_plan(BLOBS, "cross_entropy,focal", seeds=2, trials=1)

    def entry(recipe: PlannedRecipe, accuracies: list[float | None]) -> Entry:
        runs = tuple(
            Run(
                f"{recipe.label}{seed}", plan.task, recipe.canonical, "evaluation", 0, seed, 2, "c", {},
                "diverged" if value is None else "finished",
                metrics={} if value is None else {"test_accuracy": value},
            )
            for seed, value in enumerate(accuracies)
        )  # fmt: skip
        return Entry(recipe, (), (), 0, runs, 0)

    first, second = plan.recipes
    comparison = Comparison(plan, (entry(first, [0.5, 0.6]), entry(second, [0.9, None])))
    assert [one.status for one in comparison.ranked] == ["finished", "partial"]
    assert comparison.differences()["focal"].estimate.n == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"trials": -1}, "trials must be at least 1"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"band": -0.1}, "band must be at least 0"),
        ({"seeds": 1_000_001}, "seeds must be at most 1,000,000, got 1000001"),
        ({"metric": "accurcy"}, "no metric 'accurcy'; nearest: accuracy"),
        ({"loss": "ens,smooth_adversarial_comp_sum"}, "no recipe fits the task .*: ens: .*two classes"),
    ],
)
def test_plans_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(BLOBS, **{"loss": "focal", **changes})


def test_data_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise FileNotFoundError("blobs.csv")

    monkeypatch.setattr(TASK, "load", gone)
    with pytest.raises(UsageError, match="data of task .* cannot be loaded: FileNotFoundError: blobs.csv"):
        make_plan(BLOBS, "focal")


def test_processes_must_make_sense() -> None:
    with pytest.raises(UsageError, match="processes must be at least 0"):
        compare(BLOBS, "focal", processes=-1)


# -------------------------------------------------------------------------------------------- the reference


REFERRING = "tests.trials.misbehaving:REFERRING"


def test_a_reference_runs_on_the_same_seeds_and_is_no_rival() -> None:
    store = Store("sqlite://")
    seen: list[Job] = []
    plan = make_plan(REFERRING, "cross_entropy,focal", seeds=5, trials=2, tuning_seeds=1)
    assert plan.reference
    assert plan.runs == 2 * (2 + 5) + 5
    found = execute(plan, store, on_run=lambda done, total, job, run: seen.append(job))
    outside = found.reference
    assert outside is not None
    assert (outside.recipe.label, outside.status, outside.tuning) == ("nearest mean", "finished", ())
    values = outside.values("test_accuracy")
    task = misbehaving.REFERRING
    assert values == {seed: task.reference(task.fold(seed), seed)["accuracy"] for seed in range(5)}
    assert outside.mean("test_accuracy") == pytest.approx(np.mean(list(values.values())))
    assert math.isnan(outside.mean("test_macro_f1"))  # which it does not have
    # it is no recipe: not ranked, not compared, not the baseline
    assert len(found.entries) == len(found.ranked) == 2
    assert list(found.differences()) == ["focal"]
    # its runs come after those of the recipes
    assert [job.role for job in seen[-15:]] == ["evaluation"] * 10 + ["reference"] * 5
    # and nobody runs it again, nor does anybody else's number of epochs matter to it
    again: list[str] = []
    execute(plan, store, on_run=lambda done, total, job, run: again.append(run.key))
    assert sorted(again) == sorted(run.key for run in store.runs())
    longer = make_plan(REFERRING, "cross_entropy", seeds=5, trials=1, epochs=3)
    execute(longer, store)
    assert len(store.runs(role="reference")) == 5
    assert Comparison.load(store, longer).reference == outside


def test_a_reference_may_be_left_out_or_lacking() -> None:
    without = compare(REFERRING, "cross_entropy", seeds=1, trials=1, reference=False)
    assert without.reference is None
    assert not make_plan(BLOBS, "focal").reference
    with pytest.raises(UsageError, match="has no reference to run"):
        make_plan(BLOBS, "focal", reference=True)


def test_a_reference_that_fails_does_not_stop_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fold: object, seed: int) -> dict[str, float]:
        if seed == 1:
            raise RuntimeError("no boost today")
        return {"accuracy": math.nan if seed == 2 else 0.5}

    monkeypatch.setattr(misbehaving.REFERRING, "reference", broken, raising=False)
    found = compare(REFERRING, "cross_entropy", seeds=3, trials=1)
    assert [run.status for run in found.entries[0].evaluation] == ["finished"] * 3
    assert found.reference is not None
    assert [run.status for run in found.reference.evaluation] == ["finished", "failed", "diverged"]
    assert found.reference.status == "partial"
    assert found.reference.values("test_accuracy") == {0: 0.5}


# ------------------------------------------------------------------------------------------- larger plans


def test_a_plan_that_grows_keeps_its_baseline_and_its_runs(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    plan = make_plan(
        BLOBS, "smooth_adversarial_comp_sum,cross_entropy,focal", seeds=2, trials=2, tuning_seeds=1, epochs=3,
        metric="nll", band=0.2, max_time=1000.0, command="telos compare blobs",
    )  # fmt: skip
    first = execute(plan, store)
    larger = extend_plan(plan, loss="label_smoothing,focal", command="telos compare blobs --add loss=...")
    assert [recipe.label for recipe in larger.recipes] == [
        *(recipe.label for recipe in plan.recipes),
        "label_smoothing",
    ]
    for name in ("seeds", "trials", "tuning_seeds", "epochs", "metric", "direction", "band", "max_time"):
        assert getattr(larger, name) == getattr(plan, name)
    assert larger.key != plan.key
    trained: list[Run] = []
    add = store.add
    store.add = lambda run: (trained.append(run), add(run))[1]  # type: ignore[method-assign]
    second = execute(larger, store)
    assert {run.loss for run in trained} == {"label_smoothing"}
    assert second.baseline.recipe.canonical == first.baseline.recipe.canonical
    assert [numbers(first)[name] for name in ("cross_entropy", "focal")] == [
        numbers(second)[name] for name in ("cross_entropy", "focal")
    ]
    # what is there already is not added again
    assert extend_plan(larger, loss="focal").recipes == larger.recipes


def test_a_plan_grows_by_optimizers_too() -> None:
    plan = make_plan(BLOBS, "cross_entropy,focal", optim="adamw", seeds=1, trials=1)
    by_optim = extend_plan(plan, optim="sgd")
    assert [recipe.label for recipe in by_optim.recipes] == [
        *("cross_entropy / adamw", "focal / adamw", "cross_entropy / sgd", "focal / sgd")
    ]
    by_loss = extend_plan(by_optim, loss="mae")
    assert [(recipe.loss, recipe.optim) for recipe in by_loss.recipes[4:]] == [
        ("mae", "adamw"),
        ("mae", "sgd"),
    ]
    both = extend_plan(plan, loss="mae", optim="sgd")
    assert [(recipe.loss, recipe.optim) for recipe in both.recipes[2:]] == [("mae", "sgd")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "give a loss or an optimizer to add"),
        ({"loss": "fokal"}, "unknown loss 'fokal'; nearest: focal"),
        (
            {"loss": "smooth_adversarial_comp_sum"},
            "nothing that is added fits the task .*: smooth_adversarial",
        ),
    ],
)
def test_what_cannot_be_added(words: dict[str, str], message: str) -> None:
    plan = make_plan(BLOBS, "cross_entropy", seeds=1, trials=1)
    with pytest.raises(UsageError, match=message):
        extend_plan(plan, **words)


def test_an_added_recipe_that_is_under_way_does_not_hide_the_others() -> None:
    store = Store("sqlite://")
    plan = make_plan(BLOBS, "cross_entropy,focal", seeds=3, trials=2, tuning_seeds=1)
    execute(plan, store)
    larger = extend_plan(plan, loss="mae")
    begun = Comparison.load(store, larger)
    assert [entry.status for entry in begun.entries] == ["finished", "finished", "unfinished"]
    assert (begun.seeds_counted, begun.complete) == (3, False)

    def stop(done: int, total: int, job: Job, run: Run) -> None:
        if job.role == "evaluation" and run.loss == "mae":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(larger, store, on_run=stop)
    # one seed of the new recipe is there: that seed counts for all
    cut = Comparison.load(store, larger)
    assert (cut.seeds, cut.complete) == ((0,), False)
    assert [len(entry.evaluation) for entry in cut.entries] == [1, 1, 1]


# ------------------------------------------------------------------------------------------- splits and data


def test_seeds_that_share_a_split_say_what_their_interval_covers() -> None:
    found = compare("tests.trials.misbehaving:FIXED", "cross_entropy,focal", seeds=5, trials=1, epochs=3)
    assert not found.plan.resplits
    assert found.test_share == 0.0
    assert "do not say how the recipes would compare on other examples" in found.interval_note
    values = list(found.entries[0].values("test_accuracy").values())
    assert found.estimate(found.entries[0]) == resampled_interval(values, 0.0)
    resplit = compare(BLOBS, "cross_entropy,focal", seeds=5, trials=1)
    assert "n_test/n_train = 0.417" in resplit.interval_note
    assert (
        resplit.estimate(resplit.entries[0]).high
        > resampled_interval(list(resplit.entries[0].values("test_accuracy").values()), 0.0).high
    )


def table(path: Path, shift: float = 0.0) -> str:
    rng = np.random.default_rng(0)
    lines = ["left,right,label"]
    for row in range(120):
        kind = row % 3
        left, right = rng.normal(size=2)
        lines.append(f"{left + kind + shift:.6f},{right - kind:.6f},{'abc'[kind]}")
    path.write_text("\n".join(lines) + "\n")
    return f"{path} target=label"


def test_changed_data_never_meet_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = table(tmp_path / "d.csv")
    store = Store(tmp_path / "s.sqlite")
    asked = {"seeds": 2, "trials": 1, "epochs": 2, "reference": False}
    plan = make_plan(text, "cross_entropy", **asked)
    execute(plan, store)
    same = make_plan(text, "cross_entropy", **asked)
    assert Comparison.load(store, same).complete
    assert (plan.title, plan.versions["data"]) == ("d", fingerprint(text)[:12])
    table(tmp_path / "d.csv", shift=0.5)
    changed = make_plan(text, "cross_entropy", **asked)
    assert changed.key == plan.key
    assert changed.recipes[0].code != plan.recipes[0].code
    assert Comparison.load(store, changed).entries[0].missing == 2
    # a process that loads the data after the change does not run an older plan on them
    monkeypatch.setattr(loading, "_tasks", {})
    monkeypatch.setattr(runner, "_checked", set())
    stale = execute(replace(plan, seeds=3), store)
    assert [run.status for run in stale.entries[0].evaluation] == ["finished", "finished", "failed"]
    assert "not those that the comparison began with" in str(stale.entries[0].reason)
    assert execute(changed, store).complete
    assert store.of_other_code(text, changed.codes) == 3


def test_a_table_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = table(tmp_path / "d.csv")
    loads: list[str] = []
    read = sources.load
    monkeypatch.setattr(sources, "load", lambda spec: (loads.append(spec), read(spec))[1])
    found = compare(text, "cross_entropy,focal", seeds=2, trials=2, tuning_seeds=2, epochs=1)
    assert found.complete
    assert found.reference is not None
    assert len(loads) == 1
