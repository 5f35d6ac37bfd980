"""The projector: frames stacked, projected, gated, and mixed from token embeddings; against arithmetic by hand."""

import pytest
import torch
from torch.nn.functional import gelu

from tests import tiny
from voxlm_hf.modeling_voxlm import FRAMES_AT_ONCE, VoxLMProjector


FRAME_SIZE, TEXT_SIZE, STRIDE = 16, 32, 4


def projector(**fields) -> VoxLMProjector:
    torch.manual_seed(0)
    made = VoxLMProjector(tiny.config(**fields)).eval()
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 2.0)
    return made


def batch_of(*lengths):
    """Random frames, with values that must not matter where the mask is 0, and their mask."""
    frames, mask = tiny.encoder_states(*lengths)
    return torch.where(mask.unsqueeze(-1) == 1, frames, torch.full_like(frames, 100.0)), mask


def by_hand(made, frames):
    """The MLP projector, one group of frames at a time: `(frames, size)` to `(projected, text size)`."""
    rows = []
    for first in range(0, len(frames), STRIDE):
        group = torch.cat([frames[first : first + STRIDE], torch.zeros(STRIDE, FRAME_SIZE)])[:STRIDE]
        hidden = made.linear_out(gelu(made.linear_in(group.flatten())))
        rows.append(hidden / (hidden.pow(2).mean() + 1e-6).sqrt() * made.norm.weight)
    return torch.stack(rows)


@torch.no_grad()
def test_frames_are_stacked_and_projected_in_groups():
    made, (frames, mask) = projector(), batch_of(8, 6)
    output = made(frames, mask)
    for row, length in enumerate((8, 6)):  # the last group of the second row has two frames and two zeros
        torch.testing.assert_close(output["pooler_output"][row], by_hand(made, frames[row, :length]))


@pytest.mark.parametrize("frames, projected", [(0, 0), (1, 1), (4, 1), (5, 2), (100, 25)])
def test_output_lengths(frames, projected):
    assert int(projector().output_lengths(torch.tensor(frames))) == projected


@torch.no_grad()
def test_the_mask_has_one_place_for_each_group_with_a_real_frame():
    output = projector()(*batch_of(9, 4, 1))
    assert output["audio_embeds_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert output["visible_mask"] is output["audio_embeds_mask"]  # without a gate all real frames are visible


@pytest.mark.parametrize("kind", ["mlp", "convnext"])
@torch.no_grad()
def test_padding_changes_nothing(kind):
    made, (frames, mask) = projector(projector_kind=kind, frame_gate_threshold=0.5), batch_of(23, 9)
    together, alone = made(frames, mask), made(frames[1:, :9], mask[1:, :9])
    for name in ("pooler_output", "gate_logits"):
        torch.testing.assert_close(together[name][1, :3], alone[name][0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_convnext_blocks_see_neighbouring_frames():
    made, (frames, mask) = projector(projector_kind="convnext"), tiny.encoder_states(40)
    before = made(frames, mask)["pooler_output"]
    frames[0, 20] += 1.0  # in the sixth group; three blocks reach three groups to either side each
    changed = (made(frames, mask)["pooler_output"] != before).any(-1)[0]
    assert changed.all() and len(changed) == 10
    plain = projector()
    unchanged = plain(tiny.encoder_states(40)[0], mask)["pooler_output"] == plain(frames, mask)["pooler_output"]
    assert unchanged.all(-1)[0].tolist() == [group != 5 for group in range(10)]


@torch.no_grad()
def test_the_gate_shows_frames_whose_probability_is_above_the_threshold():
    made, (frames, mask) = projector(frame_gate_threshold=0.3), batch_of(40, 23)
    made.gate.weight.mul_(20)
    output = made(frames, mask)
    probabilities = 1 / (1 + torch.exp(-output["gate_logits"].double()))
    expected = (probabilities > 0.3) & (output["audio_embeds_mask"] == 1)
    assert output["visible_mask"].bool().tolist() == expected.tolist()
    assert 0 < int(expected.sum()) < expected.numel()


def test_the_scale_is_that_of_the_embeddings():
    made = projector()
    made.scale_to(torch.tensor([[3.0, -4.0], [0.0, 5.0]]))
    torch.testing.assert_close(made.norm.weight, torch.full((TEXT_SIZE,), 12.5**0.5))  # root of (9 + 16 + 0 + 25) / 4


# Token mixture: three tokens with orthogonal embeddings.
TOKENS = torch.eye(3)
FRAMES = torch.tensor([[[100.0, 0, 0], [100.0, 0, 0], [0, 100.0, 0], [0, 50.0, 50.0], [0, 100.0, 0]]])
PASSES = torch.tensor([[True, True, False, True, True]])


@pytest.fixture
def mixture():
    return projector(projector_readout="token_mixture", frame_gate_threshold=0.5)


@torch.no_grad()
def test_a_sure_frame_is_its_token_and_a_torn_one_the_mean(mixture):
    mixtures, _ = mixture.mix_tokens(FRAMES, PASSES, TOKENS)
    expected = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 0.5, 0.5], [0, 1.0, 0]]])
    torch.testing.assert_close(mixtures, expected)


@torch.no_grad()
def test_repeats_and_gated_frames_have_no_token(mixture):
    _, tokens = mixture.mix_tokens(FRAMES, PASSES, TOKENS)
    assert tokens[0, :3].tolist() == [0, -1, -1]
    assert tokens[0, 3] in (1, 2)  # torn between both


@torch.no_grad()
def test_the_same_token_after_a_gated_frame_is_said_again(mixture):
    frames = torch.tensor([[[0, 100.0, 0]] * 3])
    _, tokens = mixture.mix_tokens(frames, torch.tensor([[True, False, True]]), TOKENS)
    assert tokens.tolist() == [[1, -1, 1]]


@torch.no_grad()
def test_the_temperature_flattens_the_mixture(mixture):
    mixture.log_scale.fill_(-torch.inf)
    mixtures, _ = mixture.mix_tokens(FRAMES, PASSES, TOKENS)
    torch.testing.assert_close(mixtures[0, 0], torch.full((3,), 1 / 3))


@torch.no_grad()
def test_a_vocabulary_of_a_few_tokens_is_mixed_of_these(mixture):
    mixture.token_ids = torch.tensor([2, 0])
    frames = torch.tensor([[[0, 100.0, 50.0], [100.0, 0, 0]]])
    mixtures, tokens = mixture.mix_tokens(frames, torch.ones(1, 2, dtype=torch.bool), TOKENS)
    assert tokens.tolist() == [[2, 0]]
    torch.testing.assert_close(mixtures, torch.tensor([[[0, 0, 1.0], [1.0, 0, 0]]]))


@torch.no_grad()
def test_more_frames_than_are_scored_at_once(mixture):
    count = 2 * FRAMES_AT_ONCE + 5
    labels = torch.arange(count) % 3
    mixtures, tokens = mixture.mix_tokens(100 * TOKENS[labels][None], torch.ones(1, count, dtype=torch.bool), TOKENS)
    assert tokens[0].tolist() == labels.tolist()
    torch.testing.assert_close(mixtures[0], TOKENS[labels])


@torch.no_grad()
def test_with_a_mixture_visible_frames_are_those_with_a_token(mixture):
    embeddings = torch.randn(tiny.VOCAB_SIZE, TEXT_SIZE, generator=torch.manual_seed(1))
    output = mixture(*batch_of(60, 31), embeddings)
    assert (output["visible_mask"] == (output["tokens"] >= 0)).all()
    assert (output["tokens"][output["audio_embeds_mask"] == 0] == -1).all()
    assert output["ctc_states"].shape == output["pooler_output"].shape == (2, 15, TEXT_SIZE)
