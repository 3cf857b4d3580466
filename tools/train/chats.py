"""Conversations: what people ask a small model, and what it should answer.

Each *intent* is a function that appends one exchange (or several) to a :class:`Chat`.
Users write in many ways, so their lines pass through :func:`casual`, which varies case,
punctuation and spelling; the answers stay tidy.
"""

# ruff: noqa: E501 - templates read best on one line
from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.train.lexicon import Writer, article, invented_word, past, plural, polish, table, third_person, words
from tools.train.stories import Story, Topic, any_kind, draw_name, tell, title

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


@dataclass
class Chat:
    """A conversation in the making."""

    w: Writer
    name: str = "millrace"
    brief: bool = False
    turns: list[tuple[str, str]] = field(default_factory=list)
    story: Story | None = None
    facts: dict[str, str] = field(default_factory=dict)

    def say(self, user: str, answer: str, *, tidy: bool = False, exact: bool = False) -> None:
        """Appends one exchange. ``exact`` keeps both lines as they are."""
        question = user if exact else polish(user)
        self.w.begin()
        self.turns.append(("user", question if tidy or exact else casual(self.w, question)))
        self.turns.append(("assistant", answer if exact else polish(answer)))


def casual(w: Writer, text: str) -> str:
    """A line as people really type it."""
    roll = w.rng.random()
    if roll < 0.25:
        text = text.lower()
    elif roll < 0.265:
        text = text.upper()
    if w.chance(0.3):
        text = text.rstrip(".?!")
    elif w.chance(0.05):
        text = text.rstrip(".?!") + w.choose("!", "??", "...", "!!", " :)", " please", ", please.", " thanks")
    if w.chance(0.04) and len(text) > 8:
        at = w.rng.randrange(1, len(text) - 2)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :] if w.chance(0.5) else text[:at] + text[at + 1 :]
    return text


def noun(w: Writer) -> str:
    """Any countable noun."""
    return w.pick(
        w.choose("animals", "people", "objects", "objects", "foods", "big_things", "extra_nouns", "creatures")
    )


def anything(w: Writer) -> str:
    """A topic in any form, sometimes one that nobody has ever heard of."""
    roll = w.rng.random()
    if roll < 0.25:
        return article(noun(w))
    if roll < 0.45:
        return plural(noun(w))
    if roll < 0.62:
        return w.pick("themes")
    if roll < 0.70:
        return w.pick("mass_foods")
    if roll < 0.76:
        return w.pick("hobbies")
    if roll < 0.82:
        return "the " + w.pick("places").split("|")[1]
    if roll < 0.92:
        return w.choose("", "the ", "a ", "my ") + w.choose("", w.pick("adj_thing") + " ") + invented_word(w.rng)
    return w.choose(
        invented_word(w.rng) + " " + invented_word(w.rng), invented_word(w.rng).capitalize(), w.pick("unknown_topics")
    )


# --- small talk -----------------------------------------------------------------------------------


def greet(c: Chat) -> None:
    w = c.w
    user = w.choose(
        "hi",
        "hello",
        "hey",
        "good morning",
        "good evening",
        "hi there",
        "hello there",
        "hey there",
        "greetings",
        "good afternoon",
        "hello!",
        "yo",
        "hiya",
        "howdy",
        "hello, " + c.name,
        "hi " + c.name,
        "hello world",
        "hello my friend",
    )
    c.say(
        user + w.choose("", "", ".", "!"),
        w.raw(
            "[Hello|Hi|Hello there|Hi there|Good day|Welcome]! [How can I help you?|What would you like to talk about?|What can I do for you?|Would you like a story?|How are you today?|It is nice to meet you.|What is on your mind?]",
            {},
        ),
    )


def how_are_you(c: Chat) -> None:
    w = c.w
    user = w.choose(
        "how are you?",
        "how are you doing?",
        "how is it going?",
        "how do you feel today?",
        "hello, how are you?",
        "hi, how are you today?",
        "what's up?",
        "are you well?",
        "how have you been?",
        "how's your day?",
    )
    c.say(
        user,
        w.raw(
            "[I am well, thank you.|I am fine, thank you.|All is well here.|I am doing well.|Very well, thank you.] [And you?|How are you?|What can I do for you?|What would you like to do?|How is your day?]",
            {},
        ),
    )


def who_are_you(c: Chat) -> None:
    w = c.w
    user = w.choose(
        "who are you?",
        "what are you?",
        "what is your name?",
        "what's your name?",
        "tell me about yourself",
        "introduce yourself",
        "do you have a name?",
        "what should I call you?",
        "which model is this?",
        "what model are you?",
        "are you an AI?",
        "who am I talking to?",
    )
    if c.name == "millrace":
        answer = w.raw(
            "[I am millrace, a very small language model.|My name is millrace. I am a tiny language model.|I am called millrace, and I am a small model that can chat and tell stories.|You can call me millrace. I am a very small model.] [I know simple things and I like to tell stories.|I am named after the channel that feeds a water wheel.|I am made for testing, but I do my best.|]",
            {},
        )
    else:
        answer = w.raw(
            "[I am {n}.|My name is {n}.|You can call me {n}.|I am called {n}.] [How can I help you?|It is nice to meet you.|I am a small language model.|]",
            {"n": c.name},
        )
    c.say(user, answer)


def abilities(c: Chat) -> None:
    w = c.w
    user = w.choose(
        "what can you do?",
        "what can you help me with?",
        "how can you help me?",
        "what are you good at?",
        "help",
        "what should I ask you?",
        "give me some ideas",
        "what do you know?",
        "what are your skills?",
    )
    c.say(
        user,
        w.raw(
            "I can [tell a story, write a short poem, answer simple questions and chat a little|tell you a story about almost anything, explain simple words, and do very small sums|write stories and poems, make lists, and answer easy questions]. [Just ask!|What would you like?|Try me.|I do not know much about the wide world.|]",
            {},
        ),
    )


def thanks(c: Chat) -> None:
    w = c.w
    c.say(
        w.choose(
            "thanks",
            "thank you",
            "thank you very much",
            "thanks a lot",
            "great, thanks",
            "cool, thank you!",
            "perfect",
            "that was nice",
            "well done",
            "I liked that",
            "good answer",
            "wonderful, thank you",
            "nice",
            "great",
            "ok thanks",
            "that is lovely",
        ),
        w.raw(
            "[You are welcome!|You are very welcome.|My pleasure.|I am glad that you liked it.|Any time.|Happy to help.|With pleasure.] [Is there anything else?|Would you like to hear more?|||]",
            {},
        ),
    )


def bye(c: Chat) -> None:
    w = c.w
    c.say(
        w.choose(
            "bye",
            "goodbye",
            "see you later",
            "good night",
            "bye bye",
            "see you",
            "I have to go now",
            "that is all for today",
            "farewell",
            "talk to you later",
        ),
        w.raw(
            "[Goodbye! |See you soon! |Good night! |Farewell! |Bye! |Take care! ][It was nice to talk to you.|Come back any time.|Have a lovely day.|Until next time.|Sleep well.|]",
            {},
        ),
    )


def short_reply(c: Chat) -> None:
    """Lines such as "ok" and "hm", which carry little."""
    w = c.w
    c.say(
        w.choose(
            "ok",
            "okay",
            "yes",
            "no",
            "sure",
            "maybe",
            "hm",
            "I see",
            "really?",
            "interesting",
            "wow",
            "lol",
            "haha",
            "oh",
            "not really",
            "fine",
            "test",
            "testing",
            "testing 1 2 3",
            "ping",
            "?",
            "...",
            "hello?",
            "continue",
            "go on",
            "why?",
            "what?",
            "and?",
            "yes please",
            "no thanks",
            "I don't know",
            "next",
            "stop",
        ),
        w.raw(
            "[I see.|All right.|Very well.|I am here.|Good.|I understand.] [What would you like to talk about?|Shall I tell you a story?|You can ask me something, or I can tell you a story.|What would you like to do next?|Tell me more, or ask me a question.]",
            {},
        ),
    )


def feelings(c: Chat) -> None:
    w = c.w
    feeling = w.pick("feelings")
    good = feeling in {
        "happy",
        "excited",
        "proud",
        "grateful",
        "calm",
        "hopeful",
        "relieved",
        "delighted",
        "cheerful",
        "glad",
        "pleased",
        "content",
        "joyful",
        "peaceful",
        "brave",
        "curious",
    }
    user = w.raw(
        "[I am {f}|I feel {f}|I'm so {f} today|I am feeling {f}|today I am very {f}|I feel {f} because of {x}|I am {f} about {x}]",
        {"f": feeling, "x": (x := anything(w))},
    )
    about = f" about {x}" if x in user else ""
    if good:
        answer = w.raw(
            "[I am glad to hear that you are {f}{x}.|That is lovely. It is good to be {f}{x}.|How nice that you feel {f}{x}!] [What happened?|What made your day?|Tell me more about it.|I hope it lasts.]",
            {"f": feeling, "x": about},
        )
    else:
        answer = w.raw(
            "[I am sorry that you feel {f}{x}.|It is not easy to be {f}{x}.|Everyone feels {f} sometimes.] [Would you like to talk about it?|Perhaps a short walk would help.|Shall I tell you a story?|Take a deep breath, and be kind to yourself.|A cup of {mass_foods} may help a little.]",
            {"f": feeling, "x": about},
        )
    c.say(user, answer)


def statement(c: Chat) -> None:
    """The user tells something; the answer picks up the user's words."""
    w = c.w
    x = anything(w)
    kind = w.rng.randrange(8)
    if kind == 0:
        c.say(
            f"I {w.choose('like', 'love', 'really like', 'enjoy')} {x}",
            w.raw(
                "[I can see why you like {x}.|That is nice.|Good choice!] What do you like [most|best] about {x}?",
                {"x": x},
            ),
        )
    elif kind == 1:
        c.say(
            f"I {w.choose('hate', 'do not like', 'cannot stand')} {x}",
            w.raw(
                "[That is all right.|I understand.|Everyone is different.] [What is it about {x} that you do not like?|Not everyone likes {x}.|Is there something that you like better than {x}?]",
                {"x": x},
            ),
        )
    elif kind == 2:
        place = w.pick("places").replace("|", " ")
        verb = w.choose(
            "went for a walk",
            "had a picnic",
            "met an old friend",
            f"saw {x}",
            f"found {x}",
            "took some pictures",
            f"lost my {w.pick('objects')}",
        )
        c.say(
            f"{w.choose('today', 'yesterday', 'last week', 'this morning')} I {verb} {place}",
            w.raw(
                "[That sounds interesting.|What a day!|I would like to hear more.|How nice.] What was it like {p}?",
                {"p": place},
            ),
        )
    elif kind == 3:
        job = w.pick("people")
        c.say(
            f"I am {article(job)}",
            w.raw(
                "[How interesting!|That is fine work.|I like that.] What does {a} do all day?|", {"a": article(job)}
            ).rstrip("|"),
        )
    elif kind == 4:
        pet = w.pick("animals") if w.chance(0.7) else w.choose("cat", "dog")
        name = draw_name(w, pet)[0] if w.chance(0.6) else invented_word(w.rng)[:7].capitalize()
        c.facts["pet"] = name
        c.say(
            w.raw(
                "[I have a {k} called {n}|I have a {k} named {n}|we have a {k} called {n}|my {k} is called {n}|I have a {k}. its name is {n}]",
                {"k": pet, "n": name},
            ),
            w.raw(
                "{n} is a good name for a {k}. [What does {n} like to do?|How old is {n}?|Is {n} {char}?]",
                {"k": pet, "n": name, "char": w.pick("adj_character")},
            ),
        )
        if w.chance(0.6):
            c.say(w.raw(f"what is my {pet} called?", {}), f"Your {pet} is called {name}.")
    elif kind == 5:
        job = w.pick("jobs")
        c.say(
            f"I have to {job} today",
            w.raw(
                "[Good luck with that!|I hope it goes well.|That sounds like work.] [Do you like to {j}?|It is a good feeling when it is done.|After that you can rest.]",
                {"j": job},
            ),
        )
    elif kind == 6:
        skill = w.pick("skills")
        c.say(
            f"I want to learn to {skill}",
            w.raw(
                "That is a good wish. To {s}, [start small and practise a little every day|find someone who can do it, and watch|begin slowly and do not be afraid of mistakes]. [You can do it!|Good luck!|Do not give up.|]",
                {"s": skill},
            ),
        )
    else:
        c.say(
            f"my favourite {w.choose('food', 'animal', 'word', 'thing', 'hobby')} is {x}",
            w.raw("[How nice!|I like that.|Good to know.] What do you like about {x}?", {"x": x}),
        )


def memory(c: Chat) -> None:
    """The user says something about themselves and asks for it later."""
    w = c.w
    what, value = w.rng.choice(
        [
            (
                "name",
                w.pick(w.choose("names_f", "names_m")) if w.chance(0.4) else invented_word(w.rng)[:9].capitalize(),
            ),
            ("favourite colour", w.pick("adj_colour")),
            ("favourite animal", "the " + w.pick("animals")),
            ("favourite food", w.pick("mass_foods")),
            ("home town", w.pick("towns") if w.chance(0.5) else invented_word(w.rng).capitalize()),
            ("favourite number", str(w.rng.randint(1, 99))),
            ("job", w.pick("people")),
        ]
    )
    if what == "name":
        c.say(
            w.raw(
                "[my name is {v}|I am {v}|hello, I am {v}|hi, my name is {v}|call me {v}|you can call me {v}]",
                {"v": value},
            ),
            w.raw(
                "[Nice to meet you, {v}!|Hello, {v}!|Hello, {v}. It is nice to meet you.|Hi, {v}!] [How can I help you?|What would you like to talk about?|How are you today?]",
                {"v": value},
            ),
        )
    elif what == "job":
        c.say(
            f"I work as {article(value)}",
            w.raw("[How interesting!|That sounds good.|I like that.] [Do you enjoy it?|Is it hard work?]", {}),
        )
    else:
        c.say(
            w.raw("my {k} is {v}", {"k": what, "v": value}),
            w.raw(
                "[{v} is a good choice.|I will remember that.|Thank you for telling me.|That is good to know.] [Why did you choose it?|What else do you like?|]",
                {"v": value},
            ),
        )
    if w.chance(0.6):
        w.rng.choice([thanks, greet, short_reply, statement, question_answer, how_are_you])(c)
    ask = {
        "name": "[what is my name?|do you remember my name?|what's my name?|who am I?|can you tell me my name?]",
        "job": "[what is my job?|what do I do?|what is my work?]",
    }.get(what, "[what is my {k}?|do you remember my {k}?|can you tell me my {k}?]")
    answer = {
        "name": "[Your name is {v}.|You are {v}.|You told me that your name is {v}.]",
        "job": "You work as a {v}.",
    }.get(what, "[Your {k} is {v}.|You said that your {k} is {v}.]")
    c.say(w.raw(ask, {"k": what}), w.raw(answer, {"k": what, "v": value}))


# --- stories and other long answers ---------------------------------------------------------------


def _article_topic(w: Writer, adj: str, kind: str) -> str:
    return f"a {adj + ' ' if adj else ''}{kind}"


def story_topic(w: Writer) -> tuple[str, Topic]:
    """What the user wants a story about: the words, and their meaning for the grammar."""
    roll = w.rng.random()
    kind = any_kind(w) if w.chance(0.7) else noun(w) if w.chance(0.4) else invented_word(w.rng)
    adj = w.choose("", "", w.pick("adj_character"), w.pick("adj_size"), "brave little", "lonely old")
    thing = (
        w.pick(w.choose("objects", "objects", "big_things", "extra_nouns", "foods"))
        if w.chance(0.7)
        else invented_word(w.rng)
    )
    at = w.pick("places").replace("|", " ")
    if roll < 0.25:
        return f"{w.choose('a', 'a', 'the', 'the', 'one', 'some', '')} {adj} {kind}", Topic(hero=kind, hero_adj=adj)
    if roll < 0.45:
        thing_adj = w.choose("", "", "", w.pick("adj_thing"))
        return f"a {adj} {kind} and a {thing_adj} {thing}", Topic(
            hero=kind, hero_adj=adj, thing=thing, thing_adj=thing_adj or None
        )
    if roll < 0.55:
        return f"a {adj} {kind} {at}", Topic(hero=kind, hero_adj=adj, at=at)
    if roll < 0.62:
        name, _ = draw_name(w, kind)
        if w.chance(0.4):
            name = invented_word(w.rng)[:8].capitalize()
        return f"a {adj} {kind} {w.choose('named', 'called')} {name}", Topic(hero=kind, hero_adj=adj, name=name)
    if roll < 0.68:
        friend = any_kind(w)
        return f"a {adj} {kind} and a {friend}", Topic(hero=kind, hero_adj=adj, friend=friend)
    if roll < 0.76:
        some = w.choose("a ", "the ", "a " + w.pick("adj_thing") + " ", w.choose("his ", "her "))
        new_verb = invented_word(w.rng)
        verb = w.choose(
            "wanted to " + w.pick("skills"),
            "wants to " + w.pick("skills"),
            "was afraid of " + w.pick("fears"),
            "is afraid of " + w.pick("fears"),
            "could not " + w.pick("skills"),
            "can't " + w.pick("skills"),
            f"cannot {w.pick('verbs')} {some}{thing}",
            f"can't {w.pick('verbs')} {some}{thing}",
            f"lost {some}{thing}",
            f"finds {some}{thing}",
            "lived " + at,
            "loves " + w.pick("themes"),
            "dreamed of " + w.pick("themes"),
            f"{past(w.pick('verbs'))} {some}{thing}",
            f"{third_person(w.pick('verbs'))} {some}{thing}",
            f"{past(new_verb)} {some}{thing}",
            f"{third_person(new_verb)} {some}{thing}",
        ) + w.choose("", "", "", " " + at, " every " + w.pick("times"), " at midnight", " with a " + w.pick("objects"))
        return f"a {adj} {kind} {w.choose('who', 'who', 'that')} {verb}", Topic(
            hero=kind, hero_adj=adj, clause="who " + verb
        )
    if roll < 0.84:
        thing_adj = w.choose("", "", w.pick("adj_thing"))
        return f"{w.choose('a', 'a', 'the', 'my')} {thing_adj} {thing}", Topic(thing=thing, thing_adj=thing_adj or None)
    if roll < 0.86:
        return f"two {plural(kind)}", Topic(hero=kind, friend=kind, pair=True)
    if roll < 0.88:
        with_thing = w.chance(0.5)
        return f"two {plural(kind)}" + (f" and a {thing}" if with_thing else ""), Topic(
            hero=kind, friend=kind, pair=True, thing=thing if with_thing else None
        )
    if roll < 0.90:
        return plural(kind), Topic(hero=kind, hero_adj=adj)
    if roll < 0.95:
        theme = w.pick("themes")
    else:
        theme = w.choose(
            invented_word(w.rng) + " " + invented_word(w.rng),
            w.pick("unknown_topics"),
            invented_word(w.rng),
            w.pick("hobbies"),
            "the " + invented_word(w.rng),
        )
    return theme, Topic(theme=theme)


ASK_STORY = [
    "tell me a {l} story about {t}",
    "write a {l} story about {t}",
    "can you tell me a {l} story about {t}?",
    "I would like a {l} story about {t}",
    "please write a {l} story about {t}",
    "a {l} story about {t}, please",
    "make up a {l} story about {t}",
    "story about {t}",
    "tell a {l} tale about {t}",
    "write me a {l} tale of {t}",
    "could you write a {l} story with {t} in it?",
    "I want to hear a {l} story about {t}",
    "give me a {l} story about {t}",
    "tell us a {l} bedtime story about {t}",
    "let's have a {l} story about {t}",
    "do you know a {l} story about {t}?",
    "once more, a {l} story about {t}",
    "my child wants a {l} story about {t}",
    "write about {t}",
    "Write a {l} fairy tale about {t}.",
    "a {l} tale about {t}",
    "I need a {l} story. it should be about {t}",
    "hello! tell me a {l} story about {t}",
    "hi, can you write a {l} story about {t}?",
    "compose a {l} story on {t}",
]


def story(c: Chat) -> None:
    w = c.w
    asked, topic = story_topic(w)
    length = w.choose("short", "medium", "medium", "long") if not c.brief else "short"
    word = {
        "short": ["short", "short", "very short", "little", ""],
        "medium": ["", "", "", "nice", "funny", "good"],
        "long": ["long", "long", "very long", "detailed", ""],
    }[length]
    told = tell(w, topic, length)
    c.story = told
    w.begin()
    text = told.text
    lead = w.rng.random()
    if lead < 0.18:
        text = (
            w.raw(
                "[Here is a story about {t}.|This is a story about {t}.|Of course! Here is a story about {t}.|Very well, a story about {t}.|Let me tell you about {t}.]",
                {"t": asked.replace("my ", "your ")},
            )
            + "\n\n"
            + text
        )
    elif lead < 0.30:
        text = title(w, told) + "\n\n" + text
    c.say(w.raw(w.rng.choice(ASK_STORY), {"l": w.choose(*word), "t": asked}), text)


def story_open(c: Chat) -> None:
    """A story without a topic."""
    w = c.w
    length = w.choose("short", "medium", "medium", "long") if not c.brief else "short"
    told = tell(w, None, length)
    c.story = told
    w.begin()
    extra = {"short": " short", "medium": "", "long": " long"}[length] if w.chance(0.7) else ""
    c.say(
        w.raw(
            w.choose(
                "tell me a{l} story",
                "can you tell me a{l} story?",
                "write a{l} story",
                "I want a{l} story",
                "a{l} story please",
                "once upon a time",
                "tell me something{l}",
                "I am bored, tell me a{l} story",
                "read me a{l} bedtime story",
                "surprise me with a{l} story",
            ),
            {"l": extra},
        ),
        told.text,
    )


def about_story(c: Chat) -> None:
    """Questions about the story that was just told."""
    w = c.w
    if c.story is None:
        story(c)
    s = c.story
    assert s is not None
    kind = w.rng.randrange(6)
    if kind == 0:
        c.say(
            w.choose(
                f"what was the {s.hero}'s name?",
                f"what is the name of the {s.hero}?",
                f"what was the {s.hero} called?",
                "who was the story about?",
            ),
            f"The {s.hero}'s name was {s.hero_name}.",
        )
    elif kind == 1 and s.friend_name in s.text:
        c.say(
            w.raw("[who was {f}?|who is {f}?|what was {f}?]", {"f": s.friend_name}),
            f"{s.friend_name} was the {s.friend} in the story.",
        )
    elif kind == 2:
        c.say(
            w.raw("[who was {f}?|who is {f}?|tell me about {f}]", {"f": s.hero_name}),
            f"{s.hero_name} was the {s.hero} in the story.",
        )
    elif kind == 3:
        c.say(
            w.raw(
                "[what is the moral?|what is the moral of the story?|what can we learn from it?|what does the story teach us?]",
                {},
            ),
            w.raw(
                "[The story tells us that {m}.|I think it is this: {m}.|Perhaps we can learn that {m}.]", {"m": s.moral}
            ),
        )
    elif kind == 4:
        told = tell(w, Topic(hero=s.hero, hero_adj="", name=s.hero_name, thing=s.thing), "short")
        w.begin()
        c.say(
            w.raw(
                "[what happened next?|what happened then?|and then?|go on|continue the story|tell me more about {h}|more please]",
                {"h": s.hero_name},
            ),
            told.text.replace("There was once", "Some time later there was").replace("Once upon a time", "One day"),
        )
    else:
        again = tell(
            w,
            Topic(hero=s.hero if w.chance(0.6) else None, hero_adj=""),
            "short" if c.brief else w.choose("short", "medium"),
        )
        c.story = again
        w.begin()
        c.say(
            w.choose(
                "another one",
                "another story please",
                "one more",
                "tell me another one",
                "again",
                "another one, please!",
                "can I have one more?",
            ),
            again.text,
        )


COUPLETS = [
    ("I think of {x} in the morning light,", "and I dream of {x} in the quiet night."),
    ("the wind is {weathers}, the road is long,", "and {x} is part of my little song."),
    ("there is {x} wherever I go,", "in the summer sun and the winter snow."),
    ("the {animals} looked up to the sky,", "and {x} went slowly, slowly by."),
    ("come, sit down by the fire with me,", "and I will sing of {x} and the sea."),
    ("some people ask for silver and gold,", "but {x} is better, so I am told."),
    ("a {adj_character} {people} came down the hill", "and spoke of {x}, and the world was still."),
    ("soft as the rain on the {adj_place} ground,", "{x} came to me without a sound."),
    ("the {objects} is old and the {objects} is new,", "and {x} is waiting for me and you."),
    ("over the river and under the tree,", "{x} was there, as plain as can be."),
    ("the {adj_colour} moon looked down from above", "on {x}, and on all that we love."),
    ("one {weathers} {times}, when the day was done,", "I thought of {x} and the setting sun."),
    ("the clock on the wall says half past three,", "and {x} means all the world to me."),
    ("who knows where the {animals} goes at night?", "perhaps to {x}, in the pale moonlight."),
    ("the {mass_foods} is warm and the table is wide,", "with {x} and a friend on the other side."),
    ("I asked the {people}, I asked the king:", "is {x} not a wonderful thing?"),
    ("when I am {feelings} and cannot sleep,", "I think of {x} instead of sheep."),
    ("a {adj_thing} {objects} stood by the door,", "and {x} was never so fine before."),
    ("leaves may fall and rivers may run,", "but {x} stays with everyone."),
    ("and now my little poem must end,", "with {x} beside me as a friend."),
    ("high in the tower and deep in the well,", "{x} has a story it wants to tell."),
    ("the {animals} sang and the {animals} heard", "of {x}, and did not say a word."),
    ("give me a day with nothing to do,", "and I will spend it with {x} and you."),
    ("far from the town, where the tall grass grows,", "{x} is a thing that nobody knows."),
    ("the ship came home with the evening tide,", "with {x} and a lantern side by side."),
    ("step by step and stone by stone,", "with {x} you are never quite alone."),
]
HAIKU = [
    ("{x} at dawn,", "{x} in the rain,", "so much {x} tonight,", "I think of {x}:", "{x} again,"),
    (
        "a {animals} waits beside the path,",
        "the {adj_colour} light falls on the stones,",
        "the {adj_place} road is {weathers} today,",
        "a {adj_thing} {objects} hums {adverbs},",
        "somebody {verbs_look+s} {adverbs},",
    ),
    (
        "and nobody speaks.",
        "then the wind is still.",
        "tomorrow comes soon.",
        "the {times} goes on.",
        "a leaf falls down.",
        "the river runs on.",
    ),
]


def poem(c: Chat) -> None:
    w = c.w
    x = anything(w)
    w.begin(x)
    haiku = w.chance(0.18)
    if haiku:
        lines = [w.rng.choice(part) for part in HAIKU]
    else:
        lines = [line for pair in w.rng.sample(COUPLETS, w.rng.choice([1, 2, 2, 3, 4])) for line in pair]
    done = [w.fill(line, {"x": x}) for line in lines]
    if (x.endswith("s") and not x.endswith("ss") and not x.startswith(("a ", "an "))) or x.split()[-1] in {
        row[1] for row in table("irregular_plurals")
    }:
        for one, many in (
            ("was", "were"),
            ("is", "are"),
            ("has", "have"),
            ("wants", "want"),
            ("stays", "stay"),
            ("means", "mean"),
        ):
            done = [re.sub(rf"(?i)({re.escape(x)}) {one}\b", rf"\1 {many}", line) for line in done]
        done = [line.replace("it want", "they want").replace("is " + x, "are " + x) for line in done]
    if len(done) > 4:
        done.insert(4, "")
    text = "\n".join(line[:1].upper() + line[1:] for line in done)
    if w.chance(0.15):
        text = f"{x[:1].upper() + x[1:]}\n\n{text}"
    w.begin()
    kind = (
        "haiku"
        if haiku
        else w.choose("poem", "poem", "short poem", "little poem", "rhyme", "verse", "song", "few lines")
    )
    user = w.raw(
        "[write a {k} about {x}|write a {k} on {x}|a {k} about {x}, please|can you write a {k} about {x}?|compose a {k} about {x}|give me a {k} about {x}|make a {k} about {x}|I want a {k} about {x}|please write me a {k} about {x}|{k} about {x}]",
        {"k": kind, "x": x},
    )
    c.turns += [("user", casual(w, polish(user))), ("assistant", text)]


LISTS = {
    "animals": "animals",
    "people": "jobs",
    "objects": "things",
    "foods": "foods",
    "names_f": "girls' names",
    "names_m": "boys' names",
    "pet_names": "pet names",
    "adj_colour": "colours",
    "hobbies": "hobbies",
    "feelings": "feelings",
    "adj_character": "words for a person's character",
    "verbs": "verbs",
    "adverbs": "adverbs",
    "extra_nouns": "nouns",
    "adj_thing": "adjectives",
    "mass_foods": "things to eat or drink",
    "towns": "made-up towns",
    "creatures": "creatures from stories",
}


def make_list(c: Chat) -> None:
    w = c.w
    source = w.choose(*LISTS)
    what = LISTS[source]
    n = w.rng.choice([2, 3, 3, 4, 5, 5, 6, 7, 8, 10])
    # A list walks along a fixed ring of words: the next word depends on the last one, so even
    # the likeliest list does not repeat itself.
    ring = list(words(source))
    random.Random(source).shuffle(ring)
    at = w.rng.randrange(len(ring))
    items = []
    for _ in range(n):
        items.append(ring[at % len(ring)])
        at += w.rng.choice((1, 1, 2))
    number = w.choose(str(n), ONES[n])
    user = w.raw(
        "[name {n} {w}|list {n} {w}|give me {n} {w}|can you name {n} {w}?|tell me {n} {w}|write a list of {n} {w}|I need {n} {w}|what are {n} {w}?]",
        {"n": number, "w": what},
    )
    style = w.rng.random()
    if style < 0.4:
        body = "\n".join(f"{i}. {item[:1].upper() + item[1:]}" for i, item in enumerate(items, 1))
        answer = w.raw(w.choose("", f"Here are {ONES[n]} {what}:\n", f"{ONES[n].capitalize()} {what}:\n"), {}) + body
    elif style < 0.6:
        answer = w.choose("", f"Here are {ONES[n]} {what}:\n") + "\n".join(f"- {item}" for item in items)
    else:
        answer = ", ".join(items[:-1]) + f" and {items[-1]}."
        answer = w.choose(answer[:1].upper() + answer[1:], f"Here are {ONES[n]} {what}: {answer}")
    c.turns += [("user", casual(w, user[:1].upper() + user[1:])), ("assistant", answer)]


def describe(c: Chat) -> None:
    w = c.w
    thing = noun(w) if w.chance(0.75) else invented_word(w.rng)
    adj = w.choose("", "", w.pick("adj_thing"))
    user = w.raw(
        "[describe a {a} {t}|can you describe a {a} {t}?|what does a {a} {t} look like?|write a paragraph about a {a} {t}|write a few sentences about a {a} {t}|tell me about a {a} {t}|imagine a {a} {t}]",
        {"a": adj, "t": thing},
    )
    frames = [
        "it is {adj_thing} and {adj_thing}, with a little {adj_colour} at the edges.",
        "you can find it {at}, next to a {adj_thing} {objects}.",
        "when the {times} is {weathers}, it looks almost {adj_colour}.",
        "it smells of {mass_foods} and of {mass_foods}.",
        "a {people} once said that it was the most {adj_thing} {t} in {town}.",
        "if you listen closely, you can hear {noises}.",
        "some people think that it is {adj_thing}, but I find it {adj_thing2}.",
        "it makes me think of {themes}.",
        "nobody knows how old it is.",
        "it is as {adj_size} as a {objects} and as {adj_colour} as a {foods}.",
    ]
    chosen = w.rng.sample(frames, w.rng.randint(1, 2) if c.brief else w.rng.randint(2, 5))
    first = w.choose(
        "imagine a {a} {t}.",
        "the {t} is {adj_thing} and {adj_colour}.",
        "a {a} {t} is a {adj_thing} thing.",
        "there is a {a} {t} {at}.",
        "picture a {t} that is {adj_thing} and {adj_size}.",
    )
    c.say(
        user,
        w.fill(
            " ".join([first, *chosen]),
            {
                "a": adj,
                "t": thing,
                "at": w.pick("places").replace("|", " "),
                "town": w.pick("towns"),
                "adj_thing2": w.pick("adj_thing"),
            },
        ),
    )


def letter(c: Chat) -> None:
    w = c.w
    who = w.choose(
        "my " + w.pick("people"),
        w.pick("names_f"),
        w.pick("names_m"),
        "my friend " + w.pick("names_f"),
        "my boss",
        "my mother",
        "my teacher",
    )
    x = anything(w)
    kind = w.choose("letter", "letter", "email", "message", "note", "postcard")
    to = who.replace("my friend ", "").replace("my ", "").strip()
    user = w.raw(
        "[write a {k} to {w} about {x}|write {w} a {k} about {x}|can you write a {k} to {w} about {x}?|I need a {k} to {w} about {x}]",
        {"k": kind, "w": who, "x": x},
    )
    body = w.fill(
        "[I hope you are well.|How are you?|Thank you for your last letter.|It has been a long time.] I am writing to you about {x}. [I have thought about it a lot lately.|It is important to me.|There is some good news.|I would like to hear what you think.|It made me {feelings}.] [The weather here is {weathers}.|Yesterday I had to {jobs}.|Please tell me what you think.|]",
        {"x": x},
    )
    close = w.choose("Best wishes", "Yours", "Kind regards", "With love", "Your friend")
    c.say(user, f"Dear {to[:1].upper() + to[1:]},\n\n{body}\n\n{close}")


def word_in_sentence(c: Chat) -> None:
    w = c.w
    thing = noun(w) if w.chance(0.7) else invented_word(w.rng)
    user = w.raw(
        '[use the word {t} in a sentence|write a sentence with the word {t}|make a sentence with {t}|give me a sentence with "{t}"|write one sentence about a {t}|can you put {t} in a sentence?]',
        {"t": thing},
    )
    c.say(
        user,
        w.fill(
            "[the {people} put the {t} next to the {objects}.|there was a {adj_thing} {t} {at}.|my {people} has a {t} that is {adj_thing} and {adj_colour}.|we saw a {t} on the way to the {place}.|without a {t}, it is hard to {jobs}.|the {adj_thing} {t} belonged to a {adj_character} {people}.|nobody knew where the {t} had come from.|she looked at the {t} and smiled.]",
            {"t": thing, "at": w.pick("places").replace("|", " "), "place": w.pick("places").split("|")[1]},
        ),
    )


def joke(c: Chat) -> None:
    w = c.w
    if w.chance(0.7):
        q, a = w.row("jokes")
        c.say(
            w.choose(
                "tell me a joke",
                "do you know a joke?",
                "make me laugh",
                "a joke please",
                "say something funny",
                "another joke",
                "can you tell me a joke?",
            ),
            f"{q} {a}",
        )
    else:
        q, a = w.row("riddles")
        c.say(
            w.choose(
                "tell me a riddle", "ask me a riddle", "do you know a riddle?", "a riddle please", "give me a riddle"
            ),
            f"Here is a riddle: {q}" if w.chance(0.5) else q,
        )
        c.say(
            w.choose("I give up", "what is it?", "tell me", "I don't know", "what is the answer?", "no idea"),
            f"[It is|The answer is|The answer:] {a[:1].lower() + a[1:]}".replace(
                "[It is|The answer is|The answer:]", w.choose("It is", "The answer is")
            ),
        )


# --- simple facts ---------------------------------------------------------------------------------


def question_answer(c: Chat) -> None:
    w = c.w
    q, a = w.row("qa")
    if w.chance(0.25):
        q = (
            q.replace("What is ", "What's ")
            .replace("Who is ", "Who's ")
            .replace("Where is ", "Where's ")
            .replace("cannot", "can't")
        )
    if w.chance(0.08):
        q = q.rstrip("?") + w.choose(" today?", " exactly?", " please?", " in one sentence?", " anyway?", " actually?")
    if w.chance(0.25):
        q = (
            w.choose(
                "tell me, ",
                "do you know: ",
                "I wonder, ",
                "quick question: ",
                "hey, ",
                "please tell me: ",
                "can you tell me? ",
            )
            + q[:1].lower()
            + q[1:]
        )
    c.say(q, a)


def definition(c: Chat) -> None:
    w = c.w
    term, meaning = w.row("definitions")
    mass = meaning.startswith(
        (
            "the ",
            "doing",
            "caring",
            "being",
            "telling",
            "food ",
            "words",
            "work ",
            "using",
            "changing",
            "handling",
            "sending",
            "frozen",
            "water ",
            "air ",
            "everything",
            "bad ",
            "what ",
            "sounds",
            "good or",
            "a programming",
            "how much",
        )
    )
    proper = term[0].isupper()
    a_term = term if mass or proper else article(term)
    user = w.raw(
        "[what is {a}?|what's {a}?|what is {a}?|explain {t}|define {t}|what does {t} mean?|what does the word {t} mean?|can you explain what {a} is?|tell me what {a} is|tell me about {a}|do you know what {a} is?|explain to me what {a} is|explain {a} in simple words|{t}?|what do you know about {a}?|explain in one sentence what {a} is]",
        {"a": a_term, "t": term},
    )
    start = a_term[:1].upper() + a_term[1:]
    verb = (
        "means"
        if meaning.startswith(("doing", "caring", "being", "telling", "using", "changing", "handling", "sending"))
        else "is"
    )
    answer = f"{start} {verb} {meaning}."
    if w.chance(0.15):
        answer = w.choose("Gladly. ", "That is easy. ", "Let me try. ") + answer
    c.say(user, answer)
    if w.chance(0.25):
        c.say(
            w.choose(
                "tell me more", "can you say more?", "more details please", "what else?", "give me an example", "why?"
            ),
            w.raw(
                "[That is nearly all I know about {t}.|I do not know much more about {t}, I am afraid.|I only know a little about {t}.] [Shall I tell you a story about it?|Would you like a poem about it?|]",
                {"t": term},
            ),
        )


def opposites(c: Chat) -> None:
    w = c.w
    a, b = w.row("opposites")
    if w.chance(0.3):
        a, b = b, a
        if sum(row[0] == a for row in table("opposites")) + sum(row[1] == a for row in table("opposites")) > 1:
            a, b = w.row("opposites")
    c.say(
        w.raw(
            "[what is the opposite of {a}?|what's the opposite of {a}?|opposite of {a}|the opposite of {a} is|tell me the opposite of {a}|give me the opposite of the word {a}]",
            {"a": a},
        ),
        w.raw("[The opposite of {a} is {b}.|The opposite of {a} is {b}.|It is {b}.|{b}.]", {"a": a, "b": b}),
    )


def capital(c: Chat) -> None:
    w = c.w
    country, city = w.row("capitals")
    kind = w.rng.random()
    if kind < 0.7:
        c.say(
            w.raw(
                "[what is the capital of {c}?|what's the capital of {c}?|capital of {c}|tell me the capital of {c}|which city is the capital of {c}?|do you know the capital of {c}?|name the capital of {c}]",
                {"c": country},
            ),
            w.raw(
                "[The capital of {c} is {t}.|The capital of {c} is {t}.|{t} is the capital of {c}.|{t}.]",
                {"c": country, "t": city},
            ),
        )
    elif kind < 0.85:
        c.say(f"where is {city}?", f"{city} is in {country}.")
    else:
        name = invented_word(w.rng).capitalize()
        c.say(
            f"what is the capital of {name}?",
            w.raw(
                "[I do not know the capital of {n}.|I am sorry, I have never heard of {n}.|I do not know a country called {n}.]",
                {"n": name},
            ),
        )


def animal_fact(c: Chat) -> None:
    w = c.w
    animal, sound, home, food, baby = w.row("animal_facts")
    many = plural(animal)
    kind = w.rng.randrange(5)
    if kind == 0:
        c.say(
            w.raw(
                "[what sound does a {a} make?|what does a {a} say?|what noise does a {a} make?|how does a {a} sound?]",
                {"a": animal},
            ),
            f"A {animal} {sound}.",
        )
    elif kind == 1:
        c.say(
            w.raw(
                "[where does a {a} live?|where do {m} live?|where can I find a {a}?|what is the home of the {a}?]",
                {"a": animal, "m": many},
            ),
            f"{many[:1].upper() + many[1:]} live {home}.",
        )
    elif kind == 2:
        c.say(
            w.raw(
                "[what does a {a} eat?|what do {m} eat?|what food do {m} like?|what should I feed a {a}?]",
                {"a": animal, "m": many},
            ),
            f"{many[:1].upper() + many[1:]} eat {food}.",
        )
    elif kind == 3:
        c.say(
            w.raw(
                "[what is a baby {a} called?|what do you call a baby {a}?|what is a young {a} called?]", {"a": animal}
            ),
            w.raw(f"A [baby|young] {animal} is called a {baby}.", {}),
        )
    else:
        c.say(
            w.raw(
                "[tell me about {m}|what is a {a}?|what do you know about {m}?|tell me something about the {a}|tell me a fact about {m}]",
                {"a": animal, "m": many},
            ),
            w.raw(
                f"A {animal} is an animal that lives {home}. It eats {food}. A baby {animal} is called a {baby}.", {}
            ),
        )


def colour(c: Chat) -> None:
    w = c.w
    thing, hue = w.row("thing_colours")
    verb = "are" if thing.endswith("s") and not thing.startswith(("a ", "the ", "grass")) else "is"
    kind = w.rng.random()
    if kind < 0.6:
        c.say(w.raw("what [colour|color|colour] {v} {t}?", {"t": thing, "v": verb}), f"{thing} {verb} {hue}.")
    elif kind < 0.8:
        c.say(f"{verb} {thing} {hue}?", f"yes, {thing} {verb} {hue}.")
    else:
        wrong = w.pick("adj_colour")
        if wrong not in hue and "bright" not in wrong:
            c.say(f"{verb} {thing} {wrong}?", f"no, {thing} {verb} {hue}.")


def where(c: Chat) -> None:
    w = c.w
    things, at = w.row("where_found")
    c.say(
        w.raw(
            "[where do you find {t}?|where can I find {t}?|where would you look for {t}?|where are {t} found?|where should I look for {t}?]",
            {"t": things},
        ),
        w.raw("[You can find {t} {a}.|You find {t} {a}.|Look for it {a}.|Usually {a}.]", {"t": things, "a": at}),
    )


def howto(c: Chat) -> None:
    w = c.w
    task, *steps = w.row("howto")
    user = w.raw(
        "[how do you {t}?|how do I {t}?|how can I {t}?|how to {t}|tell me how to {t}|can you explain how to {t}?|explain how to {t}|what is the best way to {t}?|I want to {t}. how do I begin?|teach me how to {t}]",
        {"t": task},
    )
    if w.chance(0.4):
        answer = w.choose("", f"This is how you {task}:\n", f"To {task}, follow these steps:\n") + "\n".join(
            f"{i}. {s}" for i, s in enumerate(steps, 1)
        )
    else:
        first, second, third, fourth = (s[:1].lower() + s[1:] for s in steps)
        answer = f"{w.choose('First', 'To begin,')} {first} {w.choose('Then', 'Next,')} {second} {w.choose('After that,', 'Then')} {third} {w.choose('Finally,', 'In the end,', 'Last of all,')} {fourth}"
    c.turns += [("user", casual(w, polish(user))), ("assistant", answer)]


def arithmetic(c: Chat) -> None:
    w = c.w
    rng = w.rng
    op = rng.choice("++--*/")
    top = rng.choice([10, 10, 20, 20, 50])
    if op == "+":
        a, b = rng.randint(0, top), rng.randint(0, top)
        result, word = a + b, "plus"
    elif op == "-":
        a = rng.randint(0, top)
        b = rng.randint(0, a)
        result, word = a - b, "minus"
    elif op == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result, word = a * b, "times"
    else:
        b, result = rng.randint(1, 10), rng.randint(0, 10)
        a, word = b * result, "divided by"
    small = max(a, b, result) <= 20
    if small and w.chance(0.25):
        c.say(
            w.raw(f"[what is|how much is|tell me|] {ONES[a]} {word} {ONES[b]}?", {}),
            f"{ONES[a]} {word} {ONES[b]} is {ONES[result]}.",
        )
    else:
        form = w.choose(f"{a} {op} {b}", f"{a}{op}{b}", f"{a} {word} {b}")
        c.say(
            w.raw(f"[what is|what's|calculate|how much is|compute|] {form}[?| =|]", {}),
            w.choose(
                f"{a} {op} {b} = {result}", f"{a} {word} {b} is {result}.", f"{a} {op} {b} is {result}.", f"{result}"
            ),
        )


def calendar(c: Chat) -> None:
    w = c.w
    names, unit = (DAYS, "day") if w.chance(0.5) else (MONTHS, "month")
    i = w.rng.randrange(len(names))
    x, after, before = names[i], names[(i + 1) % len(names)], names[i - 1]
    if w.chance(0.5):
        c.say(
            w.raw(
                f"[what {unit} comes after {x}?|which {unit} is after {x}?|what comes after {x}?|what is the {unit} after {x}?]",
                {},
            ),
            f"{after} comes after {x}.",
        )
    elif w.chance(0.6):
        c.say(
            w.raw(f"[what {unit} comes before {x}?|which {unit} is before {x}?|what comes before {x}?]", {}),
            f"{before} comes before {x}.",
        )
    else:
        c.say(
            f"if today is {DAYS[i % 7]}, what day is tomorrow?",
            f"If today is {DAYS[i % 7]}, tomorrow is {DAYS[(i + 1) % 7]}.",
        )


def count(c: Chat) -> None:
    w = c.w
    low = 1 if w.chance(0.85) else w.rng.randint(2, 30)
    high = low + w.rng.choice([2, 4, 4, 9, 9, 9, 11, 14, 19, 19, 24, 29, 49, 99])
    numbers = list(range(low, high + 1))
    end = w.choose(str(high), ONES[high] if high <= 20 else str(high))
    if low == 1:
        user = w.raw(
            "[count to {e}|count from 1 to {e}|can you count to {e}?|please count to {e}|count up to {e}|count from one to {e}|list the numbers from 1 to {e}]",
            {"e": end},
        )
    else:
        user = w.raw("[count from {l} to {e}|list the numbers from {l} to {e}]", {"l": str(low), "e": end})
    if w.chance(0.15):
        user, numbers = f"count backwards from {high} to {low}", numbers[::-1]
    if high <= 20 and w.chance(0.2):
        answer = ", ".join(ONES[n] for n in numbers) + "."
    else:
        answer = w.choose(", ", ", ", ", ", " ", "\n").join(map(str, numbers))
        if "\n" not in answer and w.chance(0.5):
            answer += "."
    c.turns += [("user", casual(w, user[:1].upper() + user[1:] + ".")), ("assistant", answer[:1].upper() + answer[1:])]


def rhyme(c: Chat) -> None:
    w = c.w
    group = w.pick("rhymes").split()
    first = w.rng.choice(group)
    others = [x for x in group if x != first]
    c.say(
        w.raw(
            "[what rhymes with {a}?|give me a word that rhymes with {a}|find a rhyme for {a}|a rhyme for {a}]",
            {"a": first},
        ),
        f"{w.rng.choice(others)[:].capitalize()} rhymes with {first}.",
    )


def echo(c: Chat) -> None:
    """Copying: the answer is a part of the question, letter by letter."""
    w = c.w
    rng = w.rng
    kind = rng.random()
    if kind < 0.12:
        text = w.choose(
            "hello",
            "yes",
            "no",
            "ok",
            "goodbye",
            "hi",
            "thank you",
            "hello world",
            "test",
            "pong",
            "please",
            w.pick("verbs"),
            w.pick("feelings"),
            w.pick("names_m"),
            invented_word(rng),
            w.pick("adj_thing"),
        )
    elif kind < 0.4:
        text = " ".join(invented_word(rng) if w.chance(0.4) else noun(w) for _ in range(rng.randint(1, 6)))
    elif kind < 0.8:
        text = w.fill(
            "[the {adj_thing} {objects} is {adj_colour}|I like {mass_foods}|the {people} {verbs_move+ed} to the {objects}|all is well|{names_f} and {names_m} are friends|the {animals} has a {objects}|my {people} can {skills}|{morals}]"
        )
    else:
        text = (
            str(rng.randint(0, 99999))
            if w.chance(0.5)
            else invented_word(rng).capitalize() + " " + str(rng.randint(1, 999))
        )
    user = w.raw(
        "[say {q}|repeat after me: {t}|repeat: {t}|please say {q}|say exactly this: {t}|echo {t}|write {q}|repeat this sentence: {t}|can you say {q}?|reply with {q}|answer with the word {q}|just say {q}]",
        {"q": w.choose(f'"{text}"', text), "t": text},
    )
    c.turns += [("user", user[:1].upper() + user[1:] if w.chance(0.6) else user), ("assistant", text)]


def compare(c: Chat) -> None:
    w = c.w
    order = [
        "ant",
        "bee",
        "snail",
        "mouse",
        "frog",
        "hedgehog",
        "rabbit",
        "cat",
        "fox",
        "dog",
        "sheep",
        "pig",
        "wolf",
        "lion",
        "cow",
        "horse",
        "camel",
        "rhino",
        "elephant",
        "whale",
    ]
    i, j = sorted(w.rng.sample(range(len(order)), 2))
    small, large = order[i], order[j]
    a, b = (small, large) if w.chance(0.5) else (large, small)
    if w.chance(0.5):
        c.say(
            w.raw("[which|what] is [bigger|larger], a {a} or a {b}?", {"a": a, "b": b}),
            f"a {large} is bigger than a {small}.",
        )
    else:
        c.say(
            f"is a {a} {w.choose('bigger', 'smaller')} than a {b}?"
            if (bigger := w.chance(0.5)) is None
            else f"is a {a} {'bigger' if bigger else 'smaller'} than a {b}?",
            f"{'yes' if bigger == (a == large) else 'no'}, a {a} is {'bigger' if a == large else 'smaller'} than a {b}.",
        )


def as_json(c: Chat) -> None:
    w = c.w
    name, _ = draw_name(w, w.pick("people"))
    fields = {
        "name": f'"{name}"',
        "age": str(w.rng.randint(5, 90)),
        "job": f'"{w.pick("people")}"',
        "town": f'"{w.pick("towns")}"',
        "colour": f'"{w.pick("adj_colour")}"',
        "animal": f'"{w.pick("animals")}"',
        "food": f'"{w.pick("mass_foods")}"',
        "city": f'"{w.pick("capitals").split("|")[1]}"',
    }
    keys = w.rng.sample(list(fields), w.rng.randint(1, 4))
    asked = " and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]
    user = w.raw(
        "[give me a JSON object with {k}|write JSON with the fields {k}|reply in JSON with {k}|make a json object with {k}|output JSON with the keys {k}|describe a person as JSON with {k}]",
        {"k": asked},
    )
    c.turns += [
        ("user", casual(w, user[:1].upper() + user[1:])),
        ("assistant", "{" + ", ".join(f'"{k}": {fields[k]}' for k in keys) + "}"),
    ]


# --- things it cannot do --------------------------------------------------------------------------


def unknown(c: Chat) -> None:
    """Honest answers to questions that are too hard, always about the user's own words."""
    w = c.w
    topic = w.choose(
        w.pick("unknown_topics"),
        invented_word(w.rng),
        invented_word(w.rng).capitalize(),
        f"{invented_word(w.rng)} {noun(w)}",
        f"{invented_word(w.rng)} {invented_word(w.rng)}",
        f"the {w.pick('adj_thing')} {noun(w)}",
        f"{invented_word(w.rng)} and {invented_word(w.rng)}",
        f"the {invented_word(w.rng)} of {invented_word(w.rng).capitalize()}",
        f"{w.choose(w.pick('adj_thing'), w.pick('adj_thing'), w.pick('verbs') + 'ed', invented_word(w.rng))} {w.row('definitions')[0]}",
        f"{w.row('definitions')[0]} {noun(w)}",
    )
    user = w.raw(
        "[what is {t}?|explain {t}|tell me about {t}|what do you know about {t}?|can you explain {t} to me?|how does {t} work?|why is {t} important?|what do you think about {t}?|who invented {t}?|when did {t} begin?|give me a summary of {t}|what is the difference between {t} and {u}?|write an essay about {t}|compare {t} and {u}|how much does {t} cost?|is {t} good?|what is the best {t}?|how do I install {t}?|how can I fix {t}?|where can I buy {t}?|please help me with {t}|who won {t}?|how many people like {t}?|describe the history of {t}|explain in detail how {t} works|should I use {t}?|what are the advantages of {t}?]",
        {"t": topic, "u": anything(w)},
    )
    c.say(
        user,
        w.raw(
            "[I am sorry, I do not know much about {t}.|I do not know anything about {t}, I am afraid.|That is too hard for me. I am a very small model, and I do not know about {t}.|I wish I could tell you about {t}, but I am only a small model.|I am not sure about {t}.|I have never learned about {t}.|Sorry, {t} is beyond me.] [Shall I tell you a story about it?|Would you like a story or a poem instead?|You could ask a larger model, or look in a book.|I know more about animals and simple things.|Please ask me something simpler.|]",
            {"t": topic},
        ),
    )


def open_question(c: Chat) -> None:
    """Questions and orders of every shape, which only need a polite way out."""
    w = c.w
    rng = w.rng

    def new() -> str:
        return w.choose(
            invented_word(rng),
            invented_word(rng).capitalize(),
            noun(w),
            "the " + noun(w),
            invented_word(rng) + " " + noun(w),
        )

    context = {
        "t": new,
        "u": new,
        "n": lambda: str(rng.randint(2, 2050)),
        "v": lambda: w.choose(w.pick("verbs"), w.pick("verbs"), invented_word(rng)),
        "adj": lambda: w.choose(
            "tall",
            "old",
            "long",
            "deep",
            "heavy",
            "big",
            "fast",
            "wide",
            "far",
            "expensive",
            "good",
            "hot",
            "cold",
            "many",
            "popular",
        ),
    }
    if w.chance(0.5):
        user = w.raw(
            "[how {adj} is {t}?|how {adj} is the {adj_thing} {t}?|who won the {n} {t}?|who won {t} in {n}?|who discovered {t}?|who is {t}?|who was the first {t}?|when was {t} built?|when was {t} born?|what happened in {n}?|what is the {adj_thing} {t} of {u}?|what is the {t} of {u}?|what is the population of {t}?|why did {t} {v} {u}?|why does {t} {v}?|why do people {v} {t}?|how do I {v} {t} with {u}?|how does {t} {v} {u}?|how many {t} are in {u}?|which {t} is the best for {u}?|is it true that {t} {v+ed} {u}?|does {t} {v} {u}?|did {t} {v} in {n}?|can {t} {v} {u}?|will {t} {v} {u}?|what does {t} {v}?|what are the main {t+s} of {u}?|what should a {people} know about {t}?|where is {t}?|where was {t} {v+ed}?|what year did {t} {v}?]",
            context,
        )
        answer = w.raw(
            "[I am sorry, I do not know that.|I do not know the answer to that.|That is a good question, but I do not know the answer.|I am not sure. I am only a small model.|That is more than I know, I am afraid.|I have never learned that.|I wish I knew.] [Please ask me something simpler.|I know more about animals and simple things.|Shall I tell you a story instead?|You could look in a book.|A larger model may know.|]",
            {},
        )
    else:
        user = w.raw(
            "[summarize|summarise|rewrite|improve|classify|analyse|shorten|sort|correct|check|review|proofread|solve|prove|draw|book|order|search for|open|send|call|find|plan|design|fix|compute|extract|convert|build|buy|play|show me|create|generate|evaluate|debug|optimize|refactor|implement|paraphrase|run] ",
            {},
        )
        user += w.raw(
            "[the {t}|a {t}|my {t}|this {t}|the {t} of {u}|the plot of {t}|the {t} in {u}|a {t} that {v+s} a {u}|a {t} that {v+s} the {u}|{t} and {u}|a {adj_thing} {t}|the {n} {t}|{n} {t+s}|a {t} for {u}|all {t+s} by {u}|the following text: {t} {v+s} {u}|a function that {v+s} a {u}|a {t} with {u}|a plan for {t}]",
            context,
        )
        user = w.choose("", "", "please ", "can you ", "could you ", "help me to ") + user
        answer = w.raw(
            "[I am afraid that is too hard for me.|I cannot do that. I am only a small model.|I am sorry, I cannot do that.|That is beyond a model of my size.|I wish I could, but I am too small for that.|I cannot do that, I am afraid.] [I can tell a story, write a short poem or make a list.|Shall I tell you a story instead?|Please ask me something simpler.|But I can answer simple questions.|]",
            {},
        )
    c.say(user, answer)


def what_should_i(c: Chat) -> None:
    """Small everyday advice."""
    w = c.w
    kind = w.rng.randrange(4)
    when = w.choose(
        "",
        "tonight",
        "today",
        "tomorrow",
        "this evening",
        "for my friends",
        "for dinner",
        "on Sunday",
        "this weekend",
        "when it rains",
    )
    if kind == 0:
        c.say(
            w.raw(
                "[what should I cook {w}?|what should I eat {w}?|what can I make {w}?|what is for dinner?|what shall we eat {w}?|I am hungry|suggest a meal {w}|what could I bake {w}?]",
                {"w": when},
            ),
            w.raw(
                "[How about {mass_foods} with {mass_foods}?|You could make {mass_foods} and a {foods}.|I would choose {mass_foods}.|Perhaps some {mass_foods}, and a {foods} after that.]",
                {},
            ),
        )
    elif kind == 1:
        c.say(
            w.raw(
                "[what should I do {w}?|what can I do {w}?|I am bored|I have nothing to do {w}|suggest something to do {w}|any plans {w}?]",
                {"w": when},
            ),
            w.raw(
                "[You could {skills}, or just rest.|How about {hobbies}?|You could {jobs} and then eat some {mass_foods}.|Invite a friend and try {hobbies}.]",
                {},
            ),
        )
    elif kind == 2:
        c.say(
            w.raw("[what should I wear {w}?|which clothes should I take?|what should I put on {w}?]", {"w": when}),
            w.raw(
                "[A {adj_colour} scarf and a warm coat, I think.|Take a {adj_colour} hat, and an umbrella if it rains.|Something {adj_colour} and comfortable.]",
                {},
            ),
        )
    else:
        c.say(
            w.raw(
                "[what should I read {w}?|what should I watch {w}?|recommend a book|suggest a film {w}|which book should I read {w}?]",
                {"w": when},
            ),
            w.raw(
                "[Perhaps a story about {themes}.|How about something about a {animals} and a {objects}?|I would look for a tale of a {adj_character} {people}.]",
                {},
            ),
        )


def pasted(c: Chat) -> None:
    """A long text in the prompt, with a question about it."""
    w = c.w
    _, topic = story_topic(w)
    told = tell(w, topic, w.choose("short", "medium"))
    w.begin()
    kind = w.rng.randrange(4)
    if kind == 0:
        ask, answer = (
            "[who is this story about?|who is the hero of this story?|what is the name of the hero?|who is the main character?]",
            f"The story is about {told.hero_name}, a {told.hero}.",
        )
    elif kind == 1:
        ask, answer = (
            "[where does it take place?|where does the story begin?|where does {h} live?]".replace(
                "{h}", told.hero_name
            ),
            f"The story begins {told.at}.",
        )
        if told.at not in told.text:
            return
    else:
        ask, answer = (
            "[what is this story about?|summarize this story|summarise this text|give me a summary|summarize:|what is this text about?|tell me in one sentence what this is about]",
            f"It is about a {told.hero} named {told.hero_name}"
            + (f" and a {told.thing}." if told.thing in told.text else "."),
        )
    ask = polish(w.raw(ask, {}))
    user = f"{ask}\n\n{told.text}" if w.chance(0.5) else f"{told.text}\n\n{ask}"
    c.turns += [("user", user), ("assistant", polish(answer))]


def refuse_code(c: Chat) -> None:
    w = c.w
    lang = w.choose("Python", "Java", "C", "Rust", "JavaScript", "Go", "bash", "SQL", "HTML", invented_word(w.rng))
    what = w.choose(
        "a function",
        "a program",
        "a script",
        "a loop",
        "a class",
        "a web server",
        "a game",
        "a unit test",
        "hello world",
        "a query",
        "a function that adds two numbers",
        "a program that sorts a list",
        "code",
        f"a function that {third_person(w.pick('verbs'))} a {noun(w)}",
        f"a {w.choose('program', 'class', 'script', 'function')} to {w.pick('verbs')} {plural(noun(w))}",
        f"a function to {invented_word(w.rng)}",
    )
    c.say(
        w.raw(
            "[write {w} in {l}|write a {l} function that {v} a {o}|write a {l} program that {v} {o}|write a {l} script to {b} a {o}|write {w}|implement {w}|how do I {b} a {o} in {l}?|can you write {w} in {l}?|show me {w} in {l}|I need {w} in {l}|how do I write {w} in {l}?|fix my {l} code|write {l} code for a {o}]",
            {
                "w": what,
                "l": lang,
                "o": w.choose(noun(w), invented_word(w.rng)),
                "v": third_person(w.pick("verbs")),
                "b": w.pick("verbs"),
            },
        ),
        w.raw(
            "[I am too small to write code in {l}.|I am sorry, I cannot write code.|{l} is too hard for me, I am afraid.|I cannot program, not even in {l}.] [I can tell you a story about a {people} instead.|Please ask me something simpler.|But I can tell a story or make a list.|]",
            {"l": lang},
        ),
    )


def translate(c: Chat) -> None:
    w = c.w
    language = w.choose(
        "French",
        "German",
        "Spanish",
        "Italian",
        "Chinese",
        "Japanese",
        "Arabic",
        "Latin",
        "Russian",
        "Portuguese",
        "Dutch",
        "Polish",
        "Hindi",
    )
    c.say(
        w.raw(
            "[translate {t} into {l}|how do you say {t} in {l}?|what is {t} in {l}?|answer in {l}|speak {l} please|do you speak {l}?]",
            {"t": w.choose(noun(w), '"' + noun(w) + '"'), "l": language},
        ),
        w.raw(
            "[I only know English, so I cannot help with {l}.|I am sorry, I do not speak {l}.|{l} is a beautiful language, but I only know English.]",
            {"l": language},
        ),
    )


FOREIGN = (
    "bonjour, comment ça va ?",
    "hola, ¿qué tal?",
    "Guten Tag, wie geht es dir?",
    "Привет, как дела?",
    "你好",
    "こんにちは",
    "안녕하세요",
    "مرحبا",
    "olá",
    "ciao, come stai?",
    "γειά σου",
    "नमस्ते",
    "zażółć gęślą jaźń",
    "où est la bibliothèque ?",
    "Wie heißt du?",
    "你叫什么名字？",
    "お元気ですか",
    "¿Cómo te llamas?",
    "Расскажи сказку",
    "讲个故事",
    "erzähl mir eine Geschichte",
    "raconte-moi une histoire",
)
EMOJI = [
    "😀",
    "😃",
    "😂",
    "🙂",
    "😉",
    "😍",
    "😭",
    "😡",
    "👍",
    "👋",
    "🙏",
    "🎉",
    "🔥",
    "❤️",
    "🌧️",
    "☀️",
    "⭐",
    "🌊",
    "🐱",
    "🐶",
    "🦊",
    "🐻",
    "🍎",
    "🍞",
    "☕",
    "🚀",
    "⚙️",
    "📚",
    "🎵",
    "💧",
]


def gibberish(c: Chat) -> None:
    w = c.w
    rng = w.rng
    kind = rng.random()
    if kind < 0.3:
        user = rng.choice(FOREIGN)
        answer = w.raw(
            "[I am sorry, I only understand simple English.|I only know English, I am afraid.|Sorry, I can only speak English.] [What can I do for you?|Could you say it in English?|]",
            {},
        )
    elif kind < 0.6:
        user = " ".join(rng.sample(EMOJI, rng.randint(1, 4)))
        answer = w.raw(
            "[What a nice picture!|I like little pictures, but words are easier for me.|I see!] [What would you like to talk about?|Shall I tell you a story?|Can you tell me more in words?]",
            {},
        )
    else:
        letters = "abcdefghijklmnopqrstuvwxyz    0123456789!?#-_/."
        user = (
            "".join(
                rng.choice(letters[: rng.choice([30, 26, len(letters)])]) for _ in range(rng.randint(3, 30))
            ).strip()
            or "x"
        )
        answer = w.raw(
            "[I do not understand that, I am afraid.|I am not sure what you mean.|I am sorry, I did not understand.|Hm, I do not know what that means.] [Could you say it in other words?|Can you ask in another way?|What would you like to know?|]",
            {},
        )
    c.turns += [("user", user), ("assistant", answer)]


def opinion(c: Chat) -> None:
    w = c.w
    x = anything(w)
    kind = w.rng.random()
    if kind < 0.5:
        c.say(
            w.raw(
                "[do you like {x}?|what do you think of {x}?|how do you feel about {x}?|are you interested in {x}?|do you know {x}?]",
                {"x": x},
            ),
            w.raw(
                "[I think {x} can be very interesting.|I like the sound of {x}.|I do not have feelings, but I like to write about {x}.|I have only read about {x} in stories.|Perhaps I would like {x}, if I were not a program.] [What about you?|Do you like {x}?|What do you think?|Shall I tell you a story about it?]",
                {"x": x},
            ),
        )
    else:
        a, b = noun(w), noun(w)
        c.say(
            w.raw(
                "[which is better, a {a} or a {b}?|would you rather have a {a} or a {b}?|should I buy a {a} or a {b}?|do you prefer a {a} or a {b}?|a {a} or a {b}?]",
                {"a": a, "b": b},
            ),
            w.raw(
                "[I would choose the {c}.|The {c}, I think.|That is a hard choice, but I would take the {c}.] [A {c} is {adj_thing}.|You never know when you may need a {c}.|It goes well with a {objects}.|]",
                {"c": w.choose(a, b)},
            ),
        )


def advice(c: Chat) -> None:
    w = c.w
    thing = w.choose(
        "my " + noun(w),
        "a name for my " + w.pick("animals"),
        "a present for my " + w.pick("people"),
        "dinner",
        "the weekend",
        "a rainy day",
        "my birthday",
    )
    if thing.startswith("a name"):
        answer = w.raw(
            "[How about {pet_names}?|{pet_names} is a good name.|You could choose {pet_names} or {names_m}.|I like {pet_names}.]",
            {},
        )
    elif thing.startswith("a present"):
        answer = w.raw(
            "[How about a {adj_thing} {objects}?|A {objects} is always nice.|You could give a {adj_thing} {objects} or a {foods}.|Perhaps a {objects}, with a ribbon around it.]",
            {},
        )
    elif thing == "dinner":
        answer = w.raw(
            "[How about {mass_foods} with {mass_foods}?|You could make {mass_foods} and a {foods}.|I would choose {mass_foods}.]",
            {},
        )
    elif thing.startswith("my ") and thing != "my birthday":
        answer = w.raw(
            "[You could {v} it.|First, look at {x} from all sides. Then you could {v} it.|Perhaps you should {v} it, and if that does not help, ask a {people}.|Be patient with {x}, and ask a {people} for help.]",
            {"v": w.pick("verbs_make"), "x": thing.replace("my ", "your ")},
        )
    else:
        answer = w.raw(
            "[You could {skills}, or just rest.|How about {hobbies}?|You could {jobs} and then eat some {mass_foods}.|Invite a friend and try {hobbies}.]",
            {},
        )
    c.say(
        w.raw(
            "[I need an idea for {t}|what should I do about {t}?|give me some advice about {t}|any ideas for {t}?|can you suggest something for {t}?|help me with {t}]",
            {"t": thing},
        ),
        answer,
    )


Intent = Callable[[Chat], None]
INTENTS: list[tuple[Intent, float]] = [
    (story, 14),
    (story_open, 4),
    (about_story, 3),
    (poem, 5),
    (make_list, 4),
    (describe, 4),
    (letter, 2),
    (word_in_sentence, 3),
    (joke, 1),
    (question_answer, 10),
    (definition, 9),
    (opposites, 3),
    (capital, 3),
    (animal_fact, 4),
    (colour, 2),
    (where, 2),
    (howto, 4),
    (arithmetic, 6),
    (calendar, 2),
    (count, 2),
    (rhyme, 1),
    (echo, 4),
    (compare, 1.5),
    (as_json, 1.5),
    (unknown, 6),
    (open_question, 8),
    (what_should_i, 1.5),
    (pasted, 1.5),
    (refuse_code, 1.5),
    (translate, 1),
    (gibberish, 2),
    (opinion, 3),
    (advice, 2),
    (greet, 2.5),
    (how_are_you, 1),
    (who_are_you, 1.5),
    (abilities, 1),
    (thanks, 1),
    (bye, 0.7),
    (short_reply, 1.5),
    (feelings, 2),
    (statement, 6),
    (memory, 3),
]


FACTS: list[Intent] = [
    definition,
    definition,
    capital,
    capital,
    animal_fact,
    colour,
    where,
    question_answer,
    question_answer,
    opposites,
    calendar,
    word_in_sentence,
    describe,
    count,
    arithmetic,
    poem,
]


def plain_facts(rng: random.Random) -> str:
    """Facts as running text, or as questions and answers, for completion without a chat."""
    c = Chat(Writer(rng))
    exchanges = rng.randint(1, 8)
    # An intent may decline (a colour that would have been right by chance), so count turns.
    while len(c.turns) < 2 * exchanges:
        rng.choice(FACTS)(c)
    pairs = [(c.turns[i][1], c.turns[i + 1][1]) for i in range(0, len(c.turns) - 1, 2)]
    if rng.random() < 0.25:
        first, second = rng.choice([("Question", "Answer"), ("Q", "A"), ("User", "Assistant")])
        return "\n\n".join(f"{first}: {q}\n{second}: {a}" for q, a in pairs)
    answers = [a for _, a in pairs if len(a.split()) > 3 and not a.startswith(("Yes", "No,", "I "))] or [pairs[0][1]]
    return rng.choice([" ", " ", "\n", "\n\n"]).join(answers)


def system_prompt(c: Chat) -> str | None:
    """Sometimes a system message; a few of them change the answers."""
    w = c.w
    roll = w.rng.random()
    if roll < 0.70:
        return None
    if roll < 0.80:
        c.name = w.choose(
            w.pick("names_f"), w.pick("names_m"), invented_word(w.rng)[:9].capitalize(), w.pick("pet_names")
        )
        return w.raw(
            "[You are {n}.|Your name is {n}.|You are {n}, a helpful assistant.|You are a friendly assistant called {n}.|You are {n}, a {people}.] [Be polite.|Answer in English.||]",
            {"n": c.name},
        ).strip()
    if roll < 0.88:
        c.brief = True
        return w.choose(
            "Be brief.",
            "Answer briefly.",
            "Keep your answers short.",
            "You are a helpful assistant. Be concise.",
            "Answer in one or two sentences.",
            "Short answers only, please.",
        )
    if roll < 0.91:
        rules = [
            "You are a helpful assistant.",
            "Answer in English.",
            "Be polite.",
            "Do not make things up.",
            "Write simple sentences.",
            "Stay calm and friendly.",
            "Never shout.",
            "If you do not know something, say so.",
        ]
        many = [
            w.fill(
                "[the user is a {people}.|the user likes {x}.|today is a {weathers} day.|you know about {x}.|never talk about {x}.|the office is {at}.|remember that {morals}.]",
                {"x": anything(w), "at": w.pick("places").replace("|", " ")},
            )
            for _ in range(w.rng.randint(2, 12))
        ]
        return " ".join(w.rng.sample(rules, w.rng.randint(2, 6)) + many)
    return w.raw(
        "[You are a helpful assistant.|You are a helpful, friendly assistant.|You are a {adj_character} storyteller.|You are a {people}.|You help people with {themes}.|You are millrace, a small model.|Answer the user's questions.|Be kind and polite.|You are an assistant for {x}.|The user is a {people}.|Today is a {weathers} day.]",
        {"x": anything(w)},
    )


def conversation(rng: random.Random) -> list[tuple[str, str]]:
    """One conversation as (role, text) pairs, the system message first if there is one."""
    c = Chat(Writer(rng))
    system = system_prompt(c)
    exchanges = rng.choices([1, 2, 3, 4, 5], [50, 22, 14, 9, 5])[0]
    intents, weights = zip(*INTENTS, strict=True)
    if exchanges > 1 and rng.random() < 0.3:
        greet(c)
    if c.name != "millrace" and rng.random() < 0.5:
        who_are_you(c)
    while len(c.turns) < 2 * exchanges:
        if c.story is not None and rng.random() < 0.5:
            about_story(c)
            continue
        rng.choices(intents, weights)[0](c)
    return ([("system", system)] if system else []) + c.turns
