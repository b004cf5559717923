import pytest
import torch

from telos.data.synthetic.scenes import SceneGraph, SceneGraphWorld


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(**options: float) -> SceneGraphWorld:
    return SceneGraphWorld(generator=seeded(0), **options)


@pytest.mark.parametrize(("nodes", "edges"), [(2, 1), (5, 3), (20, 8)])
def test_shapes_and_counts(nodes: int, edges: int) -> None:
    graph = world(held_out=0.0).draw(nodes, edges, generator=seeded(1))
    pairs = nodes * (nodes - 1)
    assert graph.features.shape == (pairs, 37)
    assert graph.target.shape == graph.subject.shape == graph.object.shape == (pairs,)
    assert int((graph.target > 0).sum()) == edges


def test_predicate_depends_on_the_attributes_alone() -> None:
    here = world()
    for seed in range(5):
        graph = here.draw(20, 8, generator=seeded(seed))
        shown = graph.target > 0
        assert torch.equal(
            graph.target[shown], here.predicate[graph.subject[shown] % 4, graph.object[shown] % 4]
        )


def test_held_out_pairs_are_annotated_in_test_graphs_only() -> None:
    here = world(held_out=0.5)
    assert int(here.held_out.sum()) == 200

    def annotated_held_out(graph: SceneGraph) -> int:
        return int(here.held_out[graph.subject, graph.object][graph.target > 0].sum())

    seeds = range(10)
    assert not any(annotated_held_out(here.draw(10, 8, generator=seeded(s))) for s in seeds)
    assert any(annotated_held_out(here.draw(10, 8, training=False, generator=seeded(s))) for s in seeds)


def test_fewer_annotations_where_fewer_pairs_may_have_one() -> None:
    here = world(held_out=0.9)
    graph = here.draw(3, 6, generator=seeded(2))
    allowed = ~here.held_out[graph.subject, graph.object]
    assert torch.equal(graph.target > 0, allowed)


def test_salient_pairs_are_annotated() -> None:
    graph = world().draw(20, 8, training=False, generator=seeded(3))
    salience = graph.features[:, -1]
    assert salience[graph.target > 0].max() < salience.median()


def test_zipf_makes_the_first_class_frequent() -> None:
    here = world()
    first = {
        zipf: sum(
            int((here.draw(20, 1, zipf=zipf, generator=seeded(s)).subject == 0).sum()) for s in range(20)
        )
        / (20 * 380)
        for zipf in (True, False)
    }
    # 1 / sum_k 1/k over 20 classes is 0.278; uniformly 0.05
    assert first[True] == pytest.approx(0.278, abs=0.06)
    assert first[False] == pytest.approx(0.05, abs=0.03)


def test_the_generator_fixes_everything() -> None:
    graphs = [world().draw(8, 4, generator=seeded(5)) for _ in range(2)]
    torch.rand(3)
    assert all(torch.equal(one, other) for one, other in zip(*graphs, strict=True))


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="held_out must lie in"):
        SceneGraphWorld(held_out=1.0)
    with pytest.raises(ValueError, match="classes must lie in"):
        SceneGraphWorld(classes=0)
    with pytest.raises(ValueError, match="nodes must lie in"):
        world().draw(1, 1)
    with pytest.raises(ValueError, match="edges must lie in"):
        world().draw(3, 0)
