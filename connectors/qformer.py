"""BLIP-2's Q-Former: learned queries attend to the image and become a few visual tokens.

Li et al. 2023 (arXiv:2301.12597), as in LAVIS: a LayerNorm on the vision encoder's tokens (with
the class token), a BERT whose queries attend to each other and, in every `cross_every`-th layer, to
the image, and a Linear layer to the language model's width. The BERT is transformers' own, which
reproduces LAVIS. Its weights are random unless `init` gives BLIP-2's. Dropout is 0 where LAVIS
trains with 0.1, so that packing and gradient accumulation do not change a step.

A stage with `objective: blip2` is BLIP-2's first: without the language model the queries learn from
captions by image-text contrast (ITC), matching (ITM) and captioning (ITG). It has a text side too.
"""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlbench.compat.transformers_internals import blip2_text_embeddings, set_attention
from vlbench.connector.base import Connector, Shapes, attention_shares, zero_like_loss
from vlbench.data.packing import PackedBatch
from vlbench.errors import UserError
from vlbench.model.blip2_objective import Blip2Objective
from vlbench.model.caption_tokens import EMBEDDED, find_bert_folder, load_caption_tokenizer
from vlbench.model.weights.connector_reference import ReferenceWeights, summarize_loading
from vlbench.model.weights.tensor_files import weight_files
from vlbench.state_dicts import check_names

LAVIS_RENAMES = (
    (r"^(Qformer\.bert|qformer)\.embeddings\.(LayerNorm|layernorm)\.", "qformer.layernorm."),
    (r"^((Qformer\.bert|qformer)\.)?embeddings\.(\w+_embeddings)\.", r"text.embeddings.\3."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "text.dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "text.norm."),
    (r"^Qformer\.cls\.predictions\.bias$", "text.bias"),
    (r"^(opt_proj|llm_proj|t5_proj|language_projection)\.", "projection."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^(vision|text)_proj(ection)?\.", r"text.\1_proj."),
    (r"^(itm_head\.|temp$)", r"text.\1"),
)
"""Patterns from names in LAVIS and in transformers' Blip2 and InstructBlip to those in this
file."""
BERT_INIT_STD, BERT_WIDTH = 0.02, 768
"""Standard deviation of BERT's initial weights, and its width (Devlin et al. 2019,
arXiv:1810.04805). Narrower layers get a larger one, so that their sums are of the same size: with
0.02 at width 128, attention stayed uniform for hundreds of steps, and one seed in three did not
learn where to attend."""
OWN_KEYS = re.compile(r"(query_tokens$|ln_vision\.|qformer\.|projection\.|text\.)")
IGNORED_KEYS = (
    r"(visual_encoder|vision_model|(opt|t5|llm|language)_(model|proj|projection)|Qformer|embeddings"
    r"|(vision|text)_proj(ection)?|itm_head|qformer\.embeddings"
    r"|qformer\.encoder\.layer\.\d+\.(intermediate|output))\..*|temp"
)
"""Names of BLIP-2's other parts, and of the text side, which other stages do not need."""
BERT_KEYS = re.compile(r"text\.embeddings\.|qformer\.(layernorm\.|encoder\.layer\.\d+\.(?!cross))")
TEXT_HEAD_KEYS = re.compile(r"text\.(dense|norm|bias)\b")
IGNORED_BERT_KEYS = r"cls\..*|(bert\.)?(pooler|embeddings|encoder)\..*"
"""Names in this file that BERT's weights fill, those of the head that a bare BERT lacks, and names
in BERT's weights that are skipped."""
TEXT_KEYS = re.compile(r"text\.|.*\.layer\.\d+\.(intermediate|output)\.")
"""Names in this file that are of the text side, not of the queries."""


class QFormer(Connector):
    """`queries` tokens per image, from a BERT of `layers` layers and width `width`."""

    ignored_reference_keys = IGNORED_KEYS
    size_options = {
        "queries": [side**2 for side in range(2, 33)],
        "width": range(96, 1633, 96),
        "layers": (2, 3, 4, 6, 8, 10, 12, 16, 24),
        "ffn_width": (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144),
    }

    def __init__(
        self,
        shapes: Shapes,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn_width: int = 3072,
        text: str = "bert-base-uncased",
        text_length: int = 32,
        itc_width: int = 256,
    ) -> None:
        """Build the BERT.

        Args:
            shapes: Sizes of vision encoder and language model.
            queries: Learned queries, the visual tokens of an image.
            width: Width of the BERT.
            layers: Layers of the BERT.
            heads: Attention heads of a layer.
            cross_every: Every `cross_every`-th layer, from the first, attends to the image.
            ffn_width: Width of the feed-forward layers.
            text: For `objective: blip2`: BERT folder or hub id of tokenizer and initial weights;
                "embedded": the miniatures' tokenizer and random weights.
            text_length: For `objective: blip2`: most tokens of a caption.
            itc_width: For `objective: blip2`: width of the embeddings for ITC.
        """
        super().__init__()
        self.class_token = shapes.has_class_token  # where there is none, the patches are enough
        least = {"queries": 1, "layers": 1, "ffn_width": 1, "text_length": 3, "itc_width": 1}
        for name, low in least.items():
            value = locals()[name]
            if value < low:
                raise ValueError(f"connector qformer: {name} is {value}; it must be at least {low}")
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"connector qformer: heads={heads} must divide width={width}")
        if not 1 <= cross_every <= layers:
            raise ValueError(
                f"connector qformer: cross_every is {cross_every}; allowed are 1 to layers={layers}"
            )
        self.tokens_per_image = queries
        self.text: Blip2Objective | None = None
        self._text_source, self.text_length, self.itc_width = text, text_length, itc_width
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn_width,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=shapes.vision_width,
            max_position_embeddings=text_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-12,
            initializer_range=BERT_INIT_STD * (BERT_WIDTH / width) ** 0.5,
        )
        set_attention(config, "sdpa")
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.ln_vision = nn.LayerNorm(shapes.vision_width)
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(width, shapes.lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, 1 + patches, vision_width]` into `[images, queries, lm_width]`."""
        return self.projection(self.encode_queries(self.ln_vision(features)))

    def encode_queries(self, features: Tensor) -> Tensor:
        """Return the queries `[images, queries, width]` after attending to all `features`."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return the attention weights of the queries, `[images, queries, patches]`.

        Their attention to the class token is left out.
        """
        patches = slice(int(self.class_token), None)
        return query_attention(self.qformer, lambda: self(features), patches)

    def objectives(self) -> tuple[str, ...]:
        """Name the objective of BLIP-2's first stage."""
        return ("blip2",)

    def prepare_objective(self, objective: str, fresh: bool = False) -> None:
        """Add the text side for `blip2`, remove it otherwise; `fresh`: load BERT's weights."""
        wanted = objective == "blip2"
        if wanted == (self.text is not None):
            return
        layers: Any = self.qformer.encoder.layer
        for layer in layers:  # queries and text have feed-forward layers of their own
            if wanted:
                layer.intermediate = copy.deepcopy(layer.intermediate_query)
                layer.output = copy.deepcopy(layer.output_query)
            else:
                del layer.intermediate, layer.output
        if not wanted:
            self.text = None
            return
        tokens = load_caption_tokenizer(self._text_source, "connector.text")
        config = copy.copy(self.qformer.config)
        config.vocab_size, config.pad_token_id = tokens.vocab_size + 1, tokens.pad_token_id
        self.text = Blip2Objective(blip2_text_embeddings(config), self.itc_width, tokens)
        if fresh and self._text_source != EMBEDDED and not self.query_tokens.is_meta:
            self._init_from_bert()

    def loss_counts(self, batch: PackedBatch, objective: str = "language") -> dict[str, int]:
        """Return the numbers of images, image-text pairs and tokens of `blip2`'s three losses."""
        if objective != "blip2" or self.text is None:
            return {}
        pairs = len(batch.pixels)
        _, mask = self.text.caption_tokenizer(batch.captions[:pairs], self.text_length)
        return {"itc": pairs, "itm": 3 * pairs, "itg": int(mask[:, 1:].sum())}

    def contrast_embeddings(
        self, name: str, features: Tensor, batch: PackedBatch
    ) -> dict[str, Tensor]:
        """Return the embeddings of images and captions of `batch` for ITC."""
        assert self.text is not None
        captions, normed = self._tokenize_captions(batch, features), self.ln_vision(features)
        rows = self.text.contrast_embeddings(self.qformer, self.query_tokens, normed, captions)
        return {key: row[: len(batch.pixels)] for key, row in rows.items()}

    def objective(
        self, name: str, features: Tensor, batch: PackedBatch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sums and counts of ITC, ITM and ITG over the images and captions of `batch`.

        Negatives are from the global batch. Those of ITC carry no gradient, as in the reference;
        the negative images of ITM do where the vision encoder is trained.
        """
        assert self.text is not None
        pairs = len(batch.pixels)
        keys = batch.contrast_pool.pair_keys if batch.contrast_pool else batch.sample_keys()[:pairs]
        losses = self.text(
            self.qformer,
            self.query_tokens,
            self.ln_vision,
            features,
            self._tokenize_captions(batch, features),
            [f"{torch.initial_seed()} {key}" for key in keys],
            batch.contrast_pool,
        )
        unused = zero_like_loss(self.projection(self.query_tokens))  # not part of this objective
        real = float(pairs > 0)  # a micro-batch without images runs on a blank one, at weight 0
        counts = self.loss_counts(batch, "blip2")
        return {
            name: (losses[name] * real + unused, torch.tensor(count))
            for name, count in counts.items()
        }

    def _tokenize_captions(self, batch: PackedBatch, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the captions, at least one, on the device of `features`."""
        assert self.text is not None
        written = batch.captions[: len(batch.pixels)] or [""]
        ids, mask = self.text.caption_tokenizer(written, self.text_length)
        device = features.device
        return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load BLIP-2's weights, in the layout of LAVIS or of transformers.

        Vision encoder and language model are skipped, and the text side outside of `blip2` stages.
        These keep their values: a projection to a language model of another width, and what the
        weights lack of the text side (transformers' have no captioning head).
        """
        return load_blip2_weights(self, weights, rename_reference_key, self._fit_tensor)

    def _fit_tensor(self, name: str, tensor: Tensor, own_state: Mapping[str, Tensor]) -> Tensor:
        """Cut position embeddings to `text_length`; add the token id that BERT itself lacks."""
        if name == "text.embeddings.position_embeddings.weight":
            return tensor[: self.text_length]
        has_vocabulary = name in ("text.embeddings.word_embeddings.weight", "text.bias")
        if has_vocabulary and (len(tensor) + 1, *tensor.shape[1:]) == own_state[name].shape:
            return torch.cat([tensor, own_state[name][-1:].to(tensor)])
        return tensor

    def _init_from_bert(self) -> None:
        """Load BERT's weights; the queries' feed-forward layers start as copies of the text's."""
        source = f"connector.text={self._text_source}"
        bert_weights = ReferenceWeights(
            weight_files(find_bert_folder(self._text_source, "connector.text"))
        )
        state, loaded = self.state_dict(), set[str]()
        for given in bert_weights:
            name = re.sub(r"^(bert\.|)(?=embeddings|encoder)", "bert.", given)
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
            name = rename_reference_key(f"Qformer.{name}")
            query = re.sub(r"(layer\.\d+\.(intermediate|output))\.", r"\1_query.", name)
            for own_name in {name, query} & state.keys():
                state[own_name] = self._fit_tensor(own_name, bert_weights[given], state)
                loaded.add(own_name)
            if given not in bert_weights.used_names and not re.fullmatch(IGNORED_BERT_KEYS, given):
                raise UserError(f"{source}: tensor {given} is none of BERT's")
        expected = {name for name in state if BERT_KEYS.match(name)}
        head = {name for name in state if TEXT_HEAD_KEYS.match(name)}
        check_names(expected | (head if head & loaded else set()), loaded, source)
        try:
            self.load_strict(state)
        except ValueError as error:
            raise UserError(f"{source} does not fit: {error}") from error
        self.weights_source = f"random, its BERT {self._text_source}"
        print(f"{source}: {summarize_loading(loaded, expected | head, bert_weights)}")


def query_attention(
    bert: Blip2QFormerModel, run_forward: Callable[[], object], patch_slice: slice
) -> Tensor:
    """Return the attention weights of the queries of `bert`, as `attention_shares` does."""
    blocks: Any = bert.encoder.layer
    attentions = [one.crossattention.attention for one in blocks if one.has_cross_attention]
    layers = [(attention.query, attention.key) for attention in attentions]
    return attention_shares(layers, bert.config.num_attention_heads, run_forward, patch_slice)


def load_blip2_weights(
    connector: Connector,
    weights: Mapping[str, Tensor],
    rename_key: Callable[[str], str],
    fit_tensor: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor],
) -> set[str]:
    """Load weights of a Q-Former into a connector of the names of this file; return what fits.

    Args:
        connector: Has the names of `OWN_KEYS`; those of `TEXT_KEYS` may be missing.
        weights: In the layout of LAVIS or of transformers.
        rename_key: Returns the name in `connector` of one in `weights`.
        fit_tensor: Takes a name, its tensor and the connector's own state; returns the tensor that
            is loaded.
    """
    own = connector.state_dict()
    state = {}
    for given in weights:
        name = rename_key(given)
        if OWN_KEYS.match(name) and (name in own or not TEXT_KEYS.match(name)):
            state[name] = fit_tensor(name, weights[given], own)
    kept = {name: own[name] for name in own if TEXT_KEYS.match(name) and name not in state}
    ends = {name for name in own if name.startswith("projection.")}
    if not ends & set(state) or (
        ends <= set(state) and len(state["projection.bias"]) != len(own["projection.bias"])
    ):
        kept |= {name: own[name] for name in ends}
        state = {name: tensor for name, tensor in state.items() if name not in ends}
    connector.load_strict(kept | state)
    return set(state)


def rename_reference_key(name: str) -> str:
    """Return the name in this file of a tensor of LAVIS or transformers."""
    for pattern, replacement in LAVIS_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
