"""The contract: what must hold for every connector that is found, the user's own included.

    python -m pytest tests/test_contract.py                    # all that `list connectors` shows
    python -m pytest tests/test_contract.py --connector mine   # one of them

tests/random_vlm.py has the options of those whose defaults do not suit an image of 2 x 2 patches.
"""

from __future__ import annotations

import multiprocessing
import socket
from dataclasses import replace

import peft
import pytest
import torch
import two_process_gradients
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from test_vlm import assert_same, gradients, grown

from vlbench.connector import registry
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.connector_cost import count_connector_cost
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.strict_values import convert_value

LLAVA = registry.load_connector("llava_mlp")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vlm" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--connector")
        metafunc.parametrize(
            "vlm", [asked] if asked else list(registry.connector_locations()), indirect=True
        )


@pytest.fixture
def vlm(request: pytest.FixtureRequest) -> LoadedVLM:
    """Return a small model with the connector, its gates open, in float64."""
    return open_gates(
        small_vlm(registry.load_connector(request.param), SMALL.get(request.param)).to(
            torch.float64
        )
    )


def batch(vlm: LoadedVLM, rows: list) -> object:
    return make_batch(vlm, rows).to("cpu", torch.float64)


def test_shapes_are_as_declared(vlm):
    visual = vlm.visual(batch(vlm, [[make_sample(1, images=2)]]))
    assert len(visual) == 2 and visual.dim() == 3
    if vlm.connector.replaces_image_tokens:
        assert visual.shape[1:] == (vlm.connector.tokens_per_image, vlm.model.shapes.lm_width)
    else:
        assert (
            vlm.connector.image_embedding.shape == (vlm.model.shapes.lm_width,)
            and vlm.connector.inject_layers
        )


def test_its_sizes_are_options_with_values_that_they_may_have(vlm):
    known, sizes = registry.connector_options(type(vlm.connector)), vlm.connector.size_options
    for option, values in sizes.items():
        assert all(convert_value(value, known[option].kind) == value for value in values)
        assert len(set(values)) == len(values) > 1


def test_every_parameter_learns_something(vlm):
    vlm.model.zero_grad()
    out = vlm(batch(vlm, [[make_sample(1), make_sample(2, images=2)]]))
    (out.loss_sum + sum(value for value, _ in out.extra.values())).backward()
    still = [n for n, p in vlm.connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_a_sample_does_not_notice_its_neighbours(vlm):
    samples = [
        make_sample(1),
        make_sample(2, images=2, words=40),
        make_sample(3, images=0),
        make_sample(4, words=1),
    ]
    alone = gradients(vlm, [batch(vlm, [[one]]) for one in samples])
    for rows in ([samples], [samples[::-1]], [[one] for one in samples]):
        assert_same(alone, gradients(vlm, [batch(vlm, rows)]))


def test_its_objectives_do_not_depend_on_the_packing(vlm):
    """An objective that compares samples has them from `contrast_pool`, not a micro-batch."""
    samples = [make_sample(number, words=number) for number in range(1, 7)]
    for name in vlm.connector.objectives():
        vlm.model.set_objective(name)
        whole = pursued(vlm, [samples])
        for rows in ([samples[:1], samples[:0:-1]], [[one] for one in samples]):
            assert_same(whole, pursued(vlm, rows), 1e-8)


def pursued(vlm: LoadedVLM, rows: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of a step of the connector's own objective, a row a time."""
    batches = [batch(vlm, [row]) for row in rows]
    torch.manual_seed(5)  # of the step
    vlm.model.zero_grad()
    total = 0.0
    for one in add_contrast_pools(vlm.model, batches):
        loss = sum(value for value, _ in vlm(one).extra.values())
        loss.backward()
        total += float(loss)
    return total, {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}


def test_text_alone_gives_every_parameter_a_gradient(vlm):
    vlm.model.zero_grad()
    out = vlm(batch(vlm, [[make_sample(1, images=0)]]))
    (out.loss_sum + sum(value for value, _ in out.extra.values())).backward()
    assert not [n for n, p in vlm.connector.named_parameters() if p.grad is None]


def test_recomputing_activations_changes_nothing(vlm):
    rows = [[make_sample(1), make_sample(2, images=2)]]
    before = gradients(vlm, [batch(vlm, rows)])
    vlm.model.enable_activation_checkpointing("full")
    assert_same(before, gradients(vlm, [batch(vlm, rows)]), 1e-9)


def test_cached_generation_equals_recomputation(vlm):
    asked = [make_sample(1), make_sample(2, images=2, words=30), make_sample(3, images=0)]
    asked = [replace(one, turns=one.turns[:1]) for one in asked]
    together = vlm.generate(vlm.processor.collate_prompts(asked), max_new_tokens=6)
    for one, expected in zip(asked, together, strict=True):
        prompt = vlm.processor.collate_prompts([one])
        for token in expected:  # no cache: the whole prompt again for every token
            assert int(vlm(prompt).logits[0, -1, : vlm.tokenizer.embedding_rows].argmax()) == token
            prompt = grown(prompt, token)


def test_its_cost_is_counted_while_it_is_trained(vlm):
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    found = count_connector_cost(vlm.model)
    assert found.tokens == vlm.connector.tokens_per_image and found.flops > 0 < found.cache
    assert found.parameters == sum(p.numel() for p in vlm.connector.parameters())
    assert {name for name, p in vlm.model.named_parameters() if p.requires_grad} == trained


def test_a_saved_state_gives_the_same(vlm):
    other = small_vlm(type(vlm.connector), vlm.model.connector_options).to(torch.float64)
    for parameter in other.connector.parameters():
        parameter.data.normal_()
    other.connector.load_state_dict(vlm.connector.state_dict())
    rows = [[make_sample(1), make_sample(2, images=2)]]
    with torch.no_grad():
        assert vlm(batch(vlm, rows)).loss_sum.equal(other(batch(other, rows)).loss_sum)


def test_the_language_models_names_are_untouched(vlm):
    assert set(vlm.language.state_dict()) == set(small_vlm(LLAVA).language.state_dict())


def test_it_works_with_lora_in_the_language_model(vlm):
    prompt = vlm.processor.collate_prompts(
        [replace(make_sample(2, images=2), turns=make_sample(2, images=2).turns[:1])]
    )
    rows = batch(vlm, [[make_sample(1), make_sample(2, images=2)], [make_sample(3, images=0)]])
    vlm.language.requires_grad_(False)
    torch.manual_seed(1)
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), vlm.language)
    adapters = {n: p for n, p in vlm.language.named_parameters() if p.requires_grad}
    for parameter in adapters.values():
        parameter.data.normal_(std=0.1)
    out = vlm(rows)
    (out.loss_sum + sum(value for value, _ in out.extra.values())).backward()
    assert adapters and all(p.grad.any() for p in adapters.values())
    assert all(p.grad is not None for p in vlm.connector.parameters())
    unmerged = vlm.generate(prompt, max_new_tokens=4), vlm(rows).loss_sum
    for module in vlm.language.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    assert vlm.generate(prompt, max_new_tokens=4) == unmerged[0]
    torch.testing.assert_close(vlm(rows).loss_sum, unmerged[1])


def test_looking_at_what_it_uses_changes_nothing(vlm):
    vlm.language.requires_grad_(False)
    kept = replace(make_sample(2, images=2), turns=make_sample(2, images=2).turns[:1])
    rows = batch(vlm, [[make_sample(1), make_sample(2, images=2)]])
    before = vlm(rows).loss_sum
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    modes = [module.training for module in vlm.model.modules()]
    random = torch.get_rng_state()
    told = diagnose_answers(vlm, [(EvalQuestion(kept, "two", "", "en"), "three")])
    assert torch.equal(torch.get_rng_state(), random)
    assert {name for name, p in vlm.model.named_parameters() if p.requires_grad} == trained
    assert [module.training for module in vlm.model.modules()] == modes
    assert vlm(rows).loss_sum.equal(before) and all(p.grad is None for p in vlm.parameters())
    relevance = torch.tensor(told["maps"][0]["relevance"])
    assert list(relevance.shape) == told["maps"][0]["grid"] == list(vlm.model.shapes.grid)
    assert relevance.min() >= 0 and relevance.sum().sub(1).abs() < 1e-4
    assert len(told["tokens"]) == vlm.visual(rows).shape[1]
    assert 1 <= told["effective"] <= len(told["tokens"]) + 1e-4


def test_attention_if_any_has_a_share_for_each_patch(vlm):
    features = vlm.features(batch(vlm, [[make_sample(2, images=2)]])).detach()
    visual = vlm.connector(features)
    shares = vlm.connector.patch_attention(features)
    if shares is not None:
        assert shares.shape == (*visual.shape[:2], vlm.model.shapes.patches) and shares.min() >= 0
        torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    assert vlm.connector(features).equal(visual)


def test_metrics_are_numbers(vlm):
    assert all(isinstance(value, float) for value in vlm.connector.metrics().values())


def test_two_processes_learn_what_one_does(request):
    """Under DDP and FSDP2, on CPUs; all connectors share the two processes."""
    asked = request.config.getoption("--connector")
    names = [asked] if asked else list(registry.connector_locations())
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(
            target=two_process_gradients.compare_connectors, args=(rank, port, names, answers)
        )
        for rank in range(two_process_gradients.WORLD)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=200) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[], []]


def test_another_image_size_is_taken(vlm):
    vlm.set_image_size(56)
    assert vlm(batch(vlm, [[make_sample(1, images=2)]])).loss_sum.isfinite()
    again = vlm.processor.collate_prompts([replace(make_sample(1), turns=make_sample(1).turns[:1])])
    assert vlm.generate(again, max_new_tokens=2)
