"""Tiny models of random weights, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 101
# The whole parity matrix runs on these families ...
FAMILIES = ("llama", "mistral", "qwen2")
# ... and a part of it on these, which can be converted and trained as well.
VARIANTS = ("llama3", "mistral-window", "yarn-mistral", "qwen2-yarn", "qwen3", "glm")


def make_model(family: str, folder: Path, *, vocab_size: int = VOCABULARY, seed: int = 0, **extra: Any) -> Path:
    """A tiny random model of a family, saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    # Scaled RoPE, as if the model had been trained on 64 tokens: rows are longer than that, so the scaling shows.
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {**yarn, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    special: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {"tie_word_embeddings": True}),
        "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": llama3}),
        # As many key-value heads as query heads, so that a context-parallel rank has several.
        "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16, "num_key_value_heads": 4}),
        "mistral-window": ("Mistral", {"sliding_window": 24}),
        "yarn-mistral": ("Mistral", {"sliding_window": 4096, "rope_parameters": {**yarn, "attention_factor": 1.2}}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
        "qwen2-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": yarn}),
        "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
        "glm": ("Glm", {"head_dim": 16, "pad_token_id": 0}),
    }
    name, own = special[family]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **own, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def make_chat_model(folder: Path, std: float = 0.15) -> Path:
    """A tiny Llama of random weights for ``make_fast_tokenizer``'s tokenizer: its answers are nonsense, but repeatable."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=402,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    model.save_pretrained(folder)
    return folder
