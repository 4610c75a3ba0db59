"""English sentences from a grammar of our own over the common words of `word_lists.py`.

Which word and which rule comes next is drawn at random, the less often it has been used the more likely, so that every
word is heard many times and in many neighbourhoods. The sentences are grammatical, and as sensible as the classes of
words make them. The same seed gives the same sentences.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from word_lists import DOUBLED_CONSONANT, IRREGULAR_VERBS, NOUNS, VERBS, WORDS

WORDS_PER_SENTENCE = (4, 14)
CANDIDATES = 30  # sentences drawn for each one kept
NEED_POWER = 2.0  # how strongly seldom used words are preferred
REPEATED_PAIR_COST = 0.5  # what two neighbours that were neighbours before take from a sentence's score
LENGTH_POWER = 0.85  # 1 would judge a sentence by its average word, 0 by its sum
LETTER_O = "aeiou"
AN_EXCEPTIONS = ("honest", "hour")  # begin with a vowel's sound
A_EXCEPTIONS = ("uni", "use", "usual", "one", "euro")  # do not, whatever their first letter

# {class} is a word of WORDS or a singular noun, {class+} a plural noun, {verb:form} a verb in that form; any other name
# in braces is a rule. A rule's alternatives are one a line, `2 ` before one doubles its weight.
RULES = {
    "sentence": """
        12 {statement}.
        2 {when_clause}.
        {order}.
        {question}?
    """,
    "statement": """
        12 {one} {does_one}
        4 {many} {do_many}
        4 {anyone} {did}
        {anyone} {did} {before} {anyone_again} {did_short}
        4 {verbs}
        {it_happens}
        {i_think}
        {passive}
        {there_is}
        {comparison}
    """,
    # who
    "one": """
        2 the {person}
        the {person_adjective} {person}
        {whose} {person}
        {whose} {person_adjective} {person}
        2 a {person_adjective} {person}
        {name}
        {he}
        the {animal_adjective} {animal}
        {whose} {animal}
        {someone}
        the {person} {beside} the {place}
        every {person}
    """,
    "many": """
        the {person+}
        {whose_many} {person_adjective} {person+}
        {number} {person+}
        {they}
        the {animal_adjective} {animal+}
        {number} {animal+}
        the {person} and the {person}
        {name} and {name}
        both of them
        most {person+}
        all {whose_many} {person+}
    """,
    "anyone": "2 {one}\n 2 {many}",
    "anyone_again": "{he}\n {they}\n {name}\n the {person}\n the {person+}\n {someone}",
    # what
    "thing_phrase": """
        2 the {thing_adjective} {thing}
        a {thing_adjective} {thing}
        {whose} {thing_adjective} {thing}
        the {material} {thing}
        {whose_many} {thing_adjective} {thing+}
        {number} {thing_adjective} {thing+}
        2 {number} {thing+}
        the {lowest} {thing}
        the {ordinal} {thing}
        a {round_number} {thing+}
        {round_number+} of {thing+}
        {relative} {thing}
        a {thing} and a {thing}
        the {thing+} and the {thing+}
        a {material} {thing}
        another {thing_adjective} {thing}
        a piece of {stuff}
        a {thing} full of {edible}
        a {thing} of {edible}
    """,
    "food_phrase": """
        2 the {food_adjective} {food}
        a {food_adjective} {food}
        2 {food_adjective} {food+}
        {number} {food_adjective} {food+}
        {food+} and {food+}
        2 some {food_adjective} {edible}
        {edible} and {edible}
        {edible} with {food+}
        {edible} without any {edible}
        enough {edible} for the {person+}
        too much {edible}
    """,
    "matter_phrase": """
        2 the {matter_adjective} {matter}
        a {matter_adjective} {matter}
        {whose} {matter}
        {whose_many} {matter_adjective} {matter+}
        {number} {matter_adjective} {matter+}
        the {ordinal} {matter}
        {number} of the {matter+}
        a {very} {matter_adjective} {matter}
    """,
    "person_phrase": """
        {him}
        {name}
        2 the {person_adjective} {person}
        {whose} {person}
        the {person_adjective} {person+}
        {whose_many} {person+}
        a {animal_adjective} {animal}
        the {animal+}
        {relative} {person}
    """,
    # where and when
    "where": """
        2 {in} the {place}
        {in} the {place_adjective} {place}
        {beside} the {place_adjective} {place}
        {beside} the {place}
        on the {place_adjective} {place}
        between the {place} and the {place}
        among the {place+}
        in front of the {place}
        under {whose} {thing}
    """,
    "where_to": """
        {to} the {place}
        {to} the {place_adjective} {place}
        {to} {whose} {place}
        {to} the {place+}
        down to the {place}
        back to the {place}
        up the {place_adjective} {place}
        away from the {place}
    """,
    "when": """
        on {day}
        in {month}
        every {morning}
        early in the {morning}
        in the {season}
        at {hour} o'clock
        next {day}
        today
        tonight
        before noon
        until {month}
        {number} times
        during the {season}
        for {number} days
        after {number} {years}
        in the early {morning}
        late at night
        this {season}
        every {day}
        tomorrow
        all day
        now
        later
        soon
    """,
    "when_past": """
        yesterday
        last {day}
        last {morning}
        {number} {years} ago
        {number} days ago
        one {season} {morning}
        on {month} {ordinal_day}
    """,
    "ordinal_day": "first\n second\n third\n fourth\n fifth\n sixth\n seventh\n eighth\n ninth\n tenth",
    "years": "days\n weeks\n months\n years\n hours\n minutes",
    "relative": "my father's\n his brother's\n her mother's\n the doctor's\n our neighbor's",
    "maybe_where": "2 {where}\n {when}\n {manner}",
    # what they do; past tense serves one and many
    "did": """
        2 {handle:past} {thing_phrase}
        2 {handle:past} {thing_phrase} {where}
        {meet:past} {person_phrase} {where}
        {meet:past} {person_phrase} {manner}
        {go:past} {manner} {where_to}
        {go:past} {where_to} {when}
        {stay:past} {where} {when}
        {stay:past} {manner} {where}
        2 {solve:past} {matter_phrase}
        {eat:past} {food_phrase} {where}
        2 {say:past} that {anyone_again} {did_short}
        {often} {handle:past} {thing_phrase}
        did not {handle:base} {thing_phrase}
        could not {solve:base} {matter_phrase}
        had {handle:participle} {thing_phrase} {before} {anyone_again} {did_short}
        had never {solve:participle} {matter_phrase}
        gave {person_phrase} {thing_phrase}
        told {person_phrase} about {matter_phrase}
        made {food_phrase} for {person_phrase}
        rubbed the {body} of {person_phrase}
        asked {person_phrase} to {handle:base} {thing_phrase}
        wanted to {solve:base} {matter_phrase}
        put {thing_phrase} on the {thing_adjective} {thing}
        looked at {thing_phrase} {manner}
        went fishing {where}
        stood in the {weather} {where}
        {say:past} that {matter_phrase} was {very} {matter_adjective}
        broke {thing_phrase} with a {material} {thing}
        built a {place_adjective} {place} {where}
        seemed {very} {person_adjective} {when}
        was {very} {person_adjective} about {matter_phrase}
    """,
    "did_short": """
        2 {handle:past} {whose} {thing}
        {go:past} {where_to}
        {stay:past} {manner}
        {solve:past} the {matter}
        {meet:past} {him}
        {eat:past} {whose} {food}
        left the {place}
    """,
    "does_one": """
        4 {handle:s} {thing_phrase} {when}
        {handle:s} {thing_phrase} and {handle:s} {whose} {thing}
        {stay:s} {manner} or {stay:s} {where}
        {meet:s} {person_phrase} and {meet:s} {person_phrase}
        {say:s} and {say:s} that {anyone_again} {did_short}
        {go:s} {where_to} and {stay:s} {where}
        is {stay:ing} and {stay:ing} {where}
        is {go:ing} {where_to} and {stay:ing} {manner}
        enjoys {handle:ing} {thing+} and {solve:ing} {matter+}
        keeps {stay:ing} {before} {one} {go:s} {where_to}
        has {go:participle} {where_to} and has {handle:participle} {thing_phrase}
        {often} {handle:s} {thing_phrase}
        2 {meet:s} {person_phrase} {where}
        {often} {meet:s} {person_phrase}
        2 {go:s} {where_to} {when}
        {stay:s} {where} {when}
        {often} {stay:s} {where}
        2 {solve:s} {matter_phrase} {when}
        2 {eat:s} {food_phrase} {when}
        {say:s} that {anyone_again} {did_short}
        2 is {handle:ing} {thing_phrase}
        {meet:s} {person_phrase} {manner}
        2 is {go:ing} {where_to}
        is {stay:ing} {maybe_where}
        2 is {solve:ing} {matter_phrase}
        is {eat:ing} {food_phrase}
        talks about {matter_phrase}
        has {handle:participle} {thing_phrase}
        has {meet:participle} {person_phrase}
        has {solve:participle} {matter_phrase}
        has {eat:participle} {food_phrase}
        has {go:participle} {where_to}
        {will} {handle:base} {thing_phrase}
        {will} {meet:base} {person_phrase} {when}
        {will} {go:base} {where_to}
        is {very} {person_adjective} {when}
        enjoys {solve:ing} {matter_phrase}
        enjoys {eat:ing} {food_phrase}
        keeps {handle:ing} {thing_phrase}
        does not {eat:base} {food_phrase}
        has {thing_adjective} {thing+}
        has {thing_adjective} {body}
    """,
    "do_many": """
        {handle:base} {thing_phrase} {when}
        are {stay:ing} and {stay:ing} {where}
        are {handle:ing} {thing+} and {eat:ing} {food+}
        have {go:participle} {where_to} {when}
        {often} {meet:base} {person_phrase}
        {go:base} {where_to} {when}
        {stay:base} {where} {when}
        {often} {solve:base} {matter_phrase}
        {often} {eat:base} {food_phrase}
        {say:base} that {anyone_again} {did_short}
        are {handle:ing} {thing_phrase}
        {meet:base} {person_phrase} {manner}
        are {go:ing} {where_to}
        were {stay:ing} {maybe_where}
        were {solve:ing} {matter_phrase}
        are {eat:ing} {food_phrase}
        talk about {matter_phrase}
        have {handle:participle} {thing_phrase}
        have {eat:participle} {food_phrase}
        have {solve:participle} {matter_phrase}
        {will} {stay:base} {where}
        {will} {say:base} that {one} {did_short}
        {will} {eat:base} {food_phrase}
        were {very} {person_adjective} {before} {anyone_again} {did_short}
        do not {meet:base} {person_phrase}
        enjoy {go:ing} {where_to}
        look {very} {person_adjective} {when}
    """,
    # whole sentences of other shapes
    "verbs": """
        {they} {stay:base} and {stay:base} {maybe_where}
        {they} {meet:base} and {meet:base} {person_phrase}
        {they} {will} {stay:base} or {go:base} {where_to}
        {he} {will} {meet:base} {him} and {solve:base} the {matter}
        {he} likes to {stay:base} and {go:base} {where_to}
        {they} want to {meet:base} and {meet:base} {him}
        {he} {meet:s} {him} and {stay:s} {manner}
        {he} {stay:s} or {stay:s} {where}
        {he} {go:s} and {stay:s} {maybe_where}
        {one} was {stay:ing} and {go:ing} {where_to}
        {they} {stay:past} but {he} {stay:past}
        {they} had {meet:participle} {him} and {stay:participle} {where}
        {they} had {go:participle} {where_to} and {handle:participle} {thing_phrase}
        {anyone} {go:past} and {stay:past} {where}
        {he} tried to {eat:base} and {eat:base} {food_phrase}
        {they} need to {say:base} what {one} {say:s}
        {they} {handle:base} or {handle:base} {thing_phrase}
        {one} {handle:s} and {handle:s} {thing_phrase}
        the {weather} {blow:s} and the {weather} {blow:s}
        the {weather} can {blow:base} or {blow:base} {when}
        {many} rubbed their {body} and their {body}
        {one} touched the {body} and the {body} of {person_phrase}
    """,
    "it_happens": """
        2 the {weather} {blow:past} {where} {when}
        the {weather_adjective} {weather} {blow:past} {where}
        the {weather_adjective} {weather} {blow:s} {where}
        a {weather_adjective} {weather} {blow:past} {where}
        the {weather} {blow:s} {where}
        the stars {blow:past} above the {place}
        the waves {blow:past} {beside} the {place}
        {weather_adjective} colours {blow:past} in the {weather}
        a bell rang {where}
        a {thing_adjective} layer of {stuff} covered the {place}
        the {weather} has {blow:participle} {when}
        the {weather} will {blow:base} {before} {one} {did_short}
        {weather} and {weather} {blow:past} {where}
        it was a {weather_adjective} {morning} {when}
        the {season} was {weather_adjective} and the {weather} {blow:past}
    """,
    "i_think": """
        {they} {say:past} that the {thing} was {very} {thing_adjective}
        {one} {say:past} why {anyone_again} {did_short}
        {one} {say:s} that the {place} is {very} {place_adjective}
        {they} {say:base} that the {food} was {food_adjective}
        {anyone} {say:past} how {matter_adjective} the {matter} was
        {many} {say:past} that {weather} and {weather} had {blow:participle}
        {anyone} {say:past} {where} that {anyone_again} {did_short}
        {one} has {say:participle} that {anyone_again} {did_short}
    """,
    "passive": """
        the {thing} was {handle:participle} by {person_phrase}
        the {thing_adjective} {thing+} were {handle:participle} {where}
        the {matter+} were {solve:participle} by {person_phrase}
        the {matter_adjective} {matter} will be {solve:participle} {when}
        the {place} was built of {stuff} and {stuff}
        the {food+} were {eat:participle} by the {animal+}
        {number} {person+} were {meet:participle} {where}
        the {thing} is made of {material} and {stuff}
        the {material} {thing} has been {handle:participle}
    """,
    "there_is": """
        there is a {thing_adjective} {thing} {where}
        there are {number} {thing+} {where}
        there were {round_number+} of {animal+} {where}
        there is enough {edible} in the {thing}
        there was a {animal_adjective} {animal} {where}
        there are no {food+} {where}
        there will be a {matter_adjective} {matter} {when}
        here is {whose} {thing_adjective} {thing}
        this is the {lowest} {place} of the {place}
    """,
    "comparison": """
        the {animal} is {larger} than the {animal}
        {whose} {thing} is {larger} and {larger} than {whose} {thing}
        the {lowest} {place} is {beside} the {place}
        {name} is the {lowest} {person} {where}
        {number} is less than {number}
        {whose} {matter} was {larger} than {whose} {matter}
        this {place} has the {lowest} {food+}
        {whose} {food} tastes {larger} than {whose} {food}
        the {place} is as {place_adjective} as the {place}
    """,
    "when_clause": """
        {before} {anyone_again} {did_short}, {anyone_again} {did_short}
        {before} the {weather} {blow:past}, {one} {did_short}
        {when_past}, {anyone} {did}
        {when_past} the {weather} {blow:past} {where}
        in {month}, {one} {did_short}
        yes, {one} {did_short}
        no, {they} {did_short}
        then {anyone} {did}
        of course {one} {did_short}
        in a low voice, {one} {say:past} that {anyone_again} {did_short}
        {they} measured the height of the {place}
        perhaps {one} {did_short}
        {name} {did_short}, but {name} {did_short}
        {one} {did_short}, and {many} {did_short}
        {one} {did_short}, or {he} {did_short}
        {anyone} {did_short}, so {anyone_again} {did_short}
    """,
    "order": """
        {handle:base} {thing_phrase} {where}
        please {handle:base} {thing_phrase}
        please {solve:base} {matter_phrase} {when}
        do not {handle:base} {thing_phrase}
        never {meet:base} {person_phrase}
        let {him} {eat:base} {food_phrase}
        please {eat:base} {food_phrase} {when}
        {go:base} {where_to} {manner}
        {stay:base} {where} until {day}
        {stay:base} and {stay:base} {manner}
        {go:base} {where_to} and {stay:base} {where}
        {meet:base} and {meet:base} {person_phrase}
        put {thing_phrase} back {where}
        {name}, {handle:base} {thing_phrase}
        let us {go:base} {where_to}
        give {him} {thing_phrase}
        {say:base} what {anyone_again} {say:past}
    """,
    "question": """
        did {anyone_again} {handle:base} {thing_phrase}
        {why} did {anyone_again} {solve:base} {matter_phrase}
        {why} did {many} {go:base} {where_to}
        {will} {they} {handle:base} {thing_phrase}
        {will} {he} {eat:base} {food_phrase}
        can {they} {meet:base} {person_phrase}
        where is {whose} {thing_adjective} {thing}
        where are {whose_many} {thing+}
        who {handle:past} {thing_phrase}
        who {did}
        what did {anyone_again} {handle:base} {where}
        what is the {person} {handle:ing}
        which {person} {did}
        is {he} {solve:ing} {matter_phrase}
        have {they} {meet:participle} {person_phrase}
        has {he} {go:participle} {where_to}
        does {he} {often} {stay:base} {where}
        do {they} {say:base} that {one} {did_short}
        {why} does {he} {eat:base} {food_phrase}
        how many {thing+} did {anyone_again} {handle:base}
        whose {thing} is {thing_adjective}
        was the {matter} {matter_adjective}
    """,
}
ROUND_NUMBERS = "hundreds thousands millions dozens".split()


def verb_forms(base: str) -> dict[str, str]:
    """Inflect a verb.

    Args:
        base: as in `take`.

    Returns:
        the forms `base`, `s`, `ing`, `past` and `participle`.
    """
    soft_end = base.endswith("e")
    consonant_y = base.endswith("y") and base[-2] not in LETTER_O
    stem = base + base[-1] if base in DOUBLED_CONSONANT else base
    past = stem + "d" if soft_end else base[:-1] + "ied" if consonant_y else stem + "ed"
    irregular = IRREGULAR_VERBS.get(base, past).split()
    if consonant_y:
        third = base[:-1] + "ies"
    else:
        third = base + ("es" if base.endswith(("s", "sh", "ch", "x", "go")) else "s")
    ing = base[:-1] + "ing" if soft_end and not base.endswith("ee") else stem + "ing"
    return {"base": base, "s": third, "ing": ing, "past": irregular[0], "participle": irregular[-1]}


def word_classes() -> dict[str, list[str]]:
    """List the words of every class.

    Returns:
        name of the class as the rules write it, without braces, to its words, in their order.
    """
    classes = {name: text.split() for name, text in WORDS.items()}
    classes["round_number+"] = ROUND_NUMBERS
    for name, text in NOUNS.items():
        pairs = [word.partition("/")[::2] for word in text.split()]
        classes[name] = [singular for singular, _ in pairs if singular]
        classes[name + "+"] = [plural for _, plural in pairs if plural]
    for name, text in VERBS.items():
        for form in ("base", "s", "ing", "past", "participle"):
            classes[f"{name}:{form}"] = [verb_forms(base)[form] for base in text.split()]
    return {name: list(dict.fromkeys(words)) for name, words in classes.items() if words}


def vocabulary() -> set[str]:
    """List every word that a sentence may hold.

    Returns:
        small letters, as `words_of` gives them.
    """
    texts = " ".join(RULES.values())
    classes = word_classes()
    used = {name for name in re.findall(r"\{([^}]+)\}", texts) if name in classes}
    literal = re.sub(r"\{[^}]+\}|\ba\b", " ", texts)
    return set(words_of(literal)) | {word.lower() for name in used for word in classes[name]}


def words_of(sentence: str) -> list[str]:
    """Split a sentence into its words, small letters, without punctuation.

    Args:
        sentence: as in `Is it six o'clock?`.

    Returns:
        as in `["is", "it", "six", "o'clock"]`.
    """
    return re.findall(r"[a-z]+(?:'[a-z]+)*", sentence.lower())


def sentence_key(sentence: str) -> str:
    """Give what two sentences share that differ in letter case, spaces or punctuation only.

    Args:
        sentence: any text.

    Returns:
        its words.
    """
    return " ".join(words_of(sentence))


class SentenceMaker:
    """Draws sentences that are new, and prefers words and pairs of words that were used seldom.

    Args:
        seed: of the private random generator.
        forbidden: sentences never to give.
    """

    def __init__(self, seed: int | str, forbidden: Iterable[str] = ()) -> None:
        self.word_counts: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._draw = random.Random(seed)
        self._given = {sentence_key(sentence) for sentence in forbidden}
        self._classes = word_classes()
        self._rules = {name: _alternatives(text) for name, text in RULES.items()}

    def sentence(self) -> str:
        """Draw the next sentence.

        Returns:
            4 to 14 words with a capital first letter and `.` or `?` at the end, unlike every sentence before.
        """
        best, best_score = "", float("-inf")
        accepted = 0
        while accepted < CANDIDATES:
            candidate = _finish(self._expand("sentence"))
            words = words_of(candidate)
            lowest, highest = WORDS_PER_SENTENCE
            if not lowest <= len(words) <= highest or " ".join(words) in self._given or _repeats(words):
                continue
            accepted += 1
            score = self._score(words)
            if score > best_score:
                best, best_score = candidate, score
        words = words_of(best)
        self._given.add(" ".join(words))
        self.word_counts.update(words)
        self._pairs.update(pairwise(words))
        return best

    def _expand(self, rule: str) -> str:
        texts, weights = self._rules[rule]
        (text,) = self._draw.choices(texts, weights)
        return re.sub(r"\{([^}]+)\}", lambda found: self._fill(found.group(1)), text)

    def _fill(self, name: str) -> str:
        if name in self._rules:
            return self._expand(name)
        words = self._classes[name]
        weights = [1 / (1 + self.word_counts[word.lower()]) ** NEED_POWER for word in words]
        (word,) = self._draw.choices(words, weights)
        return word

    def _score(self, words: list[str]) -> float:
        """Say how much a sentence adds: seldom used words and new neighbours."""
        need = sum(1 / (1 + self.word_counts[word]) ** 2 for word in words)
        repeated = sum(self._pairs[pair] > 0 for pair in pairwise(words))
        typical = sum(self.word_counts.values()) / max(1, len(self.word_counts))
        return (need * (1 + typical) ** 2 - REPEATED_PAIR_COST * repeated) / len(words) ** LENGTH_POWER


def _alternatives(text: str) -> tuple[list[str], list[int]]:
    """Read a rule: its alternatives and their weights."""
    texts, weights = [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        weight, _, rest = line.partition(" ")
        texts.append(rest if weight.isdigit() else line)
        weights.append(int(weight) if weight.isdigit() else 1)
    return texts, weights


def _repeats(words: list[str]) -> bool:
    """Whether a longer word comes twice, or any word twice in a row."""
    long_words = [word for word in words if len(word) > 4]
    return len(set(long_words)) < len(long_words) or any(a == b for a, b in pairwise(words))


def _finish(text: str) -> str:
    """Turn `a` into `an` where a vowel's sound follows, and begin with a capital."""

    def article(found: re.Match[str]) -> str:
        word = found.group(2)
        vowel = word[0] in LETTER_O or word.startswith(AN_EXCEPTIONS)
        return ("an " if vowel and not word.startswith(A_EXCEPTIONS) else "a ") + word

    text = re.sub(r"\b(a) (\w+)", article, text)
    return text[0].upper() + text[1:]
