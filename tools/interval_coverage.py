"""Do the intervals of a report hold what other seeds give? Measured on spoilt copies of scikit-learn's data.

    python tools/interval_coverage.py [--out tools/results/interval_coverage.json] [--processes 2]

Breast cancer, wine and digits are written as CSV files with 5 % of the cells blanked, a text column and an
identifier column added. ``telos compare FILE target=target epochs=20`` (a third of a table's usual length, for time)
then runs 300 seeds of each recipe with its defaults: twenty repetitions of ten seeds, each giving the interval that its
report would print for a recipe's difference to the baseline, and a hundred other seeds whose mean difference the
interval should hold. For a true coverage of 95 % at least 17 of 20 do, with a probability of 98 %. Runs are kept in a
store beside the CSV files, so that an interrupted command goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn import datasets

from telos.trials import Comparison, compare
from telos.trials.statistics import resampled_interval

RECIPES = "cross_entropy,focal,gce"
REPETITIONS, SEEDS, OTHERS, ENOUGH = 20, 10, 100, 17
EPOCHS = 20
ROUNDING = 1e-12
WORDS = ("stable", "growing", "unclear", "routine", "urgent", "follow-up", "second opinion", "nothing new")


def spoil(name: str, folder: Path) -> Path:
    """A data set as a CSV file with gaps, a column of free text and one of identifiers."""
    bunch = getattr(datasets, f"load_{name}")()
    generator = np.random.default_rng(0)
    inputs = bunch.data.astype(object)
    inputs[generator.random(inputs.shape) < 0.05] = None
    columns = [str(column) for column in getattr(bunch, "feature_names", range(inputs.shape[1]))]
    frame = pl.DataFrame(
        {
            "record": [f"{name}-{number:06d}" for number in generator.permutation(len(inputs))],
            **{column: inputs[:, place].tolist() for place, column in enumerate(columns)},
            "note": [
                " ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(len(inputs))
            ],
            "target": [str(bunch.target_names[label]) for label in bunch.target],
        },
        strict=False,
    )
    path = folder / f"{name}.csv"
    frame.write_csv(path)
    return path


def coverage(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """For each recipe the difference of the other seeds, and which of the twenty intervals hold it."""
    metric, base = comparison.metric, comparison.baseline
    reference = base.values(metric)
    found: dict[str, dict[str, Any]] = {}
    for entry in comparison.entries:
        if entry is base:
            continue
        values = entry.values(metric)
        differences = np.array(
            [values[seed] - reference[seed] for seed in range(REPETITIONS * SEEDS + OTHERS)]
        )
        truth = float(differences[REPETITIONS * SEEDS :].mean())
        intervals = [
            resampled_interval(part.tolist(), comparison.test_share)
            for part in differences[: REPETITIONS * SEEDS].reshape(REPETITIONS, SEEDS)
        ]
        found[entry.recipe.label] = {
            "difference_of_other_seeds": truth,
            # where ten seeds agree to the last example the interval is a point, and the truth a sum that rounds
            "covered": sum(i.low - ROUNDING <= truth <= i.high + ROUNDING for i in intervals),
            "of": REPETITIONS,
            "mean_half_width": float(np.mean([interval.high - interval.mean for interval in intervals])),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/interval_coverage.json")
    parser.add_argument("--folder", type=Path, default=Path("runs/interval_coverage"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("breast_cancer", "wine", "digits"):
        path = spoil(name, options.folder)

        def tell(done: int, total: int, *_: object, name: str = name) -> None:
            if done % 100 == 0 or done == total:
                print(f"{name}: {done} of {total} runs", flush=True)

        comparison = compare(
            f"{path} target=target",
            RECIPES,
            seeds=REPETITIONS * SEEDS + OTHERS,
            trials=1,
            epochs=EPOCHS,
            processes=options.processes,
            store=options.folder / f"{name}.sqlite",
            reference=False,
            on_run=tell,
        )
        found[name] = coverage(comparison)
        for label, row in found[name].items():
            print(f"{name:14s} {label:14s} {row['covered']} of {row['of']} intervals hold the other seeds")
    counts = [row["covered"] for recipes in found.values() for row in recipes.values()]
    result = {"epochs": EPOCHS, **found, "passed": min(counts) >= ENOUGH}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}; at least {ENOUGH} everywhere: {result['passed']}")


if __name__ == "__main__":
    main()
