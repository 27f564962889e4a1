"""The shelf: what each connector does to the patches, and records where a reference exists."""

from __future__ import annotations

import pytest
import torch
from reference_records import assert_gradient, assert_gradients, assert_outputs, load_record

from vlbench.config import recipe
from vlbench.config.recipe import to_plain as plain_recipe
from vlbench.config.recipe_files import size_files
from vlbench.connector import registry
from vlbench.connector.base import Shapes

SHAPES = Shapes(patches=16, grid=(4, 4), vision_width=8, lm_width=12, lm_layers=2)
FOUR = ("llava", "qformer", "flamingo", "eva")


@pytest.mark.parametrize("depth", [2, 3])
def test_yi_vls_projector_equals_the_reference(depth):
    case = f"projector_yi_vl_mlp{depth}x_gelu_Norm"
    weights, inputs = load_record(case, "state_dict"), load_record(case, "inputs")
    lm_width, vision_width = weights["0.weight"].shape
    connector = registry.load_connector("llava_mlp")(
        Shapes(16, (4, 4), vision_width, lm_width, 2), depth=depth
    )
    connector.load_reference(weights)
    (name,) = (key for key in inputs if not key.startswith("ct."))
    (cotangent,) = (key for key in inputs if key.startswith("ct."))
    features = inputs[name].requires_grad_()
    out = connector(features)
    assert_outputs(out, load_record(case, "outputs")[cotangent.removeprefix("ct.")])
    (out * inputs[cotangent]).sum().backward()
    grads = load_record(case, "grads")
    assert_gradient(features.grad, grads[f"input.{name}"], name)
    assert_gradients(connector.layers, grads)


def test_an_mlp_of_another_width_is_no_released_projector():
    connector = registry.load_connector("llava_mlp")(SHAPES, depth=3, mlp_ratio=2.0)
    assert [one.weight.shape for one in connector.layers if isinstance(one, torch.nn.Linear)] == [
        (24, 8),
        (24, 24),
        (12, 24),
    ]
    assert connector(torch.randn(2, 16, 8)).shape == (2, 16, 12)
    assert connector.released_projector() is None
    assert (
        registry.load_connector("llava_mlp")(SHAPES, mlp_ratio=1.0).released_projector() is not None
    )


def test_the_glu_equals_cogvlms():
    connector = registry.load_connector("glu")(Shapes(16, (4, 4), 32, 40, 2), mlp_ratio=1.4)
    connector.load_reference(load_record("cogvlm_adapter", "state_dict"))
    outputs = load_record("cogvlm_adapter", "outputs")
    tokens = connector(outputs["tower"])
    assert_outputs(tokens[:, 1:-1], outputs["glu"])
    state = load_record("cogvlm_adapter", "state_dict")
    assert torch.equal(tokens[:, 0], state["boi"][0].expand(2, -1))
    assert torch.equal(tokens[:, -1], state["eoi"][0].expand(2, -1))


def numbered() -> torch.Tensor:
    """Return features whose values say row and column of their patch."""
    return torch.arange(16.0).view(1, 16, 1).expand(1, 16, 8)


def test_pixel_shuffle_brings_neighbours_together():
    connector = registry.load_connector("pixel_shuffle")(SHAPES)
    connector.layers = torch.nn.Identity()
    squares = connector(numbered()).view(4, 4, 8)[..., 0]
    assert squares.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_avgpool_takes_the_mean_of_neighbours():
    connector = registry.load_connector("avgpool")(SHAPES)
    connector.layers = torch.nn.Identity()
    assert connector(numbered())[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def built(name, shapes, options):
    """Return a connector whose LayerNorms and biases are random too, and features."""
    torch.manual_seed(0)
    connector = registry.load_connector(name)(shapes, **options).double()
    for parameter in connector.parameters():
        parameter.data.normal_(std=0.5)
    return connector, torch.randn(2, shapes.patches, shapes.vision_width, dtype=torch.float64)


def torch_attention(connector, width):
    """Return torch's own attention with the layers of `connector`."""
    attention = torch.nn.MultiheadAttention(width, connector.heads, batch_first=True).double()
    layers = (connector.to_q, connector.to_k, connector.to_v)
    attention.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
    attention.in_proj_bias.data = torch.cat([layer.bias for layer in layers])
    attention.out_proj.load_state_dict(connector.to_out.state_dict())
    return attention


def patches_of(grid, side, row, column):
    """Return the numbers of the patches of the window at `row`, `column`, one by one."""
    return [
        (row * side + y) * grid[1] + column * side + x for y in range(side) for x in range(side)
    ]


WIDE = Shapes(patches=24, grid=(4, 6), vision_width=8, lm_width=12, lm_layers=2)


def test_attention_pool_is_attention_of_each_windows_mean():
    connector, features = built("attention_pool", WIDE, {"head_width": 4})
    attention = torch_attention(connector, 8)
    pooled, shares = [], torch.zeros(2, 6, 24, dtype=torch.float64)
    for number, (row, column) in enumerate((row, column) for row in (0, 1) for column in range(3)):
        of_window = patches_of((4, 6), 2, row, column)
        patches = features[:, of_window]
        out, weights = attention(patches.sum(1, keepdim=True) / 4, patches, patches)
        pooled.append(out)
        shares[:, number, of_window] = weights[:, 0]
    pooled = torch.cat(pooled, dim=1)
    gate = pooled @ connector.gate_proj.weight.T
    hidden = gate * torch.sigmoid(gate) * (pooled @ connector.up_proj.weight.T)
    torch.testing.assert_close(connector(features), hidden @ connector.down_proj.weight.T)
    torch.testing.assert_close(connector.patch_attention(features), shares.float())


@pytest.mark.parametrize(("scale", "grid"), [(1, (2, 2)), (2, (4, 6)), (3, (3, 6)), (4, (8, 4))])
def test_token_packer_is_attention_of_the_interpolated_image_to_its_regions(scale, grid):
    shapes = Shapes(grid[0] * grid[1], grid, vision_width=8, lm_width=12, lm_layers=2)
    connector, features = built(
        "token_packer", shapes, {"scale": scale, "width": 6, "head_width": 3}
    )
    small = (grid[0] // scale, grid[1] // scale)
    image = features.transpose(1, 2).unflatten(2, grid)
    coarse = torch.nn.functional.interpolate(image, small, mode="bilinear").flatten(2)
    queries = connector.ln_q(connector.query_proj(coarse.transpose(1, 2)))
    keys = connector.ln_k(connector.key_proj(features))
    values = connector.ln_v(connector.value_proj(features))
    attention, packed = torch_attention(connector, 6), []
    for number in range(small[0] * small[1]):
        of_region = patches_of(grid, scale, *divmod(number, small[1]))
        query = queries[:, number : number + 1]
        packed.append(attention(query, keys[:, of_region], values[:, of_region])[0])
    expected = connector.layers(torch.cat(packed, dim=1))
    torch.testing.assert_close(connector(features), expected)
    shares = connector.patch_attention(features)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, len(packed)))


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("linear", {}, 16),
        ("avgpool", {"pool": 4}, 1),
        ("pixel_shuffle", {}, 4),
        ("glu", {}, 18),
        ("resampler", {"side": 3, "heads": 3}, 9),
        ("c_abstractor", {"side": 2, "depth": 1, "width": 16}, 4),
        ("attention_pool", {"head_width": 4}, 4),
        ("token_packer", {"scale": 4, "width": 6, "head_width": 3}, 1),
    ],
)
def test_an_image_takes_as_many_tokens_as_is_said(name, options, tokens):
    connector = registry.load_connector(name)(SHAPES, **options)
    assert connector.tokens_per_image == tokens
    assert connector(torch.randn(2, 16, 8)).shape == (2, tokens, 12)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("avgpool", {"pool": 3}, "pool is 3, which must divide the grid of patches, 4 x 4"),
        ("pixel_shuffle", {"shuffle": 0}, "shuffle is 0"),
        ("llava_mlp", {"mlp_ratio": 0.0}, "mlp_ratio is 0.0; it must be above 0"),
        ("llava_mlp", {"depth": 1, "mlp_ratio": 2.0}, "depth=1 has no hidden layer"),
        ("glu", {"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ("resampler", {"heads": 5}, "heads is 5, which must divide the language model's width 12"),
        ("resampler", {"side": 0}, "side is 0"),
        ("c_abstractor", {"depth": 0}, "depth is 0"),
        ("attention_pool", {"window": 3}, "window is 3, which must divide the grid of patches"),
        ("attention_pool", {}, "head_width is 64, which must divide the vision encoder's width 8"),
        ("attention_pool", {"head_width": 4, "mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ("token_packer", {"scale": 0}, "scale is 0, which must divide the grid of patches"),
        ("token_packer", {"width": 100}, "head_width is 128, which must divide width 100"),
    ],
)
def test_impossible_options_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        registry.load_connector(name)(SHAPES, **options)


@pytest.mark.parametrize("size", size_files())
def test_the_four_recipes_differ_in_their_connector_alone(size):
    plain = []
    for name in FOUR:
        one = plain_recipe(recipe.load_recipe([f"recipe=yivl_{name}", f"size={size}"]))
        assert one.pop("connector")["name"] in (name, "llava_mlp")
        one.pop("recipe")
        plain.append(one)
    assert all(one == plain[0] for one in plain)
