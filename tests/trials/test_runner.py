"""Runs: determinism, shared starts, divergence, exceptions, processes that die."""

from dataclasses import replace

import pytest
import torch

from telos.trials import Job, WorkerLostError, Workers, parse_recipes, run_job
from telos.trials.runner import code_hash, versions

BLOBS = "tests.trials.examples:BLOBS"


def job(
    loss: str = "cross_entropy", optim: str = "adamw", role: str = "evaluation", seed: int = 0, **more
) -> Job:
    (recipe,) = parse_recipes(loss, optim)
    chosen = {"learning_rate": 0.01, "weight_decay": 0.01, **more}
    return Job(BLOBS, loss, optim, recipe.canonical, role, 0, chosen, seed, 2, "code")


def test_a_run_has_metrics_a_curve_and_versions() -> None:
    run = run_job(job())
    assert (run.status, run.reason) == ("finished", None)
    names = {"accuracy", "macro_f1", "nll", "ece"}
    assert set(run.metrics) == {f"{split}_{name}" for split in ("validation", "test") for name in names}
    assert [record["epoch"] for record in run.curve] == [1, 2]
    assert set(run.curve[0]) == {"epoch", "loss", "seconds", *(f"validation_{name}" for name in names)}
    assert run.curve[-1]["validation_nll"] == pytest.approx(run.metrics["validation_nll"], rel=1e-5)
    assert run.seconds > 0
    assert run.versions["torch"] == torch.__version__


def test_tuning_does_not_look_at_the_test_split() -> None:
    assert not [name for name in run_job(job(role="tuning")).metrics if name.startswith("test")]


def test_the_same_job_gives_the_same_numbers_and_another_seed_others() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, other = run_job(job()), run_job(job(seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second = run_job(job())
    assert first.metrics == second.metrics
    assert first.metrics != other.metrics


def test_recipes_share_split_start_and_order() -> None:
    # a loss that is another's twin must give the twin's numbers
    runs = [run_job(job(loss)) for loss in ("cross_entropy", "torch.nn:CrossEntropyLoss", "comp_sum:tau=1")]
    assert runs[0].metrics == pytest.approx(runs[1].metrics, rel=1e-5)
    assert runs[0].metrics == pytest.approx(runs[2].metrics, rel=1e-5)
    # and the first training loss, before any step, is that of one and the same model
    assert run_job(job(optim="sgd")).metrics != runs[0].metrics


def test_hyperparameters_reach_loss_and_optimizer() -> None:
    base = run_job(job("focal"))
    assert run_job(job("focal", gamma=2.0)).metrics == base.metrics  # the default
    assert run_job(job("focal", gamma=4.0)).metrics != base.metrics
    assert run_job(job("focal", learning_rate=0.02)).metrics != base.metrics
    assert run_job(job("focal:gamma=4")).metrics == run_job(job("focal", gamma=4.0)).metrics


def test_divergence_is_a_result() -> None:
    run = run_job(job("tests.trials.examples:Exploding"))
    assert run.status == "diverged"
    assert run.reason == "loss is inf at step 3, in epoch 2"
    assert [record["epoch"] for record in run.curve] == [1]
    assert run.metrics == {}


def test_outputs_that_overflow_are_divergence() -> None:
    run = run_job(job(optim="sgd", learning_rate=1e30))
    assert run.status == "diverged"
    assert "nan" in str(run.reason) or "not finite" in str(run.reason)


def test_an_exception_is_a_result() -> None:
    run = run_job(job("tests.trials.examples:Raising"))
    assert run.status == "failed"
    assert run.reason == "RuntimeError: <b>this loss</b> never works"


def test_the_sample_index_covers_the_training_split() -> None:
    run = run_job(job("tests.trials.examples:Remembering"))
    assert run.metrics == run_job(job("cross_entropy")).metrics


def test_the_key_holds_what_decides_the_numbers() -> None:
    one = job("focal")
    assert one.key == replace(one, loss="FocalLoss", trial=5).key
    for change in (
        {"seed": 1},
        {"epochs": 3},
        {"role": "tuning"},
        {"code": "other"},
        {"task": "digits"},
        {"recipe": "x"},
        {"hyperparameters": {"learning_rate": 0.02, "weight_decay": 0.01}},
    ):
        assert replace(one, **change).key != one.key


def test_the_code_hash_follows_files_from_outside(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "outside_loss.py"
    path.write_text("from torch.nn import CrossEntropyLoss\nclass Mine(CrossEntropyLoss): pass\n")
    (recipe,) = parse_recipes("outside_loss:Mine")
    (builtin,) = parse_recipes("cross_entropy")
    before, plain = code_hash("digits", recipe), code_hash("digits", builtin)
    path.write_text(path.read_text() + "# changed\n")
    assert code_hash("digits", recipe) != before
    assert code_hash("digits", builtin) == plain
    assert code_hash(BLOBS, builtin) != plain
    assert len(versions()["source"] or "") == 12


def test_jobs_in_processes_give_the_numbers_of_this_process_one_at_a_time() -> None:
    jobs = [job(seed=seed) for seed in range(3)]
    here = {run.key: run.metrics for run in Workers(0).run(jobs)}
    with Workers(2) as workers:
        there = {run.key: run.metrics for run in workers.run(jobs)}
    assert there == here


def test_a_worker_that_dies_is_one_sentence() -> None:
    with Workers(1) as workers, pytest.raises(WorkerLostError, match="the same command goes on from there"):
        list(workers.run([job("tests.trials.examples:Killing")]))
