"""Every study states all it should, and its smoke run gives every effect, finite and repeatable."""

import importlib
import math
from functools import cache

import pytest
import torch

from telos import _catalogue
from telos.evidence import Study
from telos.evidence._verify import _run_seed, study_names

SLUGS = study_names()


def load(slug: str) -> Study:
    return importlib.import_module(f"telos.evidence.{slug}").STUDY


@pytest.mark.parametrize("slug", SLUGS)
def test_study_is_complete(slug: str) -> None:
    study = load(slug)
    assert study.slug == slug
    assert slug in {paper["slug"] for paper in _catalogue.papers()}
    for field in ("claim", "protocol", "decision", "pilot"):
        assert getattr(study, field).strip(), f"{slug} states no {field}"
    names = [effect.name for effect in study.effects]
    assert len(set(names)) == len(names)
    assert any(effect.required for effect in study.effects)
    for effect in study.effects:
        assert effect.description.strip()
        assert math.isfinite(effect.threshold)


@cache
def smoke(slug: str, seed: int) -> dict[str, float]:
    """A smoke run as ``telos verify`` does it, with one thread."""
    return _run_seed(slug, seed, "smoke")["numbers"]


@pytest.mark.parametrize("slug", SLUGS)
def test_smoke_run_gives_every_effect(slug: str) -> None:
    numbers = smoke(slug, 100)
    for effect in load(slug).effects:
        assert numbers[effect.name] is not None, f"{effect.name} is not finite"


@pytest.mark.parametrize("slug", SLUGS)
def test_smoke_run_depends_on_the_seed_alone(slug: str) -> None:
    first = smoke(slug, 100)
    torch.rand(7)  # what others draw must not matter
    again = _run_seed(slug, 100, "smoke")["numbers"]
    assert without_clocks(again) == without_clocks(first)
    assert smoke(slug, 101) != first


CLOCKS = ("seconds", "time_ratio", "speedup")


def without_clocks(numbers: dict[str, float]) -> dict[str, float]:
    """Numbers that measure a clock differ between runs; the end of their name says so."""
    return {key: value for key, value in numbers.items() if not key.endswith(CLOCKS)}
