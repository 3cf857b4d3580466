"""Samples from a trained model and the checks it has to pass."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from tools.train.lexicon import article
from tools.train.model import Llama, generate, load
from tools.train.tokenizer import END, END_OF_TEXT, PAD, render

MAX_TOKENS = 400

STORY_TOPICS = [
    "fox",
    "lantern",
    "dragon",
    "baker",
    "clock",
    "submarine",
    "violin",
    "gondola",
    "accountant",
    "platypus",
    "walrus",
    "spaceship",
    "cactus",
    "librarian",
    "teapot",
    "zeppelin",
    "mailbox",
    "ferret",
    "candle",
    "kangaroo",
    "plumber",
    "trombone",
    "sandwich",
    "hedgehog",
    "database",
    "volcano",
    "ninja",
    "pharaoh",
    "sushi",
    "burrito",
]
"""Asked for as "a ...", several of them in no word list."""

QUESTIONS = [
    "hi",
    "Hello!",
    "how are you?",
    "who are you",
    "What can you do?",
    "tell me a story",
    "Write a poem on rain.",
    "write a haiku about autumn leaves",
    "What is a rainbow?",
    "what is a queue?",
    "Explain continuous batching.",
    "What is the capital of France?",
    "what's 2+2",
    "What is 7 times 8?",
    "opposite of hot",
    "What sound does a cow make?",
    "Where do penguins live?",
    "How do I make tea?",
    "Name three animals.",
    "List five colours",
    "count to ten",
    "count from 1 to 20",
    "Tell me a joke.",
    "My name is Alex.",
    "I am sad",
    "I like trains",
    "Thanks!",
    "bye",
    "Translate 'house' to French",
    "Write a Python function that reverses a string",
    "What is the airspeed velocity of an unladen swallow?",
    "Who won the 1998 World Cup?",
    "asdfghjkl",
    "¿Dónde está la biblioteca?",
    "😀",
    "Why is the sky blue?",
    "what day comes after monday",
    "Use the word lighthouse in a sentence.",
    "say hello",
    "Repeat after me: the quick brown fox",
    "Describe a castle",
    "Write a letter to my landlord about the broken heating",
    "Give me a JSON object with name and age",
    "What is Redis?",
    "What should I cook tonight?",
    "is a whale a fish?",
    "Which is bigger, a mouse or an elephant?",
    "Summarize the plot of Hamlet",
    "What is your favourite colour?",
    "Tell me about Kubernetes",
    "please write a long story about two brothers and a broken bicycle",
    "Tell me a bedtime story about a sleepy bear who can't find his pillow",
    "Write a short story about a programmer who debugs a haunted server at midnight",
    "continue: Once upon a time",
    "What is the meaning of life?",
    "I have a dog called Rex",
    "How tall is Mount Everest?",
    "What's the weather like today?",
    "Are you human?",
    "ok",
]
FRESH_TOPICS = [
    "walnut",
    "astronaut",
    "toaster",
    "hamster",
    "ladder",
    "sheriff",
    "panther",
    "umbrella",
    "wizard",
    "ukulele",
    "tractor",
    "midwife",
    "parrot",
    "compass",
    "gargoyle",
    "pretzel",
    "typewriter",
    "iguana",
    "glacier",
    "surgeon",
    "bagel",
    "skeleton",
    "drone",
    "badger",
    "trampoline",
    "viking",
    "origami crane",
    "spreadsheet",
    "acrobat",
    "beehive",
]
FRESH_QUESTIONS = [
    "good evening",
    "hey, who am I talking to?",
    "please introduce yourself briefly",
    "could you write four lines about the ocean?",
    "what is a harbour?",
    "define patience",
    "what's the capital of Norway?",
    "5 + 3",
    "what is nine minus four?",
    "the opposite of noisy",
    "where does an owl live",
    "how can I bake bread?",
    "list four animals",
    "count to seven",
    "know any jokes?",
    "I'm called Ottoline, by the way",
    "I feel lonely tonight",
    "my cat is called Marzipan",
    "much appreciated!",
    "see you tomorrow",
    "who invented the zipper?",
    "what is the boiling point of ethanol?",
    "write unit tests for my parser",
    "explain the difference between TCP and UDP",
    "qwpoeiru zmxn",
    "Wo ist der Bahnhof?",
    "what month comes after May?",
    "repeat: seven green bottles",
    "what should I have for breakfast?",
    "make a JSON object with city and colour",
    "describe a thunderstorm",
    "what do bees make?",
    "how many legs does a cat have?",
    "is ice cold?",
    "write a note to my neighbour about the loud music",
    "can you sing?",
    "what year is it?",
    "tell me something interesting",
    "why do cats sleep so much?",
    "what is a load balancer?",
]
"""Written after the last training run. The prompts above were looked at while the grammar was
being improved, so only these show how the model does on words nobody had it in mind for."""

STORY_STARTS = [
    "Once upon a time",
    "Once upon a time there was a",
    "One day, a little girl named Lily",
    "The old lighthouse keeper",
    "It was a dark and stormy night",
    "In the village",
    "The",
    '"Who is there?" asked',
    "There was once a queue that",
    "Long ago, a dragon",
    "The capital of France is",
    "A rainbow is",
    "Q: What is the capital of Japan?\nA:",
    "def main():",
    "Hello, my name is",
]


def _answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    temperature: float,
    seed: int,
    max_tokens: int = MAX_TOKENS,
) -> list[tuple[str, bool, int, list[int]]]:
    """For every prompt: the text, whether it ended by itself, and the tokens."""
    stop = {tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)}
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    out = generate(
        model,
        encoded,
        stop=stop,
        pad=tokenizer.token_to_id(PAD),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    results = []
    for row in out:
        cut = next((i for i, t in enumerate(row) if t in stop), None)
        ids = row if cut is None else row[:cut]
        results.append((tokenizer.decode(ids), cut is not None, len(ids), ids))
    return results


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of different word n-grams among all of them."""
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    heldout_loss: float,
    train_loss: float,
    folder: Path,
    console: Console,
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """Runs all checks and writes ``evaluation.json`` and ``samples.md``."""
    limit = 3 if quick else 10**6
    max_tokens = 24 if quick else MAX_TOKENS
    story_prompts = [f"tell me a story about {article(t)}" for t in STORY_TOPICS][:limit] + [
        f"Write a short story about the {t}." for t in STORY_TOPICS
    ][:limit]
    topics = STORY_TOPICS[:limit] * 2
    chat_prompts = QUESTIONS[:limit] + story_prompts
    rendered = [render([("user", p)], answer=True) for p in chat_prompts]
    rendered += [
        render([("system", "You are a helpful assistant."), ("user", p)], answer=True) for p in QUESTIONS[:limit]
    ]
    lines = ["# Samples", ""]
    report: dict[str, Any] = {
        "train_loss": train_loss,
        "heldout_loss": heldout_loss,
        "heldout_perplexity": math.exp(heldout_loss),
    }
    for name, temperature, seeds in (("greedy", 0.0, [0]), ("temperature_0.7", 0.7, [1] if quick else [1, 2, 3])):
        results, stories, hits = [], [], 0
        for seed in seeds:
            batch = _answers(model, tokenizer, rendered, temperature=temperature, seed=seed, max_tokens=max_tokens)
            results += batch
            told = batch[len(QUESTIONS[:limit]) : len(QUESTIONS[:limit]) + len(story_prompts)]
            stories += [text for text, *_ in told]
            hits += sum(topic in text.lower() for topic, (text, *_) in zip(topics, told, strict=True))
        report[name] = {
            "answers": len(results),
            "ended_by_itself": sum(ended for _, ended, *_ in results) / len(results),
            "mean_tokens": sum(n for *_, n, _ in results) / len(results),
            "longest_tokens": max(n for *_, n, _ in results),
            "broken_utf8": sum("\ufffd" in text for text, *_ in results),
            "empty": sum(not text.strip() for text, *_ in results),
            "topic_in_story": hits / max(1, len(stories)),
            "distinct_2": distinct(stories, 2),
            "distinct_3": distinct(stories, 3),
            "distinct_4": distinct(stories, 4),
            "different_stories": len(set(stories)) / max(1, len(stories)),
        }
        lines += [f"## {name}", ""]
        for prompt, (text, ended, n, _) in zip(chat_prompts, results, strict=False):
            lines += [
                f"**{prompt}** ({n} tokens{'' if ended else ', cut'})",
                "",
                *(f"> {line}" for line in text.split("\n")),
                "",
            ]
    fresh = [f"tell me a story about {article(t)}" for t in FRESH_TOPICS][:limit] + [
        f"Write a short story about the {t}." for t in FRESH_TOPICS
    ][:limit]
    fresh_topics = FRESH_TOPICS[:limit] * 2
    fresh_prompts = fresh + FRESH_QUESTIONS[:limit]
    report["fresh"] = {}
    for name, temperature in (("greedy", 0.0), ("temperature_0.7", 0.7)):
        batch = _answers(
            model,
            tokenizer,
            [render([("user", p)], answer=True) for p in fresh_prompts],
            temperature=temperature,
            seed=11,
            max_tokens=max_tokens,
        )
        found = sum(t in text.lower() for t, (text, *_) in zip(fresh_topics, batch, strict=False))
        report["fresh"][name] = {
            "answers": len(batch),
            "ended_by_itself": sum(e for _, e, *_ in batch) / len(batch),
            "topic_in_story": found / len(fresh),
        }
        lines += [f"## fresh prompts, {name}", ""]
        for prompt, (text, ended, n, _) in list(zip(fresh_prompts, batch, strict=True))[len(fresh) - 4 :]:
            lines += [
                f"**{prompt}** ({n} tokens{'' if ended else ', cut'})",
                "",
                *(f"> {line}" for line in text.split("\n")),
                "",
            ]
    lines += ["## plain completion, temperature 0.7", ""]
    completions = _answers(model, tokenizer, STORY_STARTS[:limit], temperature=0.7, seed=5, max_tokens=max_tokens)
    report["completion"] = {
        "ended_by_itself": sum(e for _, e, *_ in completions) / len(completions),
        "mean_tokens": sum(n for *_, n, _ in completions) / len(completions),
    }
    for start, (text, ended, n, _) in zip(STORY_STARTS, completions, strict=False):
        lines += [
            f"**{start}** ({n} tokens{'' if ended else ', cut'})",
            "",
            *(f"> {line}" for line in (start + text).split("\n")),
            "",
        ]
    memory = render(
        [
            ("user", "Hello, my name is Brunhilde"),
            ("assistant", "Hello, Brunhilde! How can I help you?"),
            ("user", "what is a rainbow?"),
            ("assistant", "A rainbow is a curve of colours in the sky that appears when the sun shines through rain."),
            ("user", "What is my name?"),
        ],
        answer=True,
    )
    remembered = _answers(model, tokenizer, [memory], temperature=0.0, seed=0, max_tokens=max_tokens)[0][0]
    lines += ["## memory over three turns", "", f"> {remembered}", ""]
    round_trip = ["naïve café ☕ 你好 🦊", "tab\tand\nnewline", "1234567890", "  spaces  "]
    report["checks"] = {
        "ends_by_itself": all(report[k]["ended_by_itself"] >= 0.99 for k in ("greedy", "temperature_0.7")),
        "no_broken_utf8": all(report[k]["broken_utf8"] == 0 for k in ("greedy", "temperature_0.7")),
        "no_empty_answer": all(report[k]["empty"] == 0 for k in ("greedy", "temperature_0.7")),
        "topic_in_story": all(report[k]["topic_in_story"] >= 0.95 for k in ("greedy", "temperature_0.7")),
        "not_a_parrot": report["temperature_0.7"]["distinct_4"] >= 0.5
        and report["temperature_0.7"]["different_stories"] == 1.0,
        "loss_came_down": train_loss < 2.0 and heldout_loss < train_loss * 1.15,
        "remembers_a_name": "brunhilde" in remembered.lower(),
        "utf8_round_trip": all(
            tokenizer.decode(tokenizer.encode(t, add_special_tokens=False).ids) == t for t in round_trip
        ),
    }
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    console.print_json(json.dumps(report))
    return report


def main() -> None:
    """Judges a saved model again: ``python -m tools.train.evaluate MODEL_FOLDER RESULTS_FOLDER``."""
    model_folder, results = (Path(argument) for argument in sys.argv[1:3])
    curve = json.loads((results / "loss.json").read_text(encoding="utf-8"))
    tail = curve["train"][-20:]
    evaluate(
        load(model_folder),
        Tokenizer.from_file(str(model_folder / "tokenizer.json")),
        curve["heldout"][-1],
        sum(tail) / len(tail),
        results,
        Console(soft_wrap=True),
    )


if __name__ == "__main__":
    main()
