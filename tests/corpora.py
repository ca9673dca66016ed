"""Corpora for the tests of the data: rows written to files, and read into token stores."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from workspace import load_corpus

from qloop.config.keys import DataConfig, ModelConfig
from qloop.data.corpus import Corpus
from qloop.data.encoder import Encoder
from qloop.data.sources import find_sources
from qloop.data.tokens import TokenStore
from qloop.model.pretrained import load_tokenizer

END = "<|endoftext|>"


class Place:
    """A folder with a corpus and a cache; reads the one into the other."""

    def __init__(self, folder: Path, encoder: Encoder):
        self.folder, self.encoder, self.cache = folder, encoder, folder / "cache"

    def write(self, *rows, held_out: list | None = None) -> None:
        write_jsonl(self.folder / "data" / "filtered_train.jsonl", list(rows))
        if held_out is not None:
            write_jsonl(self.folder / "data" / "filtered_test.jsonl", held_out)

    def read(self, encoder: Encoder | None = None, **keys) -> Corpus:
        data = DataConfig(**{"data_dir": self.folder / "data", "held_out_share": 0.0, **keys})
        return load_corpus(
            *find_sources(data),
            encoder or self.encoder,
            self.cache,
            held_out_share=data.held_out_share,
            train_on_prompt=data.train_on_prompt,
            deduplicate=data.deduplicate,
        )

    def places(self, corpus: Corpus, side: str = "train") -> list[dict[str, str]]:
        file = self.cache / "tokens" / corpus.fingerprint / side / "places.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def files(self) -> list[Path]:
        return sorted(path for path in self.cache.rglob("*") if path.is_file())


def load(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(tokenizer_name=str(folder)))


def save_framing_tokenizer(tokenizer_dir: Path, folder: Path, template: str) -> None:
    """The same tokenizer with a start token, which it puts where the template says."""
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", END)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=END
    ).save_pretrained(folder)


def write_jsonl(file: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def texts(*contents: str) -> list[dict[str, str]]:
    return [{"text": content} for content in contents]


def tokens_of(store: TokenStore, document: int = 0) -> list[int]:
    return store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()
