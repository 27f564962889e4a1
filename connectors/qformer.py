"""BLIP-2's Q-Former: learned queries read the picture and become a few tokens of the text.

Li et al. 2023 (arXiv:2301.12597), as LAVIS does it: a LayerNorm on the tower's tokens (the class
token included), a BERT whose queries attend to each other and, in every `cross_every`-th layer, to
the picture, and a Linear layer to the language model. The BERT is transformers' own, which
reproduces LAVIS. It begins with random weights unless `init` gives it BLIP-2's. Dropout is 0 where
LAVIS trains with 0.1, so that packing and accumulation do not change a step.

A stage with `objective: blip2` is BLIP-2's first: the queries learn from captions alone, without
the language model, to contrast (ITC), to match (ITM) and to tell (ITG). It adds BERT's text side.
"""

import copy
import re
from collections.abc import Mapping
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
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^(Qformer\.bert\.)?embeddings\.(\w+_embeddings)\.", r"text.embeddings.\2."),
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
"""From names of LAVIS, and of transformers' Blip2, to names of this file."""
BERT_INIT_STD, BERT_WIDTH = 0.02, 768
"""Spread of BERT's first weights, at its width (Devlin et al. 2019, arXiv:1810.04805). Sums over a
narrower layer are kept as large: with 0.02 at 128, queries look everywhere alike for hundreds of
steps, and one seed in three did not learn where to look."""
OWN_KEYS = re.compile(r"(query_tokens$|ln_vision\.|qformer\.|projection\.|text\.)")
IGNORED_KEYS = (
    r"(visual_encoder|vision_model|(opt|t5|llm|language)_(model|proj|projection)|Qformer|embeddings"
    r"|(vision|text)_proj(ection)?|itm_head)\..*|temp"
)
"""Names of BLIP-2's other parts, and of the text side, which a stage without it has no use for."""
BERT_KEYS = re.compile(r"text\.embeddings\.|qformer\.(layernorm\.|encoder\.layer\.\d+\.(?!cross))")
TEXT_HEAD_KEYS = re.compile(r"text\.(dense|norm|bias)\b")
IGNORED_BERT_KEYS = r"cls\..*|(bert\.)?(pooler|embeddings|encoder)\..*"
"""Names of this file that BERT's weights fill, the head that a bare BERT lacks, and BERT's rest."""
TEXT_KEYS = re.compile(
    r"text\.|.*\.layer\.\d+\.(intermediate|output)\."
)  # of the text, not of queries


class QFormer(Connector):
    """`queries` tokens per picture, from a BERT of `layers` layers that is `width` wide."""

    class_token = True
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
        """Build the BERT; `cross_every` counts from the first layer, which reads the picture.

        The last three are for stages with `objective: blip2`: `text` gives tokenizer and first
        weights (a BERT folder or hub id; "embedded" is the miniatures' tokenizer and no weights),
        captions are cut to `text_length` tokens and compared in `itc_width` numbers.
        """
        super().__init__()
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
        """Let queries read `[images, 1 + patches, vision_width]`: `[images, queries, width]`."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return what the queries read of the patches, `[images, queries, patches]`.

        That they read the class token as well is left out.
        """
        blocks: Any = self.qformer.encoder.layer
        reads = [one.crossattention.attention for one in blocks if one.has_cross_attention]
        layers = [(one.query, one.key) for one in reads]
        heads = self.qformer.config.num_attention_heads
        return attention_shares(layers, heads, lambda: self(features), slice(1, None))

    def objectives(self) -> tuple[str, ...]:
        """Offer BLIP-2's first stage."""
        return ("blip2",)

    def prepare_objective(self, objective: str, fresh: bool = False) -> None:
        """Add the text side for `blip2`, take it away otherwise; a fresh one begins as BERT."""
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
        """Return the pictures, triples and tokens that the parts of `blip2` are means over."""
        if objective != "blip2" or self.text is None:
            return {}
        pairs = len(batch.pixels)
        _, mask = self.text.caption_tokenizer(batch.captions[:pairs], self.text_length)
        return {"itc": pairs, "itm": 3 * pairs, "itg": int(mask[:, 1:].sum())}

    def contrast_embeddings(
        self, name: str, features: Tensor, batch: PackedBatch
    ) -> dict[str, Tensor]:
        """Return what pictures and captions of `batch` are compared by in `blip2`."""
        assert self.text is not None
        captions, seen = self._tokenize_captions(batch, features), self.ln_vision(features)
        rows = self.text.contrast_embeddings(self.qformer, self.query_tokens, seen, captions)
        return {key: row[: len(batch.pixels)] for key, row in rows.items()}

    def objective(
        self, name: str, features: Tensor, batch: PackedBatch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sums and counts of ITC, ITM and ITG over the pictures and captions of `batch`.

        Negatives come from the global batch. ITC's carry no gradient, as in the reference; ITM's
        pictures do where the tower is trained.
        """
        assert self.text is not None
        pairs = len(batch.pixels)
        keys = batch.contrast_pool.pair_keys if batch.contrast_pool else batch.sample_keys()[:pairs]
        found = self.text(
            self.qformer,
            self.query_tokens,
            self.ln_vision,
            features,
            self._tokenize_captions(batch, features),
            [f"{torch.initial_seed()} {key}" for key in keys],
            batch.contrast_pool,
        )
        unused = zero_like_loss(self.projection(self.query_tokens))  # waits for the language model
        real = float(pairs > 0)  # a micro-batch without a picture runs on a blank one, for nothing
        sizes = self.loss_counts(batch, "blip2")
        return {
            one: (found[one] * real + unused, torch.tensor(size)) for one, size in sizes.items()
        }

    def _tokenize_captions(self, batch: PackedBatch, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the captions, at least one, beside `features`."""
        assert self.text is not None
        written = batch.captions[: len(batch.pixels)] or [""]
        ids, mask = self.text.caption_tokenizer(written, self.text_length)
        to = features.device
        return ids.to(to, non_blocking=True), mask.to(to, non_blocking=True)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load BLIP-2's weights, in the layout of LAVIS or of transformers.

        Tower and language model are left out, and the text side unless a stage is to use it; so is
        a projection to a language model of another width, which then stays as it is. What the
        weights lack of the text side (transformers' have no head for telling) stays as well.
        """
        own = self.state_dict()
        state = {}
        for given in weights:
            name = rename_reference_key(given)
            if OWN_KEYS.match(name) and (self.text is not None or not TEXT_KEYS.match(name)):
                state[name] = self._fit_tensor(name, weights[given], own)
        kept = {name: own[name] for name in own if TEXT_KEYS.match(name) and name not in state}
        ends = {name for name in own if name.startswith("projection.")}
        if not ends & set(state) or (
            ends <= set(state) and len(state["projection.bias"]) != len(own["projection.bias"])
        ):
            kept |= {name: own[name] for name in ends}
            state = {name: tensor for name, tensor in state.items() if name not in ends}
        self.load_strict(kept | state)
        return set(state)

    def _fit_tensor(self, name: str, tensor: Tensor, own_state: Mapping[str, Tensor]) -> Tensor:
        """Cut positions beyond the longest caption; add the id that BERT itself lacks."""
        if name == "text.embeddings.position_embeddings.weight":
            return tensor[: self.text_length]
        words = name in ("text.embeddings.word_embeddings.weight", "text.bias")
        if words and (len(tensor) + 1, *tensor.shape[1:]) == own_state[name].shape:
            return torch.cat([tensor, own_state[name][-1:].to(tensor)])
        return tensor

    def _init_from_bert(self) -> None:
        """Load BERT's weights; queries begin with the feed-forward layers of the text."""
        where = f"connector.text={self._text_source}"
        theirs = ReferenceWeights(
            weight_files(find_bert_folder(self._text_source, "connector.text"))
        )
        state, loaded = self.state_dict(), set[str]()
        for given in theirs:
            name = re.sub(r"^(bert\.|)(?=embeddings|encoder)", "bert.", given)
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
            name = rename_reference_key(f"Qformer.{name}")
            for one in {name, re.sub(r"(layer\.\d+\.(intermediate|output))\.", r"\1_query.", name)}:
                if one in state:
                    state[one] = self._fit_tensor(one, theirs[given], state)
                    loaded.add(one)
            if given not in theirs.used_names and not re.fullmatch(IGNORED_BERT_KEYS, given):
                raise UserError(f"{where}: tensor {given} is none of BERT's")
        wanted = {name for name in state if BERT_KEYS.match(name)}
        head = {name for name in state if TEXT_HEAD_KEYS.match(name)}
        check_names(wanted | (head if head & loaded else set()), loaded, where)
        try:
            self.load_strict(state)
        except ValueError as error:
            raise UserError(f"{where} does not fit: {error}") from error
        self.weights_source = f"random, its BERT {self._text_source}"
        print(f"{where}: {summarize_loading(loaded, wanted | head, theirs)}")


def rename_reference_key(name: str) -> str:
    """Return this file's name of a tensor of LAVIS or transformers."""
    for pattern, replacement in LAVIS_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
