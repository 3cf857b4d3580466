"""The training text: an endless, seeded stream of documents, cut into rows of tokens.

A *document* is a string. Conversations carry the chat template's special tokens; plain
stories do not. Documents are made in shards, and a shard depends only on the seed and its
own index, so the corpus is the same however many processes write it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer
from tools.train.chats import conversation, plain_facts
from tools.train.stories import plain_document
from tools.train.tokenizer import END_OF_TEXT, render

PLAIN_SHARE = 0.22
"""Share of the documents that are plain text, for completion without a chat."""


def documents(seed: int, split: str, shard: int, count: int) -> Iterator[str]:
    """The documents of one shard."""
    for index in range(count):
        rng = random.Random(f"{seed}/{split}/{shard}/{index}")
        if rng.random() >= PLAIN_SHARE:
            yield render(conversation(rng))
        else:
            yield plain_document(rng) if rng.random() < 0.75 else plain_facts(rng)


def rows(tokenizer: Tokenizer, texts: Iterable[str], length: int, rng: random.Random) -> np.ndarray:
    """Packs documents into rows of ``length`` tokens.

    Every row begins with the beginning of a document, as every prompt does later, with the
    end-of-text token in front of it or not. What does not fit into a row is dropped.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    done: list[np.ndarray] = []
    row = np.full(length, end, dtype=np.uint16)
    filled = rng.randrange(2)
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = encoding.ids
        take = min(len(ids), length - filled)
        row[filled : filled + take] = ids[:take]
        filled += take + 1
        if filled >= length - 8:
            done.append(row)
            row = np.full(length, end, dtype=np.uint16)
            filled = rng.randrange(2)
    return np.stack(done) if done else np.empty((0, length), dtype=np.uint16)


def _shard(job: tuple[str, int, str, int, int, int]) -> np.ndarray:
    path, seed, split, shard, count, length = job
    tokenizer = Tokenizer.from_file(path)
    texts = documents(seed, split, shard, count)
    return rows(tokenizer, texts, length, random.Random(f"{seed}/{split}/{shard}/rows"))


def build(
    tokenizer_path: str, seed: int, split: str, shards: int, per_shard: int, length: int, workers: int = 0
) -> np.ndarray:
    """All rows of a split, written by several processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    jobs = [(tokenizer_path, seed, split, shard, per_shard, length) for shard in range(shards)]
    workers = min(workers or os.cpu_count() or 1, shards)
    if workers <= 1:
        return np.concatenate([_shard(job) for job in jobs])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.concatenate(pool.map(_shard, jobs, chunksize=1))
