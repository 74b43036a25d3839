"""The zoo: tiny random fp32 models of many families, built offline from configs, for the tests of every stage.

Sizes are odd and distinct (hidden 48, inner 80, 4 heads of 16 over 2 key-value heads, vocabulary 131), so that no two
dims agree by luck and no linear is square where the family allows it. All inputs carry the request on dim 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.torch_version import TorchVersion

BATCH, LENGTH, VOCAB, HIDDEN, INNER = 3, 7, 131, 48, 80
IMAGE, PATCH, MEL, FRAMES = 12, 4, 10, 14

Inputs = dict[str, torch.Tensor]


def ids_inputs(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Token ids and a right-padded mask, both int64 [batch, length]; the last request is the shortest."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    lengths = length - torch.arange(batch) % 3
    return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long()}


def bare_ids_inputs(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Token ids alone, int64 [batch, length]."""
    return {"input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)}


def encoder_decoder_inputs(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Encoder ids and mask [batch, length] beside decoder ids [batch, length - 2]."""
    inputs = ids_inputs(batch, length, generator)
    inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 2), generator=generator)
    return inputs


def image_inputs(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Pixels fp32 [batch, 3, 12, 12]; length plays no part."""
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}


def audio_inputs(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Mel features fp32 [batch, 10, 28] beside decoder ids [batch, length]."""
    features = torch.randn(batch, MEL, 2 * FRAMES, generator=generator)
    return {
        "input_features": features,
        "decoder_input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator),
    }


@dataclass(frozen=True)
class Entry:
    """One family: how to build it, what to feed it, and what PEFT can target in it.

    attention, mlp, head and embedding are PEFT `target_modules` (suffixes); gate holds `target_parameters`: a router,
    and linears that PEFT would turn into expert targets if they were named as modules. experts holds those of the
    routed experts' weights. embedding is empty where several modules share the table (T5, BART): PEFT adapts the module
    it names, fxlora the table.
    routed is True where expert GEMMs make a row's last bits depend on how its neighbours route. gain scales every
    matrix and every adapter: below 1 where order-one weights make the family ill-conditioned (T5 attends unscaled).
    """

    name: str
    model: str
    config: str
    sizes: Mapping[str, Any]
    inputs_of: Callable[[int, int, torch.Generator], Inputs]
    attention: Sequence[str]
    mlp: Sequence[str] = ()
    gate: Sequence[str] = ()
    head: Sequence[str] = ()
    embedding: Sequence[str] = ()
    routed: bool = False
    gain: float = 1.0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    experts: Sequence[str] = ()

    def with_experts(self, implementation: str) -> Callable[[], nn.Module]:
        """`build`, with experts computed as one of transformers' implementations does."""

        def build() -> nn.Module:
            model = self.build()
            model.config._experts_implementation = implementation
            return model

        return build

    def build(self) -> nn.Module:
        """A fresh model with the same weights at every call: eval mode, fp32, CPU, outputs of order one."""
        config = getattr(transformers, self.config)(**{**self.sizes, **self.overrides})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config)
        model.config.use_cache = False
        scale_weights(model, torch.Generator().manual_seed(1), self.gain)
        return model.eval().requires_grad_(False)

    def inputs(self, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Inputs:
        """Seeded example inputs; dim 0 of every tensor is the request."""
        return self.inputs_of(batch, length, torch.Generator().manual_seed(seed))


def request(inputs: Inputs, index: int) -> Inputs:
    """The inputs of one request alone: a batch of one."""
    return {name: value[index : index + 1] for name, value in inputs.items()}


@torch.no_grad()
def scale_weights(model: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Redraw every parameter in place so that activations stay of order one and no bias or norm is trivial.

    Matrices get std gain / sqrt(last dim) (embedding tables 0.5); vectors keep their level (0 or 1) plus some noise.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.copy_(parameter.mean().round() + 0.1 * noise)
        elif id(parameter) in tables:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(gain * noise * parameter[0].numel() ** -0.5)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
QKV_OUT, FC = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")
BERT_ATTENTION = ("query", "key", "value", "attention.output.dense")
BERT_MLP = ("intermediate.dense",)
WORDS = ("word_embeddings",)


def causal(name: str, family: str, sizes: Mapping[str, Any], **facts: Any) -> Entry:
    """An entry of the usual decoder layout: `<family>ForCausalLM` over ids and a mask, with its usual names."""
    usual: dict[str, Any] = {"attention": QKVO, "mlp": GATED, "head": ("lm_head",), "embedding": ("embed_tokens",)}
    return Entry(name, f"{family}ForCausalLM", f"{family}Config", sizes, ids_inputs, **{**usual, **facts})


DEEPSEEK = {
    **TEXT,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_labels": 11,
}
WHISPER = {
    "vocab_size": VOCAB,
    "num_mel_bins": MEL,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 72,
    "max_source_positions": FRAMES,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
GATE = ("mlp.gate.weight",)
ROUTED: Mapping[str, Any] = {
    "mlp": (),
    "gate": GATE,
    "routed": True,
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
}

DOCUMENTED: tuple[Entry, ...] = (
    causal("llama", "Llama", GROUPED),
    causal("qwen3", "Qwen3", GROUPED, overrides={"tie_word_embeddings": True}),
    causal("qwen3moe", "Qwen3Moe", {**GROUPED, **EXPERTS}, **ROUTED),
    causal("mixtral", "Mixtral", {**GROUPED, "num_local_experts": 5}, **ROUTED),
    causal(
        "deepseekv3",
        "DeepseekV3",
        DEEPSEEK,
        attention=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        **{
            **ROUTED,
            "gate": ("mlp.gate.weight", "shared_experts.gate_proj.weight", "layers.0.mlp.down_proj.weight"),
        },
    ),
    causal("gemma", "Gemma", GROUPED),
    causal("gemma2", "Gemma2", {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 4}),
    causal("olmoe", "Olmoe", {**TEXT, "num_key_value_heads": 2, **EXPERTS}, **ROUTED),
    Entry(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        ids_inputs,
        ("c_attn", "attn.c_proj"),
        ("c_fc", "mlp.c_proj"),
        (),
        ("lm_head",),
        ("wte",),
    ),
    Entry(
        "bert",
        "BertForMaskedLM",
        "BertConfig",
        TEXT,
        ids_inputs,
        BERT_ATTENTION,
        BERT_MLP,
        head=("decoder",),
        embedding=WORDS,
    ),
    Entry(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        VIT,
        image_inputs,
        ("q_proj", "v_proj", "o_proj"),
        FC,
        head=("classifier",),
    ),
    Entry(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        audio_inputs,
        QKV_OUT,
        FC,
        head=("proj_out",),
        embedding=("decoder.embed_tokens",),
    ),
)

OPT = {**TEXT, "ffn_dim": INNER, "word_embed_proj_dim": 40}
FALCON = {**TEXT, "ffn_hidden_size": INNER, "num_kv_heads": 2, "new_decoder_architecture": True}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 10,
    "d_ff": INNER,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "use_cache": TorchVersion(torch.__version__)
    >= "2.12",  # dynamo of 2.11 cannot follow how its cache copies a config
}
BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "hidden_dim": INNER,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
CLIP_VISION = {key: size for key, size in VIT.items() if key != "num_labels"}
FUSED, NEOX_MLP = ("query_key_value",), ("dense_h_to_4h", "dense_4h_to_h")
MASKED: Mapping[str, Any] = {"head": ("decoder",), "embedding": WORDS}
SLIDING = {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

UNNAMED: tuple[Entry, ...] = (
    causal("opt", "OPT", OPT, attention=QKV_OUT, mlp=("fc1", "fc2", "project_in", "project_out")),
    causal("gptneox", "GPTNeoX", TEXT, attention=FUSED, mlp=NEOX_MLP, head=("embed_out",), embedding=("embed_in",)),
    causal("falcon", "Falcon", FALCON, attention=FUSED, mlp=NEOX_MLP, embedding=WORDS),
    causal("phi", "Phi", {**TEXT, "num_key_value_heads": 2}, attention=("q_proj", "k_proj", "v_proj", "dense"), mlp=FC),
    causal(
        "phi3",
        "Phi3",
        {**TEXT, "num_key_value_heads": 2},
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
    ),
    causal("bloom", "Bloom", {**TEXT, "n_layer": 2, "n_head": 4}, attention=FUSED, mlp=NEOX_MLP, embedding=WORDS),
    causal(
        "gptj",
        "GPTJ",
        {**GPT2, "rotary_dim": 8},
        attention=("q_proj", "v_proj"),
        mlp=("fc_in", "fc_out"),
        embedding=("wte",),
    ),
    causal("cohere", "Cohere", GROUPED),
    causal("mistral", "Mistral", {**GROUPED, "sliding_window": 4}),
    causal("olmo2", "Olmo2", {**TEXT, "num_key_value_heads": 2}),
    causal(
        "granitemoe",
        "GraniteMoe",
        {**TEXT, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
        **{**ROUTED, "gate": ("router.weight",)},
    ),
    causal(
        "gptoss",
        "GptOss",
        {**GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
        **{**ROUTED, "gate": ("router.weight",)},
    ),
    causal(
        "qwen2moe",
        "Qwen2Moe",
        {**TEXT, "num_key_value_heads": 2, **EXPERTS, "shared_expert_intermediate_size": 20},
        **{**ROUTED, "gate": ("mlp.gate.weight", "shared_expert_gate.weight", "shared_expert.up_proj.weight")},
    ),
    Entry(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **GROUPED,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 56,
            "interleave_moe_layer_step": 1,
        },
        ids_inputs,
        QKVO,
        head=("lm_head",),
        embedding=("embed_tokens",),
        gate=("router.weight",),
        routed=True,
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
    Entry(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        encoder_decoder_inputs,
        ("q", "k", "v", "o"),
        ("wi_0", "wi_1", "wo"),
        (),
        ("lm_head",),
        gain=0.4,
    ),
    Entry(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        encoder_decoder_inputs,
        QKV_OUT,
        FC,
        (),
        ("lm_head",),
    ),
    Entry(
        "t5gemma2",  # asks for each place of its encoder's masks by its indices
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        {"encoder": {"text_config": SLIDING, "vision_config": CLIP_VISION}, "decoder": SLIDING},
        encoder_decoder_inputs,
        ("o_proj",),  # the tower, which no image enters here, has the other names too
        GATED,
        (),
        ("lm_head.out_proj",),
    ),
    Entry("roberta", "RobertaForMaskedLM", "RobertaConfig", TEXT, ids_inputs, BERT_ATTENTION, BERT_MLP, **MASKED),
    Entry(
        "albert",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**TEXT, "embedding_size": 20},
        ids_inputs,
        ("query", "key", "value", "attention.dense"),
        ("ffn", "ffn_output"),
        **MASKED,
    ),
    Entry(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        DISTIL,
        ids_inputs,
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("lin1", "lin2"),
        (),
        ("vocab_projector",),
        WORDS,
    ),
    Entry(
        "electra",
        "ElectraForTokenClassification",
        "ElectraConfig",
        {**TEXT, "embedding_size": 20, "num_labels": 5},
        ids_inputs,
        BERT_ATTENTION,
        BERT_MLP,
        (),
        ("classifier",),
        WORDS,
    ),
    Entry(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**TEXT, "attn_implementation": "sdpa"},
        ids_inputs,
        ("Wqkv", "attn.Wo"),
        ("mlp.Wi", "mlp.Wo"),
        (),
        ("decoder",),
        ("tok_embeddings",),
    ),
    Entry(
        "cliptext",
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {**TEXT, "projection_dim": 20},
        ids_inputs,
        QKV_OUT,
        FC,
        (),
        ("text_projection",),
        ("token_embedding",),
    ),
    Entry(
        "clipvision",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**CLIP_VISION, "projection_dim": 20},
        image_inputs,
        QKV_OUT,
        FC,
        (),
        ("visual_projection",),
    ),
    Entry(
        "dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**VIT, "mlp_ratio": 2},
        image_inputs,
        ("q_proj", "v_proj", "o_proj", "query", "value"),  # transformers renamed them
        FC,
        (),
        ("classifier",),
    ),
)
ZOO: Mapping[str, Entry] = {entry.name: entry for entry in DOCUMENTED + UNNAMED}
