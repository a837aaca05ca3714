"""A CLIP tokenizer (byte-level BPE, lower case, ``</w>`` at word ends, 77 tokens) learnt from captions."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from examples.shapes.data import caption, draw_spec

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SETTINGS = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": EOS,
    "pad_token": EOS,
}


def learn_merges(captions: list[str], vocab_size: int = 900) -> list[tuple[str, str]]:
    """The byte-pair merges of `captions`, most useful first; fewer when every word is one piece."""
    bpe = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    return [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Pieces in CLIP's order: bytes, bytes that end a word, merges, BOS, EOS (CLIP pools there)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), BOS, EOS]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def build(directories: list[Path], *, seed: int = 7, captions: int = 20_000) -> CLIPTokenizer:
    """Writes the tokenizer to each of `directories` in CLIP's file format and loads it from the first."""
    rng = random.Random(seed)
    merges = learn_merges([caption(draw_spec(rng), rng) for _ in range(captions)])
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), "utf-8")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")
    return CLIPTokenizer.from_pretrained(directories[0])
