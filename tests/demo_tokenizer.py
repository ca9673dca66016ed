"""Trains the embedded tokenizer on the embedded corpus, without the demo's held-out documents.

    python tests/demo_tokenizer.py

Byte-level BPE as in GPT-2 and Qwen2.5 (Sennrich et al. 2016, arXiv 1508.07909), up to 8,192
entries, with the special tokens of Qwen2.5 that continued pretraining meets. The same corpus gives
the same files.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qloop.config.loading import load_config
from qloop.data.corpus import is_held_out
from qloop.data.documents import Document, iterate_documents, list_source_files

VOCABULARY_SIZE = 8192
END = "<|endoftext|>"
_NAMES = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
SPECIAL_TOKENS = [END, *(f"<|{name}|>" for name in _NAMES)]
PIECES = (
    r"""[ ]?[`.]?[A-Za-z][A-Za-z0-9_]*|[0-9]|[ ]?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
"""Words with their leading blank, single digits, runs of operators, line ends.

Backticks and dots stay with the name that they begin, as in `sym and .z.p: in Q they belong to it.
"""
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "qloop/demo"


def build_tokenizer(corpus: Path, held_out_share: float) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on a folder's documents, without the held-out share (in [0, 1))."""
    documents = iterate_documents(list_source_files(corpus), "text")
    texts = [
        document.text
        for document in documents
        if isinstance(document, Document) and not is_held_out(document.content_hash, held_out_share)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


if __name__ == "__main__":
    share = load_config(ROOT / "configs/demo.toml", {}).config.data.held_out_share
    built = build_tokenizer(FOLDER / "corpus", share)
    built.save_pretrained(FOLDER / "tokenizer")
    print(f"{FOLDER / 'tokenizer'}: {len(built)} tokens")
