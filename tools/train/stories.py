"""Short stories from a grammar: a cast, a wish, an obstacle, help, an ending.

A story is a list of beats. Every beat has several wordings, every wording has choices and
slots, and the words come from lists, so two stories rarely share more than a phrase.
"""

# ruff: noqa: E501 - templates read best on one line
from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.train.lexicon import Writer, invented_word, plural, words

OPENINGS = [
    "once upon a time, {at}, there lived {a_hero}.",
    "once upon a time there was {a_hero} who lived {at}.",
    "{a_hero} lived {at}, [not far from {town}|in a house with a {adj_colour} door|where the days were {adj_place} and slow|next to {a_friend_kind}].",
    "long ago, when the world was [younger|quieter|wider|slower], {a_hero} lived {at}.",
    "there was once {a_hero} who [loved to {skill}|wanted to {skill}|had never learned to {skill}|dreamed of {theme}|was known for {his} {adj_character} ways].",
    "one {weathers} {times}, {a_hero} [sat|stood|waited|woke up|was {walking}] {at}.",
    "in the village of {town} there lived {a_hero}.",
    "nobody {at} knew much about {H} the {k}, [except that {he} liked to {skill}|except that {he} was {char}|and nobody had ever asked].",
    "every {times}, {a_hero} used to {job} {at}.",
    "not so long ago, {at}, {a_hero} was [{walking} along|getting ready to {job}|looking for {a_food}|thinking about {theme}].",
    "{H} was a {char} {k} who lived {at}.",
    "it was a {weathers} {times} {at}, and {a_hero} had [nothing to do|a lot to do|an idea|a problem|a cold nose].",
    "this is the story of {a_hero}, who lived {at}.",
    "it was a dark and stormy night, and {a_hero} [could not sleep|was {walking} home|was afraid of {fears}|sat {at}].",
    "the {k} [sat|stood|waited|lived|had lost {his} way|was {walking}] {at}. {his} name was {H}.",
    "the {char} {k} {moved} [home|out of the door|along the road]. {his} name was {H}, and {he} lived {at}.",
    "one day, {a_hero} [woke up early|went for a walk|had an idea|lost {his} way] {at}.",
    "deep in the {place} lived {a_hero}.",
    "when {H} the {k} woke up, it was {weathers}, and [something was wrong|{he} felt {feelings}|the {animals+s} were singing].",
    '"who is there?" asked {H} the {k}. there was no answer, only {noises}.',
    '"{greet}," said {H} the {k}. nobody answered. it was a {weathers} {times} {at}.',
    "{H} the {k} opened the door and looked out. it was {weathers}.",
    "my {people} once told me about {a_hero}, who lived {at}.",
    "there was once a {o} that [nobody wanted|everybody wanted|could not be found|belonged to a {k}]. {a_hero} [had heard of it|wanted to find it|wished for it|found it] {at}.",
    "far away, beyond {town}, there was a {adj_place} {place}. {a_hero} lived there.",
]
TRAITS = [
    "{H} was {char} and {char2}, and {he} had [no brothers or sisters|many friends|only one friend|a very good memory|a secret].",
    "{he} was [not very {char2}|always a little {char2}|rather {char2} at times], but {he} was {char}.",
    "every [day|morning|evening], {he} liked to {job} and to {skill}.",
    "{his} [best friend|neighbour|cousin] was {a_friend}.",
    "people said that {H} was too {char2}, but {he} did not [mind|listen|care].",
    "{H} could {skill} better than anyone, but {he} was afraid of {fears}.",
    "{he} lived in a {adj_thing} house with a {adj_thing} {objects} and a {adj_thing} {objects}.",
    "{he} had a {adj_thing} {objects} that {he} had [found|made|bought|been given] when {he} was small.",
    "most of all, {he} loved {mass_foods} and {theme2}.",
    "{he} [often|always|never] [talked about {theme2}|worried about {fears}|thought about {theme2}].",
    "",
]
WEATHER = [
    "the {times} was {weathers}, and the wind [smelled of {mass_foods}|came from the north|was soft|had dropped|moved the leaves].",
    "outside it was {weathers} and {weathers}.",
    "the sun was [high|low|just coming up|going down|hidden behind a cloud].",
    "it had [rained|snowed|been dry|been windy] for {number} days.",
    "a few {colour} clouds moved slowly over the {place}.",
    "",
    "",
    "",
]
WENT = [
    "so {he} {moved} [out of the door|down the lane|along the path|over the hill|through the trees] until {he} came to {place2_the}.",
    "{hero} {moved} all [morning|day|afternoon], and {adverb} {he} {moved} on.",
    "{he} set off {adverb}, with a {adj_thing} {objects} and a bag of {mass_foods}.",
    "{he} {moved} past the {big_things}, past the {big_things}, and all the way to {place2_the}.",
    "first {he} went to {place2_the}, but there was nothing there except a {adj_thing} {objects}.",
    "{he} took {his} {objects}, closed the door, and {moved} {adverb} towards {place2_the}.",
]
MEET = [
    "{at2}, {he} met {a_friend}.",
    "on the way {he} met {a_friend}, who was busy [{making} a {objects}|looking for a {objects}|eating a {foods}|{walking} in circles].",
    "there, [under a tree|beside the path|behind a {big_things}|on a {adj_thing} {objects}], sat {a_friend}.",
    "just then {a_friend} came by.",
    "before long {he} heard {noises}. it was {a_friend}.",
]
HELLO = [
    '"{greet}," said {friend}. "{what_doing}"',
    '"{greet}! {what_doing}" asked {friend}.',
    '"you look {feelings}," said {friend}. "{what_doing}"',
    '{friend} {looked} and said, "{greet}. {what_doing}"',
]
OFFER = [
    '"I can help you," said {friend} {adverb}. "[two heads are better than one|I know this {place} well|I have nothing else to do today|you once helped my {people}]."',
    '"let us try together," said {friend}.',
    '"[wait here|come with me|do not worry|leave it to me]," said {friend}, and {fhe} {looked} {adverb}.',
    '{friend} thought for a while. "perhaps we could [ask the {people}|use my {objects}|look {at2}|begin again]," {fhe} said.',
    '"I am only a {fk}," said {friend}, "but I can {skill2}, and that may be useful."',
]
FEEL = [
    "{hero} felt {feelings}.",
    "{he} was so {feelings} that {he} could hardly [speak|stand still|eat|sleep].",
    "{hero} {looked}. {he} had never felt so {feelings}.",
    "{his} heart [beat faster|was heavy|was light|jumped].",
    "{he} was {feelings}, and a little {feelings}, too.",
    "for a moment {hero} said nothing at all.",
    "",
]
TRY_FAIL = [
    "first {he} tried to {v1} it, but it did not work. then {he} tried to {v2} it, and that was even worse.",
    "{he} tried once, {he} tried twice, and {he} tried a third time. each time something went wrong.",
    "{he} asked {ask1}, but {ask1} only {looked}. {he} asked {ask2}, but {ask2} [was too busy|did not know|was asleep|had gone to {town}].",
    "it was harder than {he} had thought. the {adj_thing} {objects} broke, and the {objects} was too {adj_size}.",
    "{he} worked until it was dark, and still it was not [right|done|good enough].",
    "for {number} days {he} tried, and for {number} nights {he} hardly slept.",
]
ENDINGS = [
    "and from that day on, {hero} and {friend} [were the best of friends|met every {times}|shared everything|were never apart|told the story to anyone who would listen].",
    "that night {hero} slept [well|soundly|like a stone], and {he} dreamed of {theme2}.",
    "{hero} went home {feelings}, and [{he} ate {mass_foods} by the fire|{he} told everyone about it|the stars came out one by one|the {big_things} looked smaller than before].",
    "they sat together {at} until the sun went down, eating {mass_foods} and laughing.",
    "and if you ever go to {town}, you may still see {him}, {walking} {at2}.",
    "everyone {at} [cheered|laughed|clapped|came to see], and there was {mass_foods} for all.",
    "since then {hero} has never been {feelings} for long.",
    'and {friend} said, "{moral}."',
    "and that was the end of the trouble {at}.",
    "{hero} {looked} and went {adverb} home. tomorrow would be another day.",
    "the {k} lived happily ever after, and so did {friend}.",
    "from then on, whenever someone was {feelings}, {hero} was the first to help.",
    "and to this day, {at}, people tell the tale of {hero} and {friend}.",
]
MORALS = [
    "{hero} had learned that {moral}.",
    "and so {hero} found out that {moral}.",
    "because, as {friend} liked to say, {moral}.",
    "the end.",
    "",
    "",
    "",
    "",
]
CHATTER = [
    '"do you think it will be {weathers} tomorrow?" asked {friend}. "I hope so," said {hero}, "because I want to {skill}."',
    '"what do you like best?" asked {hero}. "{mass_foods} and {theme2}," said {friend}. "and you?" "{theme}," said {hero}.',
    '"once I knew a {people} who could {skill2}," said {friend}. "{he_cap} was {feelings} all the time." "that is strange," said {hero}.',
    '"I was afraid of {fears} when I was little," said {friend}. "and now?" asked {hero}. "now I am only afraid of {fears}."',
    "they talked about {theme}, about {theme2}, and about the best way to {job}.",
    '"tell me about {theme2}," said {hero}. "there is not much to tell," said {friend}, "except that {moral}."',
    "for a while they said nothing and listened to {noises} in the distance.",
    "they shared a {foods} and some {mass_foods}, and they both felt better.",
    '"are you {feelings}?" asked {friend}. "only a little," said {hero}. "that is all right," said {friend}. "so am I."',
]
PROBLEM_LOST = [
    "one {times}, {hero} noticed that {his} {oa} {o} was gone. {he} looked under the {objects}, behind the {objects} and in the {objects}, but it was not there.",
    "{hero} had a {oa} {o} that {he} loved more than anything. but one {weathers} {times} it was lost.",
    'one day {hero} came home and found an empty place on the shelf. "my {o}!" {he} cried. "where is my {o}?"',
    "then a terrible thing happened: the {oa} {o} fell into the [river|well|snow|hole|sea] and disappeared.",
]
FOUND = [
    "and there it was, [under a {objects}|beside a {adj_thing} {objects}|in the {big_things}|at the bottom of a {objects}|in the arms of a sleepy {animals}]: the {oa} {o}!",
    "at last they found the {o} [in a nest|inside an old {objects}|near the {big_things}|where nobody had looked]. it was a little [wet|dusty|bent|dirty], but it was whole.",
    'a {animals} had picked up the {o} because it was so {oa}. "I am sorry," it said. "I thought that nobody wanted it." "{forgive}," said {hero}.',
    "{friend} saw something {colour} {at2}. it was the {o}! {hero} held it {adverb} and would not let it go.",
]
PROBLEM_MAKE = [
    "one day {hero} decided to [make|build|repair] a {o}. not just any {o}, but the finest {o} in the whole {place}.",
    '"what this place needs," said {hero} one {times}, "is a {oa} {o}." and {he} began to plan.',
    "{he} wanted to give {his} friend a {oa} {o}, but {he} had no money to buy one, so {he} had to make it.",
]
MAKE_STEPS = [
    "{he} took {number} {objects+s}, a piece of {adj_thing} string and a {objects}, and {he} {made} and {made} until {times}.",
    "first {he} {made} the {part}, then {he} {made} the {part}, and last of all {he} {made} the {part}.",
    "{friend} held the {objects} while {hero} worked with the {objects}. bit by bit the {o} grew.",
    "{friend} brought a {adj_thing} {objects}, and that was just what had been missing.",
]
MADE_END = [
    "when the {o} was finished, it was [a bit crooked|not perfect|bigger than they had planned|as {adj_colour} as a {foods}], but it was theirs.",
    'at last it stood there, {oa} and {adj_thing}. "that," said {friend}, "is the best {o} I have ever seen."',
    "they [tried|tested|showed] the {o} the very next {times}, and it worked.",
]
PROBLEM_FEAR = [
    "but {hero} had one great fear: {he} was afraid of {fear}. whenever {he} thought of it, {he} {looked} and wanted to hide.",
    "{hero} had never told anyone that {he} was afraid of {fear}.",
    'all the others laughed. "who is afraid of {fear}?" they said. {hero} was, and {he} could not help it.',
]
FEAR_TEST = [
    "then one {weathers} night, {noises} came from {place2_the}. someone needed help, and there was nobody else to go.",
    "one evening {friend} did not come home. {hero} knew what {he} had to do, although it meant facing {fear}.",
    "but the only way to the {oa} {o} led straight past the thing {he} feared.",
]
FEAR_END = [
    "step by step {he} went on. {his} knees shook, but {he} did not stop. and when it was over, {he} found that {fear} was not so terrible after all.",
    '"I am still afraid," said {hero}, "but I am doing it anyway." and that was the bravest thing of all.',
    "{he} [took a deep breath|held the {o} tightly|sang a little song|counted to ten] and went on. soon it was behind {him}.",
]
PROBLEM_JOURNEY = [
    'one day a {adj_thing} letter came. it said: "come to {place2_the} before the {number_ord} day, and bring a {o}."',
    "{hero} had always wanted to see {place2_the}. so one {times} {he} packed a {o}, some {mass_foods} and a {adj_thing} {objects}.",
    "in a {adj_thing} {objects}, {hero} found a map. a {colour} line led from the {place} to {place2_the}, and at the end of it somebody had drawn a {o}.",
]
JOURNEY_STEPS = [
    "the first day was {weathers}. {he} {moved} over {number} hills and slept under a {big_things}.",
    "the second day was {weathers}, and the road was {adj_place}. a {animals} showed {him} the way.",
    'on the third day {he} came to a {adj_place} river. there was no bridge, but there was a {people} with a boat.[| "you may cross," said the {people}, "if you can tell me a good story."| "you may cross," said the {people}, "if you can tell me what is worth more than a {objects}."]',
    "{he} [crossed a {adj_place} bridge|climbed a {adj_place} hill|walked through a {adj_place} wood] and did not look back.",
    "when {his} food was gone, a kind {people} gave {him} a {foods} and a cup of {mass_foods}.",
    "at night {he} heard {noises}, but in the morning there was only a {animals}.",
]
JOURNEY_END = [
    "at last {he} reached {place2_the}. it was [smaller|larger|quieter|more {adj_place}] than {he} had imagined, and {he} was {feelings}.",
    "and there, at the end of the road, the {o} began to shine. now {hero} understood why {he} had carried it so far.",
    '"you came," said {friend}. "I did not think that anyone would." and {fhe} {looked} {adverb}.',
]
PROBLEM_FRIEND = [
    "but {hero} was lonely. {he} had a {adj_thing} {objects} and a {adj_thing} {objects}, but nobody to share them with.",
    '"a {o} is a fine thing," {he} thought, "but you cannot talk to a {o}."',
    "the other {animals+s} and the {people+s} played together, but nobody asked {hero}.",
]
FRIEND_STEPS = [
    "{friend} was {fchar}, and {he} was {char}. at first they did not [understand each other|know what to say|agree about anything].",
    "{hero} shared {his} {foods}. {friend} showed {him} how to {skill2}.",
    "they quarrelled about a {o}, and for {number} days they did not speak. then {friend} brought a {foods} and said sorry.",
    "when it rained they sat under the same {big_things}, and when the sun shone they {moved} to {place2_the}.",
]
PROBLEM_HELP = [
    "one {weathers} {times}, {hero} heard {noises}. it was {a_friend}, who was stuck in a {big_things}.",
    'one {times}, {a_friend} came to the door. "please help me," said {friend}. "my {o} is broken, and without it I cannot {job}."',
    "the {people} of {town} was ill, and there was nobody to {job}.",
]
HELP_STEPS = [
    "{hero} pulled with all {his} strength, but {he} was too {adj_size}. so {he} called a {animals}, and the {animals} called the {people}, and they all pulled together.",
    "{hero} did not know how to {job}, but {he} learned. the first day {he} made {number} mistakes, the second day only one.",
    "{he} looked at the {o} for a long time. then {he} took a {objects} and {made} it {adverb}.",
    "{he} ran to fetch a {objects} and a {objects}, and {adverb} {he} began.",
]
HELP_END = [
    '"how can I thank you?" asked {friend}. "you do not have to," said {hero}. but the next day there was a {oa} {o} at {his} door.',
    "{friend} was {feelings}, and {hero} was {feelings}, too.",
    "years later, when {hero} needed help, {friend} was the first to come.",
]
PROBLEM_CONTEST = [
    "every year there was a great contest {at}, and this time the prize was a {oa} {o}. {hero} wanted to win it, but {he} had to {skill}.",
    '"the best of all shall have the {o}," said the {people}. {hero} had never won anything.',
]
CONTEST_STEPS = [
    "{he} practised every {times}. {he} practised when it was {weathers} and when it was {weathers}.",
    "there was {a_friend}, who could {skill2} very well. there was a {char2} {people}, and there was a {adj_size} {animals} with a {adj_thing} {objects}.",
    "when the [bell|whistle|drum] sounded, everyone began. {hero} was [slow at first|ahead at first|in the middle], and then {he} saw that {friend} had fallen.",
    "{he} could have gone on. but {he} stopped, turned round, and helped {friend} to {fhis} feet.",
]
CONTEST_END = [
    "{he} did not win. but the {people} gave {him} the {o} anyway, because {moral}.",
    "in the end they came in together, and the prize was cut in two. half a {o} is not much use, but they were both {feelings}.",
    "to everyone's surprise, {hero} won. {he} gave the {o} to {friend}, who needed it more.",
]
PROBLEM_MYSTERY = [
    "something strange was happening {at}. every night somebody took a {foods} and left a {o}.",
    "one {weathers} {times} a {oa} {o} appeared {at}. nobody knew who had put it there.",
    "each night {hero} heard {noises}, and each morning the {o} stood in a different place.",
]
MYSTERY_STEPS = [
    "{hero} decided to find out. {he} sat behind a {big_things} with a {objects} and waited.",
    "there were {adj_size} footprints, and they led [to {place2_the}|past the {big_things}|in a circle|up a tree].",
    '"was it you?" {he} asked the {animals}. "no," said the {animals}, "I was asleep." "was it you?" {he} asked the {people}. "not me," said the {people}.',
    "at midnight {he} saw a {colour} light. it moved {adverb} between the trees.",
]
MYSTERY_END = [
    'it was {a_friend}! "I only wanted to [help|surprise you|say thank you|find someone to talk to]," said {friend}. so the mystery was solved.',
    "and who was it? only {a_friend}, {fwalking} in {fhis} sleep with the {o} in {fhis} arms.",
]
PROBLEM_WISH = [
    'one {times}, {hero} rubbed a {oa} {o}, and a {adj_size} {creatures} came out of it. "you have one wish," it said.',
    "{he} saw a falling star and made a wish: {he} wished for a {oa} {o}.",
    'the old {people} gave {him} a {oa} {o}. "it can grant one wish," said the {people}. "use it wisely."',
]
WISH_STEPS = [
    "{hero} thought of gold, and {he} thought of {mass_foods}. {he} thought of being {adj_size}, and {he} thought of {theme}.",
    "all night {he} lay awake. should {he} wish for a {big_things}? should {he} wish to {skill}?",
    "then {he} met {a_friend}, who was {feelings} because of {fears}.",
]
WISH_END = [
    '"I wish," said {hero}, "that {friend} may be happy." the {o} glowed once, and then it was only a {o} again.',
    "in the end {he} did not use the wish at all. {he} kept it for {theme2}, and it is still waiting.",
    '{he} wished for a friend. the {creatures} {looked}. "you already have one," it said.',
]
PROBLEM_LEARN = [
    '{hero} wanted to learn to {skill}. "a {k} cannot {skill}," said the {people}. but {hero} was {char}.',
    "there was only one thing that {hero} wished for: {he} wanted to {skill}.",
]
LEARN_STEPS = [
    '{he} asked {a_friend}, who could {skill} very well. "it is easy," said {friend}. "you only have to [start|practise every day|forget that you are afraid|listen|use a {o}]."',
    "the first time {he} {looked} and fell over a {objects}. the second time {he} broke a {objects}. everyone laughed.",
    "{he} practised in the {times} and {he} practised at night. {he} practised until the {animals+s} covered their ears.",
    "{friend} lent {him} a {oa} {o}, and that helped a little.",
]
LEARN_END = [
    "and one {weathers} {times} it happened: {hero} could {skill}! {he} could hardly believe it.",
    'the {people} watched {him} and {looked}. "I was wrong," said the {people}.',
]
THEME_LINES = [
    "{hero} often thought about {theme}.",
    "everyone {at} was talking about {theme}.",
    '"what do you know about {theme}?" {hero} asked. "not much," said the others.',
    "more than anything, {hero} wanted to understand {theme}.",
    'there was one word that {hero} liked best of all, and that was "{theme}".',
    "it all began with {theme}.",
]
THEME_ENDS = [
    "now {hero} knew a little more about {theme}.",
    "and that is all there is to say about {theme}.",
    "{hero} still thinks of {theme} every day.",
    "and so it was that {theme} came {at} to stay.",
    'and when somebody asks about {theme}, {hero} smiles and says, "sit down, and I will tell you."',
]

SCHEMES: list[list[list[str]]] = [
    [PROBLEM_LOST, FEEL, WENT, MEET, HELLO, OFFER, TRY_FAIL, CHATTER, FOUND, FEEL],
    [PROBLEM_MAKE, TRY_FAIL, FEEL, MEET, HELLO, OFFER, MAKE_STEPS, CHATTER, MAKE_STEPS, MADE_END],
    [PROBLEM_FEAR, MEET, HELLO, CHATTER, FEAR_TEST, FEEL, WENT, FEAR_END],
    [PROBLEM_JOURNEY, FEEL, JOURNEY_STEPS, JOURNEY_STEPS, MEET, HELLO, CHATTER, JOURNEY_STEPS, JOURNEY_END],
    [PROBLEM_FRIEND, FEEL, WENT, MEET, HELLO, FRIEND_STEPS, CHATTER, FRIEND_STEPS, FRIEND_STEPS],
    [PROBLEM_HELP, FEEL, HELP_STEPS, CHATTER, HELP_STEPS, HELP_END],
    [PROBLEM_CONTEST, FEEL, CONTEST_STEPS, CHATTER, CONTEST_STEPS, CONTEST_STEPS, CONTEST_END],
    [PROBLEM_MYSTERY, FEEL, MYSTERY_STEPS, MEET, HELLO, OFFER, MYSTERY_STEPS, MYSTERY_END],
    [PROBLEM_WISH, FEEL, WISH_STEPS, CHATTER, WISH_STEPS, WISH_END],
    [PROBLEM_LEARN, FEEL, LEARN_STEPS, LEARN_STEPS, CHATTER, TRY_FAIL, LEARN_END],
]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "a hundred"]


@dataclass
class Topic:
    """What a story has to be about. Every field is optional."""

    hero: str | None = None
    hero_adj: str | None = None
    name: str | None = None
    clause: str | None = None
    friend: str | None = None
    friend_name: str | None = None
    thing: str | None = None
    thing_adj: str | None = None
    at: str | None = None
    theme: str | None = None
    pair: bool = False
    """Whether the heroes are two of a kind, as in "two brothers"."""


@dataclass
class Story:
    """A finished story and the facts that later questions may ask about."""

    text: str
    hero: str
    hero_name: str
    friend: str
    friend_name: str
    thing: str
    at: str
    moral: str
    paragraphs: list[str] = field(default_factory=list)


def draw_name(w: Writer, kind: str) -> tuple[str, str]:
    """A name and a pronoun (he, she or it) for a character of the given kind."""
    female = {
        "grandmother",
        "aunt",
        "girl",
        "old woman",
        "young woman",
        "princess",
        "queen",
        "witch",
        "mermaid",
        "fairy",
        "widow",
        "niece",
        "sister",
        "mother",
        "hen",
        "cow",
        "giantess",
    }
    male = {
        "grandfather",
        "uncle",
        "boy",
        "old man",
        "young man",
        "prince",
        "king",
        "wizard",
        "rooster",
        "bull",
        "nephew",
        "brother",
        "father",
        "fisherman",
        "postman",
        "snowman",
        "night watchman",
        "sorcerer",
        "ram",
    }
    pronoun = (
        "she"
        if kind in female
        else "he"
        if kind in male
        else w.choose("he", "she", "he", "she", "it" if kind in words("animals") else "she")
    )
    if w.chance(0.05):
        return invented_word(w.rng)[:6].capitalize(), pronoun
    if (kind in words("animals") and w.chance(0.6)) or pronoun == "it":
        return w.pick("pet_names"), pronoun
    return w.pick("names_f" if pronoun == "she" else "names_m"), pronoun


def any_kind(w: Writer) -> str:
    """A kind of being that can be the hero of a story."""
    return w.pick(w.choose("animals", "animals", "people", "people", "creatures"))


FORMS = {"he": ("he", "him", "his"), "she": ("she", "her", "her"), "it": ("it", "it", "its")}


def _cast(w: Writer, topic: Topic) -> dict[str, str | Callable[[], str]]:
    """The context of one story: who is who, and all words that must stay the same."""
    kind = topic.hero or any_kind(w)
    w.begin(kind)
    name, pronoun = draw_name(w, kind)
    name = topic.name or name
    friend = topic.friend or any_kind(w)
    w.flavour = friend
    while friend == kind and not topic.friend:
        friend = any_kind(w)
    friend_name, friend_pronoun = draw_name(w, friend)
    friend_name = topic.friend_name or friend_name
    w.flavour = topic.thing or topic.theme or kind
    while friend_name == name:
        friend_name = w.pick("names_f" if friend_pronoun == "she" else "names_m")
    he, him, his = FORMS[pronoun]
    fhe, fhim, fhis = FORMS[friend_pronoun]
    char, char2, fchar = (w.pick("adj_character") for _ in range(3))
    at = topic.at or w.pick("places").replace("|", " ")
    at2 = w.pick("places").replace("|", " ")
    thing = topic.thing or w.pick(w.choose("objects", "objects", "objects", "big_things"))
    known: dict[str, bool] = {"hero": topic.pair, "friend": topic.pair}

    def introduce(who: str, k: str, n: str, adj: str, clause: str = "") -> Callable[[], str]:
        def say() -> str:
            if known[who]:
                return n
            known[who] = True
            named = w.choose(f"named {n}", f"called {n}", f"named {n}", f"whose name was {n}")
            return f"a {adj} {k} {named}{clause}"

        return say

    def refer(who: str, k: str, n: str) -> Callable[[], str]:
        def say() -> str:
            if not known[who]:
                known[who] = True
                return n + " the " + k
            return n if topic.pair or w.chance(0.7) else "the " + k

        return say

    adj = (
        topic.hero_adj
        if topic.hero_adj is not None
        else w.choose("", char, w.pick("adj_size"), f"{char} {w.choose('little', 'young', 'old')}", "")
    )
    clause = f", {topic.clause}," if topic.clause else ""
    context: dict[str, str | Callable[[], str]] = {
        "H": name,
        "k": kind,
        "F": friend_name,
        "fk": friend,
        "he": he,
        "him": him,
        "his": his,
        "fhe": fhe,
        "fhim": fhim,
        "fhis": fhis,
        "he_cap": w.choose("he", "she"),
        "a_hero": introduce("hero", kind, name, adj, clause),
        "hero": refer("hero", kind, name),
        "a_friend": introduce("friend", friend, friend_name, w.choose("", fchar, w.pick("adj_size"))),
        "friend": refer("friend", friend, friend_name),
        "a_friend_kind": "a " + w.pick("people"),
        "char": char,
        "char2": char2,
        "fchar": fchar,
        "at": at,
        "place": at.removeprefix("in the ")
        if at.startswith("in the ") and " " not in at.removeprefix("in the ")
        else w.choose("village", "valley", "country", "land"),
        "at2": at2,
        "place2_the": "the " + at2.split(" the ", 1)[-1],
        "town": w.pick("towns"),
        "o": thing,
        "people": w.pick("people"),
        "animals": w.pick("animals"),
        "creatures": w.pick("creatures"),
        "oa": topic.thing_adj or w.pick("adj_thing"),
        "skill": w.pick("skills"),
        "skill2": w.pick("skills"),
        "job": w.pick("jobs"),
        "fear": w.pick("fears"),
        "theme": topic.theme or w.pick("themes"),
        "theme2": w.pick("themes"),
        "moral": w.pick("morals"),
        "colour": w.pick("adj_colour"),
        "a_food": lambda: "a " + w.pick("foods"),
        "walking": lambda: w.raw("{verbs_move+ing}", {}).replace(" off", ""),
        "fwalking": "walking",
        "making": lambda: w.raw("{verbs_make+ing}", {}),
        "moved": lambda: w.raw("{verbs_move+ed}", {}),
        "looked": lambda: w.raw("{verbs_look+ed}", {}),
        "made": lambda: w.raw("{verbs_make+ed}", {}),
        "v1": w.pick("verbs_make"),
        "v2": w.pick("verbs"),
        "adverb": lambda: w.pick("adverbs"),
        "number": lambda: w.rng.choice(NUMBERS),
        "number_ord": w.choose("third", "fourth", "fifth", "seventh", "tenth", "last"),
        "ask1": "the " + w.pick("people"),
        "ask2": "the " + w.pick("animals"),
        "part": lambda: w.choose(
            "top",
            "bottom",
            "frame",
            "lid",
            "handle",
            "front",
            "back",
            "roof",
            "edge",
            "middle",
            "wheels",
            "legs",
            "corners",
        ),
        "greet": lambda: w.choose(
            "good morning", "hello", "good evening", "hello there", "good day", "oh, hello", "welcome"
        ),
        "what_doing": lambda: w.choose(
            "what are you doing here?",
            "where are you going?",
            "can I help you?",
            "what is the matter?",
            "are you looking for something?",
            "why are you so quiet?",
            "what is wrong?",
            "who are you?",
        ),
        "forgive": lambda: w.choose("that is all right", "do not worry", "never mind", "thank you for keeping it safe"),
    }
    return context


def _beats(rng: random.Random, scheme: list[list[str]]) -> list[str]:
    """One wording for every beat; a beat that returns takes its wordings in their written order."""
    drawn = {}
    for beat in scheme:
        count = scheme.count(beat)
        order = sorted(rng.sample(range(len(beat)), k=min(count, len(beat))))
        drawn.setdefault(id(beat), [beat[i] for i in order])
    return [drawn[id(beat)].pop(0) for beat in scheme if drawn[id(beat)]]


def tell(w: Writer, topic: Topic | None = None, length: str = "medium") -> Story:
    """Writes one story. ``length`` is ``short``, ``medium`` or ``long``."""
    topic = topic or Topic()
    context = _cast(w, topic)
    rng = w.rng
    scheme = rng.choice(SCHEMES)
    if w.chance(0.3):
        # Like the words, the plot leans a little on what the story is about.
        scheme = SCHEMES[zlib.crc32(w.flavour.encode()) % len(SCHEMES)]
    body = _beats(rng, scheme)
    opening = [rng.choice(OPENINGS)]
    if topic.clause:
        opening = [rng.choice([o for o in OPENINGS if "{a_hero}" in o and "who" not in o])]
    if topic.hero and "{k}" not in opening[0] and "{a_hero}" not in opening[0]:
        opening = [w.choose("there was once {a_hero}.", "{a_hero} lived {at}.", "in {town} there lived {a_hero}.")]
    if topic.pair:
        opening = ["[once upon a time|long ago|not so long ago], {at}, there lived two {k+s}, {H} and {F}."]
    if topic.theme:
        opening.append(rng.choice(THEME_LINES))
    if topic.thing:
        opening.append(
            w.choose(
                "{he} owned a {oa} {o}.",
                "{he} had [found|seen|heard of] a {oa} {o}.",
                "",
                "",
                "all {his} life {he} had [wished for|dreamed of|owned|looked after] a {o}.",
            )
        )
    if length == "short":
        keep = sorted(rng.sample(range(1, len(body) - 1), k=min(2, len(body) - 2)))
        body = [body[0], *(body[i] for i in keep), body[-1]]
        ending = [rng.choice(ENDINGS)]
    else:
        for _ in range(1 if length == "medium" else 2):
            opening.append(rng.choice(TRAITS))
        opening.append(rng.choice(WEATHER))
        if length == "medium":
            for _ in range(rng.randint(0, 3)):
                body.pop(rng.randrange(1, len(body) - 1))
        else:
            for extra in (CHATTER, WENT, FEEL, JOURNEY_STEPS, CHATTER):
                if w.chance(0.7):
                    body.insert(rng.randrange(1, len(body)), rng.choice(extra))
        ending = [rng.choice(ENDINGS), rng.choice(MORALS)]
    if topic.theme:
        ending.insert(rng.randrange(len(ending) + 1), rng.choice(THEME_ENDS))
    # The same frame twice in one story reads like a stutter.
    body = list(dict.fromkeys(body))
    paragraphs: list[list[str]] = [opening]
    current: list[str] = []
    for beat in body:
        current.append(beat)
        if len(current) >= 2 and w.chance(0.45 if length != "short" else 0.2):
            paragraphs.append(current)
            current = []
    paragraphs.append([*current, *ending] if w.chance(0.3) or not current else current)
    if paragraphs[-1] is current:
        paragraphs.append(ending)
    if length == "short" and w.chance(0.6):
        paragraphs = [[frame for paragraph in paragraphs for frame in paragraph]]
    done = [" ".join(filter(None, (w.fill(frame, context) for frame in frames))) for frames in paragraphs]
    done = [p for p in done if p]
    w.begin()
    get = lambda key: str(context[key])  # noqa: E731 - a one-word local shorthand
    return Story("\n\n".join(done), get("k"), get("H"), get("fk"), get("F"), get("o"), get("at"), get("moral"), done)


def title(w: Writer, story: Story) -> str:
    """A title for a story."""
    cap = lambda s: " ".join(p.capitalize() for p in s.split())  # noqa: E731
    return w.choose(
        f"The {cap(story.hero)} and the {cap(story.thing)}",
        f"{story.hero_name} and the {cap(story.thing)}",
        f"{story.hero_name} the {cap(story.hero)}",
        f"{story.hero_name} and {story.friend_name}",
        f"The {cap(story.thing)}",
        f"The {cap(story.hero)} {story.at.split(' the ')[0]} the {cap(story.at.split(' the ', 1)[-1])}",
    )


def plain_document(rng: random.Random) -> str:
    """One story as plain text, sometimes with a title, sometimes from the middle."""
    w = Writer(rng)
    story = tell(w, length=rng.choice(["short", "medium", "medium", "long"]))
    text = story.text
    if w.chance(0.06):
        # After a beginning that makes no sense, finding back to a story is the best thing to do.
        junk = " ".join(
            w.choose(invented_word(rng), w.pick("extra_nouns"), w.pick("verbs"), rng.choice("(){}[]=:;<>#*/0123456789"))
            for _ in range(rng.randint(1, 7))
        )
        return f"{junk}\n\n{text}"
    if w.chance(0.15):
        return f"{title(w, story)}\n\n{text}"
    if w.chance(0.12):
        # A completion may begin anywhere, so some documents do, too.
        sentences = text.split(". ")
        text = ". ".join(sentences[rng.randrange(len(sentences)) :])
    return text


__all__ = ["Story", "Topic", "any_kind", "draw_name", "plain_document", "plural", "tell", "title"]
