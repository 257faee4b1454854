"""A prompt in plain words, as a condition: `a smiling woman without glasses`."""

import re

from ddm.condition import Vocabulary
from ddm.errors import ConfigError, shown

# Words that say nothing by themselves.
_FILLERS = {
    "of", "with", "and", "is", "are", "that", "who", "has", "have", "having", "wearing", "in",
    "on", "photo", "photograph", "picture", "image", "portrait", "person", "human", "face",
    "someone", "number", "digit",
}  # fmt: skip
_ARTICLES = {"a", "an", "the", "some"}  # also within a name
_NOT = {"not", "no", "without", "non"}
_OR = {"or", "nor"}  # after `not`, it goes on
# What is said of a person, never of what somebody is without.
_ADJECTIVES = {
    "attractive", "bald", "beardless", "bearded", "blond", "blonde", "blurry", "chubby", "female", "male", "old",
    "smiling", "young", "man", "men", "guy", "boy", "gentleman", "woman", "women", "lady", "girl",
}  # fmt: skip

# Plain words for names that people do not use; each counts only where the vocabulary has its name.
_WORDS = {
    "Male": "man men male guy boy gentleman", "Eyeglasses": "glasses spectacles",
    "Smiling": "smile smiles", "Wearing_Hat": "hat", "Wearing_Lipstick": "lipstick",
    "Wearing_Necktie": "necktie tie", "Wearing_Necklace": "necklace", "Gray_Hair": "grey_hair",
    "Wearing_Earrings": "earrings earring", "Mustache": "moustache", "Heavy_Makeup": "makeup",
    "Blond_Hair": "blond blonde blonde_hair", "Mouth_Slightly_Open": "open_mouth",
    "No_Beard": "beardless", "0": "zero", "1": "one", "2": "two", "3": "three", "4": "four",
    "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
}  # fmt: skip
_OPPOSITES = {"Male": "woman women female lady girl", "Young": "old", "No_Beard": "beard bearded"}


def condition_of(prompt: str, vocabulary: Vocabulary) -> dict[str, int]:
    """The classes or attributes that a prompt names: 1, or 0 after `not`, `no` or `without`.

    Raises `ConfigError` naming the first word that is unknown, and the vocabulary.
    """
    if vocabulary.kind == "label" and prompt in vocabulary.names:  # whatever its words mean
        return {prompt: 1}
    terms = _terms(vocabulary)
    longest = max(map(len, terms), default=1)
    words = [word for word in _words(prompt) if word not in _ARTICLES or (word,) in terms]
    found: dict[str, int] = {}
    negated = listed = False  # listed: what was negated may go on, without a word for it
    i = 0
    while i < len(words):
        for length in range(min(longest, len(words) - i), 0, -1):
            term = terms.get(tuple(words[i : i + length]))
            if term is not None:
                break
        else:
            negated = _after(words[i], negated, prompt, vocabulary)
            listed = listed and words[i] == "and"
            i += 1
            continue
        phrase = " ".join(words[i : i + length])
        begun = phrase in _ADJECTIVES or words[i] in _NOT | _FILLERS  # what is said anew
        if listed and not negated and not begun:
            raise _refused(
                prompt, "repeat 'without', or say 'or', where several things are not to be there"
            )
        name, value = term
        value = 1 - value if negated else value
        if found.setdefault(name, value) != value:
            raise _refused(prompt, f"not say both {name} and the opposite")
        goes_on = i + length < len(words) and words[i + length] in _OR
        listed = negated and not goes_on
        negated = negated and goes_on
        i += length
    if negated:
        raise _refused(prompt, "say what is not to be there")
    if not found:
        raise _refused(prompt, f"name one of {', '.join(vocabulary.names)}")
    if vocabulary.kind == "label" and (len(found) > 1 or 0 in found.values()):
        raise _refused(prompt, f"name one class alone, of {', '.join(vocabulary.names)}")
    return found


def in_words(condition: dict[str, int], vocabulary: Vocabulary) -> str:
    """How a condition was understood: `frog`, or `Smiling=1, Male=0`."""
    if vocabulary.kind == "label":
        return ", ".join(condition)
    return ", ".join(f"{name}={value}" for name, value in condition.items())


def _terms(vocabulary: Vocabulary) -> dict[tuple[str, ...], tuple[str, int]]:
    """What words mean: those of the names themselves before any other."""
    terms: dict[tuple[str, ...], tuple[str, int]] = {}
    for table, value in ((_OPPOSITES, 0), (_WORDS, 1)):
        for name, phrases in table.items():
            if name in vocabulary.names:
                terms |= {tuple(_words(phrase)): (name, value) for phrase in phrases.split()}
    spelt = [tuple(_words(name)) for name in vocabulary.names]
    names = {
        words: (name, 1)
        for words, name in zip(spelt, vocabulary.names, strict=True)
        if words and spelt.count(words) == 1  # else only the exact name says which
    }
    short = {
        tuple(word for word in words if word not in _ARTICLES): it for words, it in names.items()
    }
    return terms | {words: it for words, it in short.items() if words} | names


def _words(text: str) -> list[str]:
    """Of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def _after(word: str, negated: bool, prompt: str, vocabulary: Vocabulary) -> bool:
    """Whether what follows a word that is no name is negated. Raises `ConfigError` if it is unknown."""
    if word in _NOT:
        return True
    if word in _FILLERS or (word in _OR and negated):
        return negated
    names = ", ".join(vocabulary.names)
    raise _refused(prompt, f"use words for {names}; {shown(word)} is not one of them")


def _refused(prompt: str, rule: str) -> ConfigError:
    return ConfigError(f"prompt must {rule}; got {shown(prompt)}", "prompt")
