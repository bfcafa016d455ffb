"""Learn the tokenizer: byte-level BPE over all the domains, in the format transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trained
from transformers import PreTrainedTokenizerFast

from demo.tokenizer import END, PIECES
from demo.train.data import GENERAL, corpus

VOCABULARY = 1024
SAMPLE = 2_000_000  # characters of each domain


def learn(folder: Path) -> None:
    """Write ``tokenizer.json`` and its config into a folder."""
    trained = Trained(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (part for domain in GENERAL for part in corpus(domain)[:SAMPLE].split(END))
    trained.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=trained, bos_token=END, eos_token=END).save_pretrained(folder)
