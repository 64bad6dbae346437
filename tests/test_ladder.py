"""The ladder of notebooks 05 and 06 (notebooks/ladder.py)."""

import pytest
import torch

import vae_helpers as vh

from ladder import FREE, Ladder, Level, draw_ladder, free_bits  # isort: skip


@pytest.fixture
def x():
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture
def ladder():
    torch.manual_seed(0)
    return Ladder({1: 4, 4: 3, 16: 2})


def test_terms_are_one_value_for_each_image_and_level(ladder, x):
    recon, kl = ladder.terms(x)
    assert recon.shape == (6,) and [level.shape for level in kl] == [(6,)] * 3
    assert vh.log_likelihood(ladder, x, num_samples=3).shape == (6,)


def test_kl_of_a_sample_agrees_with_the_closed_form_in_the_mean(ladder, x):
    """At the top level, whose features do not depend on what was drawn."""
    torch.nn.init.normal_(ladder.eval().levels[0].to_q[-1][-1].weight, std=0.5)
    features, seen = ladder.grow(ladder.top(6, None), 1), ladder.look(x)
    level = ladder.levels[0]
    p_z = level.prior(features)
    exact = torch.distributions.kl_divergence(level.posterior(p_z, features, seen[0]), p_z)
    with torch.no_grad():
        sampled = torch.stack([ladder.terms(x)[1][0] for _ in range(300)])
    assert ((sampled.mean(0) - exact).abs() < 5 * sampled.std(0) / 300**0.5).all() and (exact > 0.01).all()


def test_a_level_without_a_change_costs_nothing():
    torch.manual_seed(0)
    level = Level(8, 2).eval()
    for parameter in level.to_q[-1][-1].parameters():
        torch.nn.init.zeros_(parameter)
    features, seen = torch.randn(2, 3, 8, 4, 4)
    p_z = level.prior(features)
    q_z = level.posterior(p_z, features, seen)
    assert torch.equal(q_z.mean, p_z.mean) and torch.equal(q_z.stddev, p_z.stddev)


def test_without_kept_levels_a_reconstruction_is_a_sample(ladder, x):
    with vh.seeded(1):
        drawn = ladder.sample(6)
    with vh.seeded(1):
        assert torch.equal(ladder.reconstruct(x, keep=0), drawn)
    kept = ladder.reconstruct(x, keep=1)
    assert not torch.equal(kept, drawn) and drawn.shape == kept.shape == x.shape and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(ladder.reconstruct(x), ladder.reconstruct(x)), "nothing is drawn when every level is kept"


def test_free_bits_are_free_in_training_only(ladder, x):
    values = free_bits(ladder.eval(), x, torch.zeros(6, dtype=torch.int64))
    assert torch.allclose(values["loss"], values["kl"] - values["recon"])
    with vh.seeded(2):
        values = free_bits(ladder.train(), x, torch.zeros(6, dtype=torch.int64))
    with vh.seeded(2):
        recon, kl = ladder.terms(x)
    assert kl[0].mean() < FREE[1], "the untrained top is below what is free"
    paid = FREE[1] + max(FREE[4], kl[1].mean()) + kl[2].mean()
    assert torch.allclose(values["loss"], paid - recon, rtol=1e-4)


def test_for_samples_leaves_the_model_and_takes_the_statistics_of_samples(ladder):
    before = {name: value.clone() for name, value in ladder.state_dict().items()}
    ladder.eval()
    with vh.seeded(3):
        other = ladder.for_samples(num_batches=10, batch_size=50)
    assert all(torch.equal(value, before[name]) for name, value in ladder.state_dict().items())
    features = []
    other.out[1].register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    other.sample(500)
    mean, fresh = features[0].mean((0, 2, 3)), other.out[1].running_mean
    stale = ladder.out[1].running_mean
    assert (mean - fresh).norm() < 0.2 * (mean - stale).norm()


def test_each_label_has_features_of_its_own_at_the_top(x):
    torch.manual_seed(0)
    ladder, y = Ladder({1: 4, 8: 2}, num_classes=3).eval(), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.nn.init.normal_(ladder.start)
    with vh.seeded(1):
        one = ladder.sample(6, y)
    with vh.seeded(1):
        other = ladder.sample(6, torch.zeros_like(y))
    same = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    assert same == [True, False, False, True, False, False]
    assert ladder.elbo_terms(x, y)[0].shape == (6,)


@pytest.mark.parametrize("grids", [{}, {2: 8}, {8: 8, 1: 16}, {32: 2}])
def test_other_grids_are_refused(grids):
    with pytest.raises(ValueError, match="grids"):
        Ladder(grids)


def test_a_label_that_does_not_fit_is_refused(ladder, x):
    y = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="y is given"):
        ladder.elbo_terms(x, y)
    conditional = Ladder({8: 2}, num_classes=3)
    for wrong in (None, y + 3, y.float(), y[:5]):
        with pytest.raises(ValueError, match="y "):
            conditional.elbo_terms(x, wrong)


def test_the_diagram_names_every_level():
    texts = [text.get_text() for text in draw_ladder({1: 32, 8: 4}).axes[0].texts]
    assert sum("z_" in text and " x " in text for text in texts) == 2 and "$z_2$: 4 x 8 x 8" in texts


def test_a_draw_has_the_shapes_of_the_grids_and_samples_keep_what_is_given(ladder, x):
    with vh.seeded(1):
        drawn = ladder.draw(x)
    assert [list(z.shape) for z, _ in drawn] == [[6, 4, 1, 1], [6, 3, 4, 4], [6, 2, 16, 16]]
    assert all(p_z.mean.shape == z.shape for z, p_z in drawn)
    given = [z for z, _ in drawn]
    assert torch.equal(ladder.sample(6, given=given), ladder.sample(6, given=given)), "nothing is left to draw"
    seen = []
    ladder.levels[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    ladder.sample(6, given=given[:2])
    ladder.for_samples(lambda count: [z[:1].expand(count, -1, -1, -1) for z in given[:2]], num_batches=1, batch_size=8)
    assert torch.equal(seen[0], given[1]) and torch.equal(seen[1], given[1][:1].expand(8, -1, -1, -1))


def test_the_shipped_ladder_knows_photographs_better_than_noise():
    kept = torch.load(vh.ROOT / "notebooks/weights/cifar10_ladder.pt", weights_only=True)
    ladder = Ladder(kept["grids"]).eval()
    ladder.load_state_dict(kept["state"])
    photos, noise = vh.load_data("photos").test.images[:50], torch.randint(0, 256, (50, 3, 32, 32))
    bits = [vh.bits_per_dim(-vh.evaluate(ladder, vh.Split(images.byte(), torch.zeros(50).long()))["loss"], 3 * 32 * 32)
            for images in (photos, noise)]
    assert bits[0] < 6 < 8 < bits[1], bits
