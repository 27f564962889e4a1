"""What the connector returns: shapes, numbers, sizes, attention, metrics, saved state."""

from __future__ import annotations

import contextlib
from operator import itemgetter

import torch
from torch import Tensor

from vlbench.connector import registry
from vlbench.connector.blank_inputs import blank_inputs
from vlbench.connector.levels import Levels, as_levels, first_level, map_levels
from vlbench.contract_checks.gradient_comparison import language_loss
from vlbench.contract_checks.small_model import make_double_batch, make_sample
from vlbench.contract_checks.violations import require, require_none
from vlbench.model.connector_cost import count_connector_cost
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.strict_values import convert_value


def check_layers(vlm: LoadedVLM) -> None:
    """Forward makes no layers or buffers: all are there when the connector is built."""
    connector = vlm.connector.to(torch.float32)
    built = set(connector.state_dict())
    # what forward itself fails with is told by the next check
    with contextlib.suppress(Exception), torch.no_grad():
        connector(*blank_inputs(connector, vlm.model.shapes, device="cpu"))
    require_none(sorted(set(connector.state_dict()) - built), "forward makes")


def check_shapes(vlm: LoadedVLM) -> None:
    """Two images give two rows of the shape that the class declares."""
    connector, width = vlm.connector, vlm.model.shapes.lm_width
    visual = vlm.visual(make_double_batch(vlm, [[make_sample(1, images=2)]]))
    for level in as_levels(visual):
        require(
            level.dim() == 3 and len(level) == 2, f"forward gave {list(level.shape)} for 2 images"
        )
    grid, tokens = connector.token_grid, connector.tokens_per_image
    require(
        grid is None or grid[0] * grid[1] == tokens,
        f"token_grid is {grid}, and tokens_per_image {tokens}",
    )
    if connector.replaces_image_tokens:
        connector.check_output(visual, 2, width)
        return
    embedding = getattr(connector, "image_embedding", None)
    shape = None if embedding is None else list(embedding.shape)
    require(shape == [width], f"image_embedding is {shape}, lm_width is {width}")
    require(bool(connector.inject_layers), "it neither replaces image tokens nor injects")


def check_any_grid(vlm: LoadedVLM) -> None:
    """With `any_grid` each visual token is made of the patch at its place alone."""
    connector, shapes = vlm.connector, vlm.model.shapes
    if not connector.any_grid:
        return
    found = connector.tokens_per_image, connector.token_grid, connector.class_token
    require(
        found == (shapes.patches, shapes.grid, False),
        f"any_grid is True, and tokens_per_image, token_grid and class_token are {found}; they are "
        f"{(shapes.patches, shapes.grid, False)} where each token is a patch",
    )
    batch = make_double_batch(vlm, [[make_sample(1, images=2)]])
    with torch.no_grad():
        features = vlm.features(batch)
        visual, flipped, changed = (
            connector(*vlm.model.connector_inputs(batch, map_levels(change, features)))
            for change in (Tensor.clone, lambda level: level.flip(1), _change_last_patch)
        )
    backwards = map_levels(lambda level: level.flip(1), flipped)
    before, after = (map_levels(lambda level: level[:, :-1], one) for one in (visual, changed))
    for one, other in ((visual, backwards), (before, after)):
        pairs = zip(as_levels(one), as_levels(other), strict=True)
        alike = all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in pairs)
        require(alike, "any_grid is True, and a visual token depends on other patches than its own")


def _change_last_patch(level: Tensor) -> Tensor:
    return torch.cat([level[:, :-1], level[:, -1:] + 1], dim=1)


def check_finite(vlm: LoadedVLM) -> None:
    """Visual tokens and the loss are finite numbers."""
    batch = make_double_batch(vlm, [[make_sample(1, images=2)]])
    for level in as_levels(vlm.visual(batch)):
        wrong = int((~level.isfinite()).sum())
        require(
            not wrong, f"{wrong} of {level.numel()} numbers that forward gave are NaN or infinite"
        )
    out = vlm(batch)
    losses = {"language": out.loss_sum, **{name: value for name, (value, _) in out.extra.items()}}
    bad = [name for name, value in losses.items() if value is None or not value.isfinite()]
    require(not bad, f"NaN or infinite loss: {', '.join(bad)}")


def check_determinism(vlm: LoadedVLM) -> None:
    """The same images give the same, in training and evaluation, whatever the random state."""
    batch = make_double_batch(vlm, [[make_sample(1, images=2)]])
    for mode in ("training", "evaluation"):
        vlm.train(mode == "training")
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append((vlm.visual(batch), language_loss(vlm, batch)))
        (visual, loss), (visual_again, loss_again) = found
        require(
            _equal_levels(visual, visual_again),
            f"forward gave two results for the same images in {mode}",
        )
        require(loss.equal(loss_again), f"the same samples gave two losses in {mode}")


def check_inputs(vlm: LoadedVLM) -> None:
    """Forward leaves the features as they are: others read them, too."""
    batch = make_double_batch(vlm, [[make_sample(1, images=2)]])
    with torch.no_grad():
        features = vlm.features(batch)
        before = map_levels(Tensor.clone, features)
        vlm.connector(*vlm.model.connector_inputs(batch, features))
    require(_equal_levels(before, features), "forward writes into the features that it is given")


def check_device(vlm: LoadedVLM) -> None:
    """What forward computes with follows the model to another device, here `meta`."""
    connector = vlm.connector.to("meta")
    with torch.no_grad():
        connector(*blank_inputs(connector, vlm.model.shapes, torch.float64, views=2))


def check_image_use(vlm: LoadedVLM) -> None:
    """Another image gives other visual tokens and another loss."""
    batch = make_double_batch(vlm, [[make_sample(1, images=2)]])
    with torch.no_grad():
        visual, loss = vlm.visual(batch), language_loss(vlm, batch)
        first, second = (map_levels(itemgetter(image), visual) for image in (0, 1))
        require(
            not _equal_levels(first, second), "two different images gave the same visual tokens"
        )
        batch.pixels = batch.pixels.flip(0)
        require(not loss.equal(language_loss(vlm, batch)), "the loss does not depend on the images")


def check_size_options(vlm: LoadedVLM) -> None:
    """`size_options` names options, with several values of their types."""
    known = registry.connector_options(type(vlm.connector))
    for option, values in vlm.connector.size_options.items():
        require(option in known, f"size_options names '{option}'; options: {', '.join(known)}")
        require(
            len(set(values)) == len(values) > 1, f"values of {option} are not several, or twice"
        )
        for value in values:
            fits = convert_value(value, known[option].kind) == value
            require(fits, f"{value!r} of size_options is no value of {option}")


def check_cost(vlm: LoadedVLM) -> None:
    """Its cost is counted, and counting leaves the model as it was."""
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    cost = count_connector_cost(vlm.model)
    parameters = sum(p.numel() for p in vlm.connector.parameters())
    require(
        cost.tokens == vlm.connector.tokens_per_image and cost.parameters == parameters,
        f"counted {cost.parameters} parameters and {cost.tokens} tokens, it has {parameters} and "
        f"{vlm.connector.tokens_per_image}",
    )
    require(cost.flops > 0 < cost.cache, "counted no work or no memory")
    after = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    require(after == trained, "counting changed which parameters are trained")


def check_saved_state(vlm: LoadedVLM) -> None:
    """A connector that was built anew, and loads the state dict, gives the same loss."""
    batch = make_double_batch(vlm, [[make_sample(1), make_sample(2, images=2)]])
    with torch.no_grad():
        before, state = language_loss(vlm, batch), vlm.connector.state_dict()
        torch.manual_seed(1)  # other random weights, and whatever else is drawn
        connector = type(vlm.connector)(vlm.model.shapes, **vlm.model.connector_options)
        connector.to(torch.float64).load_state_dict(state)
        vlm.model.connector = connector
        after = language_loss(vlm, batch)
    require(after.equal(before), f"the loss was {before:.6g} and is {after:.6g}")


def check_attention(vlm: LoadedVLM) -> None:
    """Attention, if there is any, has a share for each patch; computing it changes nothing."""
    batch = make_double_batch(vlm, [[make_sample(2, images=2)]])
    features = map_levels(torch.Tensor.detach, vlm.features(batch))
    inputs = vlm.model.connector_inputs(batch, features)
    visual = vlm.connector(*inputs)
    shares = vlm.connector.patch_attention(*inputs)
    if shares is not None:
        expected = (*first_level(visual).shape[:2], vlm.model.shapes.patches)
        require(
            shares.shape == expected,
            f"patch_attention gave {list(shares.shape)}, not {list(expected)}",
        )
        sums = shares.sum(-1)
        is_share = bool(shares.min() >= 0) and torch.allclose(sums, torch.ones_like(sums))
        require(is_share, "a row of patch_attention is not shares with the sum 1")
    again = vlm.connector(*inputs)
    require(_equal_levels(again, visual), "forward gives another result after it")


def _equal_levels(ours: Levels, theirs: Levels) -> bool:
    pairs = zip(as_levels(ours), as_levels(theirs), strict=True)
    return all(level.equal(other) for level, other in pairs)


def check_metrics(vlm: LoadedVLM) -> None:
    """Metrics are plain numbers."""
    wrong = [name for name, value in vlm.connector.metrics().items() if type(value) is not float]
    require(not wrong, f"no float: {', '.join(wrong)}")
