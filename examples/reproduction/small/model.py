"""The small model before it has learnt anything: its tokenizer, and a Llama of random weights as a Hugging Face folder."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import world

# A turn is <|user|>text<|end|> or <|assistant|>text<|end|>.
_ROLES = ("<|user|>", "<|assistant|>")
_PAD, _END = "<|pad|>", "<|end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Texts of facts that the tokenizer is made from, besides the essays: enough that every word of words.yaml becomes a token.
_FACT_TEXTS = 6000


@dataclass(frozen=True)
class Size:
    """Shape of the model.

    Attributes:
        hidden_size, layers, heads, vocab_size: as in a Llama's configuration.
        positions: longest context that it is made for, in tokens.
    """

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int = 2048
    positions: int = 512


def make_model(target: Path, size: Size, seed: int) -> None:
    """Write tokenizer and random weights.

    Args:
        target: new folder.
        size: shape of the model.
        seed: seed of the weights.
    """
    import megatron_longpo.runtime  # noqa: F401  silences the bars of the libraries below
    import torch  # isort: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = make_tokenizer(size.vocab_size)
    tokenizer.save_pretrained(partial)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        # As Llama has it, a multiple of 64.
        intermediate_size=-(-size.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        # 1 / sqrt(256), larger than Llama's 0.02: a model this narrow begins to copy sooner.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(_PAD),
    )
    LlamaForCausalLM(config).save_pretrained(partial)
    os.replace(partial, target)


def make_tokenizer(vocab_size: int):  # type: ignore[no-untyped-def]  # transformers is imported inside
    """A byte-level BPE of the essays and of facts, with digits in pairs and a chat template.

    Ten digits stand everywhere, and so does a space before them: to find the next of such tokens again takes more context than a
    model this small has. The space belongs to the first pair.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [_PAD, *_ROLES, _END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_PAD,
        eos_token=_END,
        extra_special_tokens=list(_ROLES),
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    """What the tokenizer is made from."""
    for essay in world.essays_of(held_out=False):
        yield " ".join(essay)
    rng = random.Random(0)
    for _ in range(_FACT_TEXTS):
        facts = world.draw_facts(rng, 12, list(world.KINDS))
        yield " ".join(f"{fact.sentence} {fact.question}" for fact in facts)
