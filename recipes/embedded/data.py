"""Pictures and captions for the embedded model, made from freely licensed emoji.

    python -m recipes.embedded.data OUT [--cache DIR]

Three styles of the same concepts ("3d", "flat", "cartoon") on white, as an ImageFolder with a
fixed held-out split, and held-out phrasings of every concept. Needs `npm` (it fetches four pinned
packages once into the cache) and the Python package `resvg-py`.
"""

import argparse
import hashlib
import io
import itertools
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_folder

from .emoji_words import (
    CLOCK_KEPT,
    CORE,
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

SIZE = 128  # pixels
BOX = 116  # longer side of the picture's visible part: the same for every style
HELD_OUT = 0.1  # share of the (concept, style) pairs

STYLES = ("3d", "flat", "cartoon")
SOURCES = {
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT (Microsoft, Fluent Emoji)"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT (Microsoft, Fluent Emoji)"),
    "cartoon": ("@iconify-json/noto", "1.2.9", "Apache-2.0 (Google, Noto Emoji)"),
    "words": ("emojibase-data", "17.0.0", "MIT (Miles Johnson)"),
}

# emojibase groups: smileys, people, animals, food, places, activities, objects
GROUPS = {0, 1, 3, 4, 5, 6, 7}

HELD_OUT_TEMPLATES = [
    "draw me {a}",
    "a lovely {label}",
    "please make {a}",
    "show me {a}",
    "a picture of {a}",
    "i would like {a}",
    "one simple {label}",
    "{a} on a white background",
]


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


def split_of(concept: str, styles: list[str]) -> dict[str, str]:
    """{style: "train" | "heldout"}, by hash; a concept always keeps one style in train."""
    rank = {style: fraction(f"{concept}/{style}") for style in styles}
    seen = max(styles, key=rank.get)
    return {s: "heldout" if rank[s] < HELD_OUT and s != seen else "train" for s in styles}


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


def captions(concept: dict, style: str, phrases: list[str]) -> list[str]:
    """Training captions of one picture, the main one first (lower case, at most 20 words).

    Only "3d" pictures get captions without a style word, so that a bare prompt means 3D.
    """
    label = concept["label"]
    a = with_article(label)
    texts = [f"{a}, {style} style"]
    if style == "3d":
        texts += [
            f"a 3d render of {a}",
            f"3d {label}",
            f"a 3d picture of {a}",
            f"a 3d model of {a}",
        ]
        texts += [f"{phrase}, 3d style" for phrase in phrases[:1]]
        texts += [a, label, *phrases[:4]]
    else:
        noun = {"flat": "flat icon", "cartoon": "cartoon"}[style]
        texts += [f"a {noun} of {a}", f"{style} {label}", f"{noun}, {label}"]
        texts += [f"a {style} drawing of {a}", f"{a} in a {style} style"]
        texts += [f"{phrase}, {style} style" for phrase in phrases[:2]]
    return [t for t in dict.fromkeys(texts) if len(t.split()) <= 20]


def phrasings(concepts: list[dict]) -> tuple[dict[str, list[str]], list[dict]]:
    """(training phrases by concept, held-out rows {"concept", "label", "text", "kind"}).

    A phrase goes to one side by hash; no held-out text is a training caption of any concept.
    """
    finder = Phrases(concepts)
    train, held = {}, {}
    for concept in concepts:
        key = concept["concept"]
        replaced, doubled, mixed, alone = finder.of(concept)
        # Kept for testing: half of the single replacements, one double one, and one other phrase
        # with a word of the label; tags alone describe too loosely to be asked back.
        n = (len(replaced) + (fraction(f"held/{key}") < 0.5)) // 2
        held[key] = [*doubled[:1], *replaced[: min(n, 2)], *mixed[:1]]
        train[key] = [*replaced[n : n + 2], *mixed[1:3], *alone[:1], *mixed[3:]]
    seen = {
        text
        for c in concepts
        for style in ("3d", "flat", "cartoon")
        for text in captions(c, style, train[c["concept"]])
    }
    rows, used = [], set()
    for concept in concepts:
        key, label = concept["concept"], concept["label"]
        templates = sorted(HELD_OUT_TEMPLATES, key=lambda t: fraction(f"{key}/{t}"))
        a = with_article(label)
        if a == label:  # no "a lovely glasses"
            templates = [t for t in templates if "{label}" not in t]
        texts = [(t.format(a=a, label=label), "template") for t in templates[:2]]
        texts += [(t, "words") for t in held[key]]
        for text, kind in texts:
            if text not in seen and text not in used:
                used.add(text)
                rows.append({"concept": key, "label": label, "text": text, "kind": kind})
    return train, rows


def fetch(name: str, version: str, cache: Path) -> Path:
    """The package's archive in `cache`, fetched with `npm pack` when it is not there."""
    archive = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(cache)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise SnapGenError("npm is needed to fetch the emoji packages; install Node") from None
        except subprocess.CalledProcessError as e:
            raise SnapGenError(f"npm pack {name}@{version} failed: {e.stderr.strip()}") from e
    return archive


def framed(image: Image.Image) -> Image.Image:
    """An RGBA picture cut to its visible part, scaled to BOX and centred on SIZE x SIZE white."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    image = image.crop(box)
    scale = BOX / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2), image)
    return canvas


def load_drawings(archives: dict[str, Path]) -> dict[str, dict[str, bytes | str]]:
    """{style: {concept key: WebP bytes or SVG text}} of the three picture packages."""
    drawings: dict[str, dict[str, bytes | str]] = {"3d": {}}
    with tarfile.open(archives["3d"]) as tar:
        for member in tar:
            if member.name.endswith(".webp"):
                drawings["3d"][join_key(Path(member.name).stem)] = tar.extractfile(member).read()
    for style in ("flat", "cartoon"):
        with tarfile.open(archives[style]) as tar:
            icons, chars = (
                json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "chars")
            )
        drawings[style] = {}
        for hexcode, name in chars.items():
            icon = icons["icons"].get(name)
            if icon is None:  # an alias of another picture
                continue
            w, h = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
            drawings[style][join_key(hexcode)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{w}" height="{h}">'
                f"{icon['body']}</svg>"
            )
    return drawings


def rasterise(drawing: bytes | str) -> Image.Image:
    if isinstance(drawing, str):
        import resvg_py

        drawing = bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=512))
    return Image.open(io.BytesIO(drawing)).convert("RGBA")


def build(out: Path, cache: Path, wanted: Iterable[str] = STYLES, core: bool = False) -> dict:
    """Write the `wanted` styles to `out` (which must not exist yet); returns the data card.

    With `core` only the concepts of `emoji_words.CORE` are written. Split and phrasings of a
    concept are the same in every selection.
    """
    archives = {use: fetch(name, version, cache) for use, (name, version, _) in SOURCES.items()}
    with tarfile.open(archives["words"]) as tar:
        records = json.load(tar.extractfile("package/en/data.json"))
    drawings = load_drawings(archives)
    styles = {}
    concepts = []
    for concept in select(records):
        key = concept["concept"]
        styles[key] = [style for style in drawings if key in drawings[style]]
        if len(styles[key]) >= 2:
            concepts.append(concept)
    train_phrases, rows = phrasings(concepts)
    if core:
        concepts = [c for c in concepts if c["label"] in CORE]
        kept = {c["concept"] for c in concepts}
        rows = [row for row in rows if row["concept"] in kept]

    counts = Counter()
    with atomic_folder(out) as folder:
        metadata = {"train": [], "heldout": []}
        for part in metadata:
            (folder / part).mkdir()
        for concept in concepts:
            key = concept["concept"]
            for style, part in split_of(key, styles[key]).items():
                if style not in wanted:
                    continue
                name = f"{key}-{style}.png"
                framed(rasterise(drawings[style][key])).save(folder / part / name)
                texts = captions(concept, style, train_phrases[key])
                metadata[part].append(
                    {
                        "file_name": name,
                        "text": texts[0],
                        "captions": texts,
                        "concept": key,
                        "label": concept["label"],
                        "style": style,
                    }
                )
                counts[f"{part} {style}"] += 1
        for part, entries in metadata.items():
            _write_lines(folder / part / "metadata.jsonl", entries)
        _write_lines(folder / "phrasings.jsonl", rows)
        card = {
            "size": SIZE,
            "concepts": len(concepts),
            "images": {part: len(entries) for part, entries in metadata.items()},
            "images_by_style": dict(sorted(counts.items())),
            "captions": sum(len(e["captions"]) for e in metadata["train"]),
            "heldout_phrasings": dict(Counter(row["kind"] for row in rows)),
            "sources": [
                {
                    "used_for": use,
                    "package": f"{name}@{version}",
                    "licence": licence,
                    "sha256": hashlib.sha256(archives[use].read_bytes()).hexdigest(),
                }
                for use, (name, version, licence) in SOURCES.items()
            ],
        }
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--cache", type=Path, help="where the packages are kept (default: beside)")
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--core", action="store_true", help="only the concepts of CORE")
    args = parser.parse_args()
    try:
        cache = args.cache or args.out.parent / "cache"
        card = build(args.out, cache, args.styles, args.core)
    except SnapGenError as e:
        raise SystemExit(f"error: {e}") from None
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
