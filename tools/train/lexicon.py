"""Word lists, English inflection and the little template language of the corpus.

A template is a plain string with two kinds of holes:

``[one|two|three]``
    picks one of the alternatives (they nest; an empty one is allowed);
``{slot}``
    is looked up in the context, and otherwise drawn from ``words/slot.txt``.
    ``{slot+s}`` makes it plural, ``{slot+ed}`` past tense, ``{slot+ing}`` a participle.

``a``/``an`` and sentence capitals are repaired afterwards by :func:`polish`, so that a
template never needs to know which word lands in it.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

WORDS = Path(__file__).parent / "words"
Context = Mapping[str, "str | Callable[[], str]"]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([A-Za-z_0-9]+)(?:\+(s|ed|ing|es))?\}")
_ARTICLE = re.compile(r"\b([Aa])n? (?=(\w+))")
_SENTENCE = re.compile(r"(^|[.!?:]\n+|[.!?] +|\n\n|[.]\" +|(?:said|asked|whispered|cried), \"|: \"|\" \")(\"?)([a-z])")
_AN = ("hour", "honest", "heir", "honour")
_A = ("uni", "use", "usu", "eu", "one", "once", "uku", "ute")
_VOWELS = "aeiou"


@cache
def words(name: str) -> tuple[str, ...]:
    """All entries of ``words/<name>.txt``."""
    return tuple((WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines())


@cache
def table(name: str) -> tuple[tuple[str, ...], ...]:
    """The entries of a word file whose columns are separated by ``|``."""
    return tuple(tuple(line.split("|")) for line in words(name))


@cache
def _irregular_verbs() -> dict[str, str]:
    return {row[0]: row[1] for row in table("irregular_verbs")}


@cache
def _irregular_plurals() -> dict[str, str]:
    return {row[0]: row[1] for row in table("irregular_plurals")}


def plural(noun: str) -> str:
    """The plural of a noun or noun phrase (its last word is the one that changes)."""
    known = _irregular_plurals()
    if noun in known:
        return known[noun]
    head, _, last = noun.rpartition(" ")
    if last in known:
        last = known[last]
    elif last.endswith("y") and last[-2:-1] not in _VOWELS:
        last = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return f"{head} {last}" if head else last


def past(verb: str) -> str:
    """The past tense of a verb or verb phrase (its first word is the one that changes)."""
    first, space, rest = verb.partition(" ")
    known = _irregular_verbs()
    if first in known:
        first = known[first]
    elif first.endswith("e"):
        first += "d"
    elif first.endswith("y") and first[-2] not in _VOWELS:
        first = first[:-1] + "ied"
    elif _doubles(first):
        first += first[-1] + "ed"
    else:
        first += "ed"
    return first + space + rest


def participle(verb: str) -> str:
    """The ``-ing`` form of a verb or verb phrase."""
    first, space, rest = verb.partition(" ")
    if first.endswith("ie"):
        first = first[:-2] + "ying"
    elif first.endswith("e") and not first.endswith(("ee", "ye")) and first != "be":
        first = first[:-1] + "ing"
    elif _doubles(first) or first in ("swim", "run", "begin", "forget", "get", "sit", "put", "cut"):
        first += first[-1] + "ing"
    else:
        first += "ing"
    return first + space + rest


def third_person(verb: str) -> str:
    """The third person singular of a verb or verb phrase."""
    first, space, rest = verb.partition(" ")
    special = {"be": "is", "have": "has", "do": "does", "go": "goes"}
    if first in special:
        first = special[first]
    elif first.endswith("y") and first[-2] not in _VOWELS:
        first = first[:-1] + "ies"
    elif first.endswith(("s", "x", "z", "ch", "sh")):
        first += "es"
    else:
        first += "s"
    return first + space + rest


def _doubles(verb: str) -> bool:
    """Whether the last consonant doubles before a vowel ending, as in *stop*, *stopped*."""
    return bool(re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprt]", verb)) and not verb.endswith(("ck",))


def article(noun: str) -> str:
    """The noun with ``a`` or ``an`` in front."""
    return polish_articles(f"a {noun}")


def polish_articles(text: str) -> str:
    """Chooses between *a* and *an* by the next word."""

    def repair(match: re.Match[str]) -> str:
        word = match.group(2).lower()
        vowel = word.startswith(_AN) or (word[0] in _VOWELS and not word.startswith(_A))
        return f"{match.group(1)}{'n' if vowel else ''} "

    return _ARTICLE.sub(repair, text)


def polish(text: str) -> str:
    """Repairs spaces, articles and the capitals at the beginning of sentences."""
    text = re.sub(r" +", " ", text)
    text = re.sub(r" ([.,!?;])", r"\1", text)
    text = re.sub(r" *\n *", "\n", text).strip()
    text = polish_articles(text)
    return _SENTENCE.sub(lambda m: m.group(1) + m.group(2) + m.group(3).upper(), text)


_REAL = ("animals", "objects", "people", "extra_nouns", "verbs", "names_f", "names_m", "adj_thing", "foods", "towns")


def invented_word(rng: random.Random) -> str:
    """A word that means nothing.

    Prompts are full of words that no list holds. Training on invented ones teaches the
    model to copy a word from the prompt rather than to recall it.
    """
    if rng.random() < 0.5:
        first, second = (rng.choice(words(rng.choice(_REAL))).split()[-1].lower() for _ in range(2))
        return first[: rng.randint(1, 5)] + second[-rng.randint(2, 5) :]
    onsets = [
        "b",
        "bl",
        "br",
        "c",
        "ch",
        "cl",
        "cr",
        "d",
        "dr",
        "f",
        "fl",
        "fr",
        "g",
        "gl",
        "gr",
        "h",
        "j",
        "k",
        "kl",
        "l",
        "m",
        "n",
        "p",
        "ph",
        "pl",
        "pr",
        "qu",
        "r",
        "s",
        "sc",
        "sh",
        "sk",
        "sl",
        "sm",
        "sn",
        "sp",
        "st",
        "str",
        "sw",
        "t",
        "th",
        "tr",
        "tw",
        "v",
        "w",
        "wh",
        "y",
        "z",
    ]
    vowels = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou", "ie", "oa", "y"]
    codas = [
        "",
        "",
        "",
        "b",
        "ck",
        "d",
        "g",
        "l",
        "ll",
        "m",
        "n",
        "nd",
        "ng",
        "nt",
        "p",
        "r",
        "rk",
        "s",
        "ss",
        "st",
        "t",
        "x",
        "z",
    ]
    endings = [
        "",
        "",
        "",
        "er",
        "in",
        "le",
        "ing",
        "ity",
        "or",
        "ion",
        "ette",
        "ia",
        "o",
        "us",
        "ex",
        "ist",
        "ium",
        "ology",
        "ware",
        "net",
    ]
    syllables = rng.choice([1, 2, 2, 2, 3])
    word = "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(syllables))
    return word + rng.choice(endings)


class Writer:
    """Fills templates with words; all randomness comes from the given generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.flavour = ""
        """The word that the text is about. Some choices lean on it, so that foxes and bakers
        differ in their habits, and even the likeliest words differ from story to story."""
        self._used: dict[str, list[str]] = {}

    def begin(self, flavour: str = "") -> None:
        """Starts a new text: words may be used again, and it may have a flavour."""
        self.flavour = flavour
        self._used = {}

    def pick(self, name: str) -> str:
        """One entry of a word file."""
        entries = words(name)
        used = self._used.setdefault(name, [])
        if len(used) > len(entries) // 2:
            used.clear()
        while True:
            if self.flavour and self.rng.random() < 0.4:
                start = zlib.crc32(f"{self.flavour}/{name}".encode())
                word = entries[(start + 7 * (len(used) + self.rng.choice((0, 0, 0, 1, 2)))) % len(entries)]
            else:
                word = self.rng.choice(entries)
            if word not in used:
                # A text that says the same rare word again and again sounds stuck.
                used.append(word)
                return word

    def row(self, name: str) -> tuple[str, ...]:
        """One row of a word table."""
        return self.rng.choice(table(name))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def choose(self, *options: str) -> str:
        """One of the options."""
        return self.rng.choice(options)

    def fill(self, template: str, context: Context | None = None) -> str:
        """The template with all its holes filled, polished."""
        return polish(self.raw(template, context or {}))

    def raw(self, template: str, context: Context) -> str:
        """Like :meth:`fill`, without the final polish."""
        rng = self.rng
        while "[" in template:
            smaller = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), template)
            if smaller == template:
                break
            template = smaller

        def slot(match: re.Match[str]) -> str:
            name, form = match.groups()
            value = context.get(name)
            if value is None:
                value = self.pick(name)
            elif callable(value):
                value = value()
            if form in ("s", "es"):
                return plural(value)
            if form == "ed":
                return past(value)
            if form == "ing":
                return participle(value)
            return value

        return _SLOT.sub(slot, template)
