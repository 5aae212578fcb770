"""What there is to draw and how it is called: concepts of emojibase, their names and phrases."""

import hashlib
import itertools
import re
import unicodedata
from collections import Counter

from .emoji_words import (
    CLOCK_KEPT,
    FIXED,
    IGNORED,
    KEPT_VARIANTS,
    LOOK_ALIKES,
    NO_ARTICLE,
    RELABEL,
    SINGULAR_S,
    SYNONYMS,
    THE,
)

MODIFIERS = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
# emojibase groups: smileys, people, animals, food, places, activities, objects
GROUPS = {0, 1, 3, 4, 5, 6, 7}


def fraction(text: str) -> float:
    """A fixed number in [0, 1) for a text: the only 'randomness' of the data set."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def plain(text: str) -> str:
    """Lower-case ASCII with straight quotes: 'Piñata’s' -> "pinata's"."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'").replace("–", "-").lower())
    return " ".join(text.encode("ascii", "ignore").decode().replace(".", "").split())


def join_key(hexcode: str) -> str:
    """Code points as all packages share them: lower case, without the variation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def words_of(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z0-9'-]+", text) if w not in IGNORED]


def _read_synonyms() -> tuple[dict[str, str], dict[str, list[str]]]:
    """({word: class name}, {word: the words that may stand for it})."""
    names, others = {}, {}
    for group in SYNONYMS.split("|"):
        same, _, forms = group.partition("/")
        same = same.split()
        names |= dict.fromkeys(same + forms.split(), same[0])
        others |= {word: [o for o in same if o != word] for word in same}
    return names, others


CLASS_NAME, STANDS_FOR = _read_synonyms()


def canonical(word: str) -> str:
    """One name for a word, its plural and its synonyms."""
    singular = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    for form in (word, singular):
        if form in CLASS_NAME:
            return CLASS_NAME[form]
    return singular


def with_article(label: str) -> str:
    """'grinning cat' -> 'a grinning cat'; plurals, names and materials stay bare."""
    if label in THE:
        return f"the {label}"
    noun = re.split(
        r" (?:with|of|in|on|at|behind|over|under|and|making|pointing|holding|lifting) ", label
    )[0]
    last = noun.split()[-1]
    plural = re.search("[^s']s$", last) and last not in SINGULAR_S
    if label in NO_ARTICLE or (plural and label not in ("thumbs up", "thumbs down")):
        return label
    vowel = re.match("[aeiou]|hour|x-ray", label) and not re.match("uni|ewe|euro|one", label)
    return f"{'an' if vowel else 'a'} {label}"


def select(records: list[dict]) -> list[dict]:
    """The concepts: {"concept", "label", "tags"} of the emojibase records worth drawing.

    Left out: flags, symbols, people's gender and hair variants (the neutral one stays), families,
    the clock faces but one, and near-duplicates.
    """
    concepts = []
    for record in records:
        label, key = plain(record["label"]), join_key(record["hexcode"])
        if record.get("group") not in GROUPS or label in LOOK_ALIKES:
            continue
        gendered = re.search(r"-200d-264[02]", key) or re.match(r"1f46[89]-200d", key)
        hair = re.search(r"-200d-1f9b[0-3]", key)
        if (gendered or hair) and label not in KEPT_VARIANTS:
            continue
        if "facing right" in label or label.startswith(("family", "kiss:", "couple with heart:")):
            continue
        if re.search(r"o'clock|-thirty", label) and label != CLOCK_KEPT:
            continue
        label = RELABEL.get(label, label)
        own = set(words_of(label))
        tags = [plain(tag) for tag in record.get("tags", [])]
        tags = [t for t in tags if re.fullmatch(r"[a-z-]{3,}", t) and t not in IGNORED | own]
        concepts.append({"concept": key, "label": label, "tags": list(dict.fromkeys(tags))})
    return concepts


def emoji_names(records: list[dict]) -> dict[str, str]:
    """The name of every emoji, as captions call it where it is drawn.

    Keys have no variation selectors and no skin tones: these do not change what is meant.
    """
    drawn = {c["concept"]: c["label"] for c in select(records)}
    names = {}
    for record in records:
        label = drawn.get(join_key(record["hexcode"])) or plain(record["label"])
        if emoji := MODIFIERS.sub("", record["emoji"]):  # nothing is left of a skin tone itself
            names[emoji] = label
    return names


class Phrases:
    """Phrases that single out one concept among all, by the words of its label and tags."""

    def __init__(self, concepts: list[dict]):
        self.label_words = {c["concept"]: self._bag(c["label"]) for c in concepts}
        self.all_words = {
            c["concept"]: self._bag(" ".join([c["label"], *c["tags"]])) for c in concepts
        }
        self.frequency = Counter(w for words in self.all_words.values() for w in words)
        self.holders: dict[str, set[str]] = {}
        for concept, words in self.all_words.items():
            for word in words:
                self.holders.setdefault(word, set()).add(concept)
        self.labels = {c["label"]: c["concept"] for c in concepts}

    @staticmethod
    def _bag(text: str) -> frozenset[str]:
        return frozenset(canonical(w) for w in words_of(text))

    def identifies(self, text: str, concept: str) -> bool:
        """Whether `text` fits `concept` better than any other concept.

        Every word must belong to the concept; of several concepts with all these words, the one
        whose label is covered best is meant, and it must be the only such one.
        """
        bag = self._bag(text)
        if not bag or not bag <= self.all_words[concept]:
            return False
        rivals = set.intersection(*(self.holders[w] for w in bag)) - {concept}

        def coverage(c):
            label = self.label_words[c]
            return len(bag & label) / max(len(label), 1)

        return all(coverage(concept) > coverage(r) for r in rivals)

    def of(self, concept: dict) -> tuple[list[str], ...]:
        """Phrases for a concept other than its label, four lists in a fixed order.

        (the label with one word replaced, with two replaced, words of the label and a tag, tags)
        """
        key, label = concept["concept"], concept["label"]
        tags = sorted(concept["tags"], key=lambda t: (self.frequency[canonical(t)], t))
        parts, content = label.split(), words_of(label)
        swaps = [STANDS_FOR.get(word, []) for word in parts] if label not in FIXED else []
        variants = {1: [], 2: []}
        for n, texts in variants.items():
            for places in itertools.combinations([i for i, s in enumerate(swaps) if s], n):
                for others in itertools.product(*(swaps[i] for i in places)):
                    words = dict(enumerate(parts)) | dict(zip(places, others, strict=True))
                    texts.append(with_article(" ".join(words.values())))
        mixed = [f"{label}, {tag}" for tag in tags[:4]]
        mixed += [f"{tag} {label}" for tag in tags[:3] if len(content) < 3]
        mixed += [f"{word} {tag}" for word in content for tag in tags[:3] if len(content) < 3]
        if len(content) == 2:
            mixed.append(f"{content[1]}, {content[0]}")
        alone = [with_article(tag) for tag in tags[:4] if self.frequency[canonical(tag)] == 1]
        alone += [" ".join(group) for n in (2, 3) for group in itertools.combinations(tags[:5], n)]

        def good(texts):
            found = [
                text
                for text in dict.fromkeys(texts)
                if self.identifies(text, key)
                and self.labels.get(text, key) == key
                and text not in (label, with_article(label))
                and len({canonical(w) for w in text.split()}) == len(text.split())  # no "ship boat"
            ]
            return sorted(found, key=lambda t: fraction(f"{key}/{t}"))

        rare = [t for t in good(mixed) if min(self.frequency[w] for w in self._bag(t)) <= 8]
        return good(variants[1]), good(variants[2]), rare, good(alone)
