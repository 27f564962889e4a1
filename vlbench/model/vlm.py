"""Where the parts meet: the tower sees, the connector carries, the language model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlbench.connector import Connector, Shapes, zero_like_loss
from vlbench.data.batch import Batch
from vlbench.data.images import ImageTransform
from vlbench.data.sample import IMAGE
from vlbench.data.template import Template
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import Mistake
from vlbench.model.attention import Opaque, bounds, no_mask
from vlbench.model.contrast import alone, compares
from vlbench.model.generate import Stream, generate
from vlbench.model.loss import summed_loss
from vlbench.model.messages import prompt_batch, sample_of
from vlbench.model.past import Past
from vlbench.model.recompute import recompute
from vlbench.model.sampling import CHAT, refuse_unknown
from vlbench.model.static import Step
from vlbench.model.vision import Tower
from vlbench.model.weights.groups import place
from vlbench.model.weights.origin import WeightOrigin

PARTS = ("vision", "connector", "language")


@dataclass
class Output:
    """What a forward pass gives: logits for a batch without labels, otherwise sums of losses."""

    logits: Tensor | None = None
    """`[rows, length, vocabulary]`, or None when the batch has labels."""
    loss_sum: Tensor | None = None
    """Sum of the cross entropy over supervised positions."""
    tokens: int = 0
    """Number of supervised positions."""
    extra: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The connector's own losses, `{name: (sum, count)}`."""
    features: Tensor | None = None
    """What the tower gave, when it was asked for what pairs are compared by."""
    embedded: dict[str, Tensor] = field(default_factory=dict)
    """What pairs are compared by, see `Connector.embed`."""


class VLM(nn.Module):
    """A vision-language model: `vision`, `connector`, `language`, with tokenizer and template.

    Several threads may call `forward`, `generate` and `chat` of one model at once: these change
    nothing about it. What does (`train`, `resize`, `pursue`, `recompute`) is for one thread.
    """

    language: Any  # a causal language model of transformers with Llama's layout

    def __init__(
        self,
        vision: Tower,
        connector: type[Connector],
        options: dict[str, Any],
        language: nn.Module,
        tokenizer: Tokenizer,
        template: Template,
        max_length: int,
    ) -> None:
        """Build `connector` with `options` between `vision` and `language`."""
        super().__init__()
        self.vision, self.language = vision, language
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = template.bound(tokenizer.eos_text)
        tokenizer.limit(self.language.config.vocab_size)
        self._connector_class, self.options = connector, options
        self.objective, self._recomputes = "language", False
        self.connector = self._connect()
        self.release: dict[str, bytes] = {}  # small files of the released model it began as
        self.origins: dict[str, WeightOrigin] = {}  # what its parts began as, by name of the part
        self.step = Step()  # of compiled answers
        layers = self.language.model.layers
        self._hooks = [
            layers[i].register_forward_pre_hook(partial(_inject, self, i), with_kwargs=True)
            for i in self.connector.inject_at
        ]

    @property
    def shapes(self) -> Shapes:
        """What the connector has to fit, at the current image size."""
        return shapes_of(self.vision, self.language.config)

    @property
    def transform(self) -> ImageTransform:
        """The one image transform of training, evaluation and chat."""
        return self.vision.transform

    @property
    def device(self) -> torch.device:
        """Where the language model's embeddings are."""
        return self.language.get_input_embeddings().weight.device

    def _connect(self) -> Connector:
        connector = self._connector_class(self.shapes, **self.options)
        self.vision.class_token = connector.class_token
        return connector

    def resize(self, image_size: int) -> None:
        """Change the image size: the tower is resized, the connector built anew and adapted."""
        old_shapes, old_state = self.shapes, self.connector.state_dict()
        self.vision.resize(image_size)
        if self.shapes != old_shapes:
            connector = self._connect()
            connector.prepare(self.objective)
            connector.load_state_dict(dict(connector.adapt(old_state, old_shapes)), strict=True)
            before = next(iter(old_state.values()))
            place(connector, before.dtype, before.device)
            self.connector = connector

    def pursue(self, objective: str, fresh: bool = False) -> None:
        """Make the connector ready for a stage of `objective`; see `Connector.prepare`."""
        self.objective = objective
        before = next(self.connector.parameters(), None)
        self.connector.prepare(objective, fresh)
        if before is not None:
            place(self.connector, before.dtype, before.device)

    def train(self, mode: bool = True) -> VLM:
        """Set training mode, except for a frozen tower, which always runs in evaluation mode."""
        super().train(mode)
        if not self.vision_trains():
            self.vision.eval()
        return self

    def vision_trains(self) -> bool:
        """Tell whether any weight of the tower is trained."""
        return any(p.requires_grad for p in self.vision.parameters())

    def features(self, batch: Batch) -> Tensor:
        """Return the tower's features `[images, patches, vision_width]`; no gradient if frozen."""
        if batch.features is not None:
            return batch.features
        pixels = batch.pixels
        if not len(pixels):  # a batch of text alone still runs every part, so gradients exist
            side = self.vision.image_size
            pixels = pixels.new_zeros(1, 3, side, side)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_trains()):
            return self.vision(pixels.to(self.vision.dtype))

    def visual(self, batch: Batch) -> Tensor:
        """Return the visual tokens `[images, tokens, width]`."""
        return self.connector(self.features(batch))

    def fuse(self, batch: Batch, visual: Tensor) -> Tensor:
        """Return embeddings `[rows, length, lm_width]` with the visual tokens at their places."""
        embeds = self.language.get_input_embeddings()(batch.ids.clamp(min=0))
        if not len(batch.pixels):
            unused = [visual] if self.connector.fills_sequence else [visual, self.connector.place]
            return embeds + sum(zero_like_loss(one).to(embeds.dtype) for one in unused)
        places = batch.places
        if places is None:
            places = (batch.ids.flatten() == IMAGE).nonzero()[:, 0]
        if self.connector.fills_sequence:
            self.connector.keeps(visual, len(batch.pixels), embeds.shape[-1])
            values = visual.flatten(0, 1)
        else:
            values = self.connector.place.expand(len(places), -1)
        if len(values) != len(places):
            raise AssertionError(f"{len(places)} places for {len(values)} visual tokens")
        filled = embeds.flatten(0, 1).index_put((places,), values.to(embeds.dtype))
        return filled.view_as(embeds)

    def read(self, embeds: Tensor, visual: Tensor, sees: Tensor, **kwargs: Any) -> Any:
        """Run the decoder layers over `embeds`; `kwargs` go to the language model's forward."""
        if self.connector.inject_at:
            kwargs |= {"visual": visual, "sees": sees}
        return self.language.model(inputs_embeds=embeds, **kwargs)

    def hidden(self, batch: Batch, visual: Tensor) -> Tensor:
        """Return the last hidden states `[rows, length, lm_width]` of a batch without a cache."""
        return self.read(
            self.fuse(batch, visual),
            visual,
            batch.image_index,
            position_ids=batch.positions,
            attention_mask=no_mask(visual.device),
            lengths=Opaque(batch.lengths),
            bounds=bounds(batch.lengths, batch.ids.shape[1], visual.device),
            use_cache=False,
        ).last_hidden_state

    def loss(self, hidden: Tensor, labels: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the cross entropy of `labels`, summed over supervised positions (at `where`)."""
        return summed_loss(self.language.lm_head, hidden, labels, where)

    def recompute(self, how: str) -> None:
        """Save memory: compute activations again in the backward pass instead of keeping them.

        `how` is one of `model.recompute.WAYS`.
        """
        self._recomputes = recompute(self.language, self.vision.visual, how)

    def _kept(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `function`, after `recompute` one that keeps its inputs alone for the backward.

        transformers runs hooks of a layer outside of what it recomputes, or inside, by version.
        """
        if not (self._recomputes and torch.is_grad_enabled()):
            return function
        return partial(checkpoint, function, use_reentrant=False)

    def forward(self, batch: Batch, embed: bool = False) -> Output:
        """Give all logits for a batch without labels, otherwise the summed loss of its labels.

        After `pursue` with an objective of the connector's own, labels give the losses of that one
        and the language model is left out; with `embed` they give what its pairs are compared by.
        A batch without a pool (`model.contrast.pooled`) is compared as if it were a whole step.
        Training must go through here: DDP and FSDP hook `forward` alone.
        """
        features = self.features(batch)
        if embed:
            rows = self.connector.embed(self.objective, features, batch)
            return Output(features=features, embedded=rows)
        if self.objective != "language" and batch.labels is not None:
            if batch.pool is None and compares(self):
                batch = alone(self, batch, features)
            return Output(extra=self.connector.objective(self.objective, features, batch))
        visual = self._kept(self.connector)(features)
        hidden = self.hidden(batch, visual)
        if batch.labels is None:
            return Output(logits=self.language.lm_head(hidden))
        loss = self.loss(hidden, batch.labels, batch.supervised)
        extra = self.connector.losses(features, visual, batch)
        return Output(loss_sum=loss, tokens=batch.tokens, extra=extra)

    def prompt(self, messages: list[dict]) -> str:
        """Return the exact text that a conversation in the chat-message format becomes."""
        return self.template.prompt(sample_of(messages).turns)

    def prepare(self, messages: list[dict] | list[list[dict]]) -> Batch:
        """Return the batch of one conversation, or of several, ready for `generate`."""
        lists = isinstance(messages, list) and messages and isinstance(messages[0], list)
        several: Any = messages if lists else [messages]
        return prompt_batch(self, [sample_of(one) for one in several])

    def generate(self, batch: Batch, **options: Any) -> list[list[int]]:
        """Return the new ids of every row; options are those of `model.generate.generate`."""
        return generate(self, batch, **options)

    def chat(
        self,
        messages: list[dict],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stream: Callable[[str], None] | bool = False,
        seed: int = 0,
        past: Past | None = None,
        **other: Any,
    ) -> str:
        """Answer a conversation in the Hugging Face chat-message format.

        At `temperature` 0 the likeliest token is taken, otherwise one is drawn, with `top_p` from
        the likeliest that together have this probability. `stream` is called with each new piece
        of the answer's text; True prints the pieces. `past`, the same at every turn, spares reading
        the conversation again.
        """
        refuse_unknown("chat", other, CHAT)
        show = partial(print, end="", flush=True) if stream is True else stream
        if isinstance(messages, list) and messages and isinstance(messages[0], list):
            raise Mistake(
                f"chat answers one conversation, given are {len(messages)}; "
                "generate(prepare(...)) takes several"
            )
        writer = Stream(self, show or (lambda text: None))
        new = self.generate(
            self.prepare(messages),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=writer if show else None,
            past=past,
        )
        return writer.end(new[0])

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Give the three parts by name."""
        for name in PARTS:
            yield name, getattr(self, name)


def _inject(
    vlm: VLM, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict]:
    """Be the hook before decoder layer `layer`: visual tokens arrive as keyword arguments."""
    hidden = args[0] if args else kwargs["hidden_states"]
    inject = vlm._kept(vlm.connector.inject)
    hidden = inject(layer, hidden, kwargs["visual"], kwargs["sees"])
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def shapes_of(tower: Tower, config: Any) -> Shapes:
    """Return what stands between a tower and a language model of the configuration `config`."""
    rows, columns = tower.grid
    return Shapes(
        patches=rows * columns,
        grid=(rows, columns),
        vision_width=tower.width,
        lm_width=config.hidden_size,
        lm_layers=config.num_hidden_layers,
    )
